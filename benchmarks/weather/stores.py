"""Whole stores: what regridding them and reading their frames costs."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
import xarray as xr

from benchmarks.comparison import Call, Comparison, Figure, Load
from harness.system import MemoryMeter, return_freed_memory
from weather.grid import Grid, regular_grid
from weather.state import FENGWU

FRAMES = 2
ROWS, COLUMNS = 721, 1440
TARGET = "240x121_equiangular_with_poles"
METHODS = ("conservative", "bilinear")
GIB = 2**30
PEAK = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:], stdout=sys.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def comparisons() -> Iterator[Comparison]:
    """Regridding, then frames that are read; on one CPU thread."""
    yield regridding()
    yield frames()


def regridding() -> Comparison:
    """Return both methods, reading and writing among it.

    The bars: a frame in a second, and a process, with all that it imports, in 1 GiB that keeps the
    area mean to a millionth of the largest value.
    """
    world = _Stores()
    return Comparison(
        name=f"regrid {FRAMES} frames of 69x{ROWS}x{COLUMNS} to 1.5 degrees",
        op="regrid",
        build=world.build,
        baseline="conservative",
        units=dict.fromkeys(METHODS, float(FRAMES)),
        unit="frame",
        rate="frames/CPU-s",
        seconds={"conservative": 1.0},
        figures={
            "peak memory of the command": Figure(world.peak, "bytes", 1.0, GIB, "1 GiB"),
            "change of the area mean": Figure(world.change, "of the largest value", 1e-6),
        },
        memory=float(GIB),
    )


class _Stores:
    """A store of smooth fields with noise, made at the first call, and what is made of it."""

    def __init__(self) -> None:
        self._folder: Path | None = None

    def build(self, load: Load) -> Mapping[str, Call]:
        """Return a call for each method."""
        operations = load("weather.operations.regridding")
        target = load("weather.grid").named_grid(TARGET).grid

        def regrid(method: str) -> Call:
            return lambda: operations.regrid_store(
                self.source, target, self.output, method=method, overwrite=True
            )

        return {method: regrid(method) for method in METHODS}

    @property
    def source(self) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp())
            atexit.register(shutil.rmtree, self._folder, ignore_errors=True)
            _write(self._folder / "source.zarr")
        return self._folder / "source.zarr"

    @property
    def output(self) -> Path:
        return self.source.with_name("output.zarr")

    def peak(self) -> float:
        """Return the most memory that the command holds, bytes."""
        words = ["-m", "apps.main", "weather", "regrid", str(self.source), TARGET]
        command = [sys.executable, *words, str(self.output), "--overwrite_output"]
        root = Path(__file__).parents[2]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *command],
            env=environment | {"PYTHONPATH": str(root)}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return 1024.0 * float(done.stdout)

    def change(self) -> float:
        """Return the largest change of an area mean, as a fraction of the field's largest value."""
        largest = 0.0
        with xr.open_zarr(self.source, chunks=None) as old, xr.open_zarr(
            self.output, chunks=None
        ) as new:  # fmt: skip
            for name in ("geopotential", "u_component_of_wind", "specific_humidity"):
                before, after = (store[name].isel(time=0).values for store in (old, new))
                moved = np.abs(_area_mean(before) - _area_mean(after)).max()
                largest = max(largest, float(moved / np.abs(before).max()))
        return largest


def _area_mean(values: np.ndarray) -> np.ndarray:
    grid = regular_grid(*values.shape[-2:], poles=True)
    means: np.ndarray = values.mean(-1, dtype=np.float64) @ grid.area_weights().numpy()
    return means / values.shape[-2]


def _write(path: Path) -> None:
    grid = regular_grid(ROWS, COLUMNS, poles=True)
    draw = np.random.default_rng(0)
    horizontal = ("latitude", "longitude")
    for frame in range(FRAMES):
        fields: dict[str, Any] = {}
        for name in FENGWU.surface:
            fields[name] = (("time", *horizontal), _smooth(grid, draw)[None])
        for name in FENGWU.upper:
            field = _smooth(grid, draw)
            levels = np.stack([np.roll(field, 31 * k, -1) for k in range(len(FENGWU.levels))])
            fields[name] = (("time", "level", *horizontal), levels[None])
        coordinates = {
            "time": np.array([frame], "timedelta64[D]") + np.datetime64("2020-01-01", "ns"),
            "level": list(FENGWU.levels),
            "latitude": grid.latitude.numpy(),
            "longitude": grid.longitude.numpy(),
        }
        chunks = {name: {"chunks": array.shape} for name, (_, array) in fields.items()}
        place: dict[str, Any] = {"append_dim": "time"} if frame else {"encoding": chunks}
        xr.Dataset(fields, coordinates).to_zarr(path, zarr_format=2, **place)


def _smooth(grid: Grid, draw: np.random.Generator) -> np.ndarray:
    latitude = np.deg2rad(grid.latitude.numpy())[:, None]
    longitude = np.deg2rad(grid.longitude.numpy())
    waves = [
        draw.normal() * np.cos(m * longitude + draw.uniform(0, 6)) * np.cos((m + 1) * latitude)
        for m in range(8)
    ]
    noise = 0.01 * draw.standard_normal(grid.shape, dtype=np.float32)
    return (280 + 5 * sum(waves) + noise).astype(np.float32)


FRAME_ROWS, FRAME_COLUMNS, READ = 721, 1440, 3
OURS, ZARR = "read ahead", "zarr"


def frames() -> Comparison:
    """Return frames in order, from disk to tensors whose values are checked.

    The bars: a frame in a second of one core, and less than three frames in memory.
    """
    world = _Cache()
    frame = 4.0 * 69 * FRAME_ROWS * FRAME_COLUMNS
    return Comparison(
        name=f"frames 69x{FRAME_ROWS}x{FRAME_COLUMNS} of a training cache",
        op="weather_loader",
        build=world.build,
        baseline=ZARR,
        units={OURS: float(READ), ZARR: float(READ)},
        unit="frame",
        rate="frames/CPU-s",
        seconds={OURS: 1.0},
        figures={"resident memory": Figure(world.resident, "bytes", 3.0, frame, "a frame")},
        memory=4 * frame,
    )


class _Cache:
    """A cache of random frames, made at the first call, in a folder that goes with this process."""

    def __init__(self) -> None:
        self._calls: Mapping[str, Call] = {}

    def build(self, load: Load) -> Mapping[str, Call]:
        """Return a call for our reader and one for that of Zarr."""
        folder = mkdtemp(prefix="gatesuite-frames-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        times = np.datetime64("2020-01-01", "s") + np.arange(READ) * np.timedelta64(6, "h")
        grid = load("weather.grid").regular_grid(FRAME_ROWS, FRAME_COLUMNS, poles=True)
        channels = load("weather.state").FENGWU
        layout = load("weather.data.training_cache").Layout(channels, grid, times, {})
        path = Path(folder) / "frames.zarr"
        sample = torch.randn(layout.shape[1:], generator=torch.Generator().manual_seed(0))
        load("weather.data.training_cache").write_cache(path, layout, (sample for _ in range(READ)))
        reading: Any = load("weather.data.training_cache")
        cache = reading.FrameCache(path)

        def ahead() -> float:
            total = 0.0
            for frame in reading.FrameLoader(cache):
                total += float(frame[0, 0, 0])
                del frame
            return total

        def plain() -> float:
            return float(sum(cache.frames[place][0, 0, 0] for place in range(READ)))

        self._calls = {ZARR: plain, OURS: ahead}
        return self._calls

    def resident(self) -> float:
        """Return the peak memory in bytes that reading adds to the process."""
        gc.collect()
        return_freed_memory()
        with MemoryMeter(every=0.02) as meter:
            before = meter.sample()
            self._calls[OURS]()
            meter.sample()
        return float(meter.peak - before)
