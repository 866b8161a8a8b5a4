"""Write a store of made-up weather, packed as 16-bit integers, to try `--config reanalysis` on.

``python -m benchmarks.weather.synthetic_store X.zarr``: waves of random amplitude drift around the
globe on top of a zonal mean with its seasons; geopotential, temperature and wind of all levels
follow from two stream functions. 1.5 degrees, 1,460 frames, 20 channels: 3.4 GB as float32.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import xarray as xr

from core_gates.errors import GatesError
from harness.files import replacing

LEVELS = (300, 500, 700, 850)
MEANS = {"geopotential": (90e3, 55e3, 29.5e3, 14.3e3), "temperature": (229.0, 253.0, 268.0, 276.0)}
TOP = np.asarray([1.3, 1.0, 0.75, 0.6])  # of the waves, at each level
MODES, MEMORY_HOURS, PERIOD_HOURS = 48, 240.0, 6.0
PACKED = {
    "10m_u_component_of_wind": 120.0, "10m_v_component_of_wind": 120.0, "2m_temperature": 200.0,
    "mean_sea_level_pressure": 30e3, "geopotential": 120e3, "temperature": 200.0,
    "u_component_of_wind": 300.0, "v_component_of_wind": 300.0,
}  # fmt: skip
OFFSETS = {"2m_temperature": 260.0, "mean_sea_level_pressure": 101e3, "geopotential": 50e3,
           "temperature": 250.0}  # fmt: skip


class Waves:
    """Waves (H,W) whose amplitudes are autoregressive in time and whose phases drift.

    Args:
        latitude: (H,) degrees.
        longitude: (W,) degrees.
        seed: Of the waves.
    """

    def __init__(self, latitude: np.ndarray, longitude: np.ndarray, seed: int) -> None:
        self.draw = np.random.default_rng(seed)
        number = self.draw.integers(1, 13, MODES)
        center, width = self.draw.uniform(-70, 70, MODES), self.draw.uniform(8, 20, MODES)
        self.meridional = np.exp(-((latitude[:, None] - center) ** 2) / (2 * width**2))
        self.meridional *= np.cos(np.deg2rad(latitude))[:, None] * number**-0.4
        self.zonal = np.exp(1j * np.deg2rad(longitude)[:, None] * number)
        self.turn = np.exp(-1j * self.draw.normal(0.06, 0.04, MODES) * number**0.5)
        self.keep = np.exp(-PERIOD_HOURS / MEMORY_HOURS)
        self.state = self._noise()

    def _noise(self) -> np.ndarray:
        parts = self.draw.standard_normal((2, MODES))
        return np.asarray(parts[0] + 1j * parts[1]) / 2**0.5

    def step(self) -> np.ndarray:
        """Return the next field (H,W), of unit order."""
        noise = (1 - self.keep**2) ** 0.5 * self._noise()
        self.state = self.keep * self.turn * self.state + noise
        return np.asarray(((self.meridional * self.state) @ self.zonal.T).real) / 1.5


def fields(latitude: np.ndarray, day: float, waves: tuple[Waves, Waves]) -> dict[str, np.ndarray]:
    """Return the variables of a frame, (H,W) or (L,H,W), in SI units."""
    deep, low = (wave.step() for wave in waves)
    season = np.sin(2 * np.pi * (day - 110) / 365.25)
    sine = np.sin(np.deg2rad(latitude))[:, None]
    warm = 1 - sine**2 + 0.25 * season * sine
    stream = TOP[:, None, None] * deep + 0.5 * TOP[::-1, None, None] * low  # (L,H,W)
    south = np.gradient(stream, np.deg2rad(latitude), axis=1)
    east = (np.roll(stream, -1, 2) - np.roll(stream, 1, 2)) * stream.shape[2] / (4 * np.pi)
    mean = {name: np.asarray(values)[:, None, None] for name, values in MEANS.items()}
    return {
        "geopotential": mean["geopotential"] + 3500 * TOP[:, None, None] * warm + 900 * stream,
        "temperature": mean["temperature"] + 22 * (warm - 0.5) + 4 * deep - 5 * stream,
        "u_component_of_wind": 18 * TOP[:, None, None] * (1 - sine**4) - 3 * south,
        "v_component_of_wind": 3 * east,
        "10m_u_component_of_wind": 3 - 1.2 * south[-1] + 0 * deep,
        "10m_v_component_of_wind": 1.2 * east[-1],
        "2m_temperature": 272 + 30 * (warm - 0.5) + 3 * deep - 5 * low,
        "mean_sea_level_pressure": 101e3 + 900 * low + 400 * deep + 0 * sine,
    }  # fmt: skip


def write_synthetic_store(
    path: Path, frames: int = 1460, rows: int = 121, columns: int = 240, seed: int = 0
) -> Path:
    """Write frames, six hours apart, whole or not at all.

    Latitudes ascend, longitudes begin at -180, dimensions are (time, level, longitude, latitude),
    as in the regridded stores of WeatherBench 2; format 2 of Zarr, a frame to a chunk.

    Args:
        path: Folder of the store.
        frames: Number of times.
        rows: Latitudes, with both poles.
        columns: Longitudes.
        seed: Of the weather.
    """
    latitude = np.linspace(-90, 90, rows)
    longitude = -180 + 360 / columns * np.arange(columns)
    waves = Waves(latitude, longitude, seed), Waves(latitude, longitude, seed + 1)
    start, step = np.datetime64("2019-01-01", "ns"), np.timedelta64(6, "h")
    with replacing(path) as partial:
        for first in range(0, frames, 20):
            numbers = np.arange(first, min(first + 20, frames))
            samples = [fields(latitude, number / 4, waves) for number in numbers]
            variables = {}
            for name in samples[0]:
                stacked = np.stack([sample[name] for sample in samples]).astype(np.float32)
                dims = ("time", *(["level"] if stacked.ndim == 4 else []), "latitude", "longitude")
                turned = (*dims[:-2], "longitude", "latitude")
                variables[name] = xr.Variable(dims, stacked).transpose(*turned)
            coordinates = {"time": start + numbers * step, "level": list(LEVELS),
                           "latitude": latitude, "longitude": longitude}  # fmt: skip
            block = xr.Dataset(variables, coordinates)
            if first:
                block.to_zarr(partial, append_dim="time", consolidated=True, zarr_format=2)
            else:
                block.to_zarr(partial, mode="w-", encoding=_encoding(block), zarr_format=2,
                              consolidated=True)  # fmt: skip
    return path


def _encoding(block: xr.Dataset) -> dict[str, dict[str, object]]:
    encodings: dict[str, dict[str, object]] = {
        "time": {"units": "seconds since 1970-01-01", "dtype": "int64"}
    }
    for name, array in block.items():
        encodings[str(name)] = {
            "dtype": "int16", "scale_factor": PACKED[str(name)] / 60_000,
            "add_offset": OFFSETS.get(str(name), 0.0), "_FillValue": -(2**15),
            "chunks": (1, *array.shape[1:]),
        }  # fmt: skip
    return encodings


def main(arguments: list[str] | None = None) -> int:
    """Write a store; 2 for a place that is taken."""
    parser = argparse.ArgumentParser("python -m benchmarks.weather.synthetic_store")
    parser.add_argument("path", type=Path, help="folder of the store, X.zarr")
    parser.add_argument("--frames", type=int, default=1460, help="times, six hours apart")
    parser.add_argument("--rows", type=int, default=121, help="latitudes, with both poles")
    parser.add_argument("--columns", type=int, default=240, help="longitudes")
    parser.add_argument("--seed", type=int, default=0, help="of the weather")
    given = parser.parse_args(arguments)
    try:
        if given.path.exists():
            raise GatesError(f"{given.path} exists: choose another path or delete it")
        print(
            write_synthetic_store(given.path, given.frames, given.rows, given.columns, given.seed)
        )
    except GatesError as error:
        print(f"synthetic_store: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
