"""Reading the frames of a training cache at 0.25 degrees, next to Zarr's own reader."""

from __future__ import annotations

import atexit
import gc
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch

from benchmarks.registry import Call, Comparison, Figure, Load
from harness.system import MemoryMeter, return_freed_memory

ROWS, COLUMNS, FRAMES = 721, 1440, 3
OURS, ZARR = "read ahead", "zarr"


def frames() -> Comparison:
    """Return frames in order, from disk to tensors whose values are checked.

    The bars: a frame in a second of one core, and less than three frames in memory.
    """
    world = _Cache()
    frame = 4.0 * 69 * ROWS * COLUMNS
    return Comparison(
        name=f"frames 69x{ROWS}x{COLUMNS} of a training cache",
        op="weather_loader",
        build=world.build,
        baseline=ZARR,
        units={OURS: float(FRAMES), ZARR: float(FRAMES)},
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
        times = np.datetime64("2020-01-01", "s") + np.arange(FRAMES) * np.timedelta64(6, "h")
        grid = load("weather.grid").regular_grid(ROWS, COLUMNS, poles=True)
        channels = load("weather.state").FENGWU
        layout = load("weather.data.training_cache").Layout(channels, grid, times, {})
        path = Path(folder) / "frames.zarr"
        one = torch.randn(layout.shape[1:], generator=torch.Generator().manual_seed(0))
        load("weather.data.training_cache").write_cache(path, layout, (one for _ in range(FRAMES)))
        reading: Any = load("weather.data.training_cache")
        cache = reading.FrameCache(path)

        def ahead() -> float:
            total = 0.0
            for frame in reading.FrameLoader(cache):
                total += float(frame[0, 0, 0])
                del frame
            return total

        def plain() -> float:
            return float(sum(cache.frames[place][0, 0, 0] for place in range(FRAMES)))

        self._calls = {ZARR: plain, OURS: ahead}
        return self._calls

    def resident(self) -> float:
        """Return what the process takes while it reads, beyond what it had before, in bytes."""
        gc.collect()
        return_freed_memory()
        with MemoryMeter(every=0.02) as meter:
            before = meter.sample()
            self._calls[OURS]()
            meter.sample()
        return float(meter.peak - before)
