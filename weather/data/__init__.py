"""Gridded data: WeatherBench-2 stores, the ERA5 sample, the coastline."""

from core_gates.errors import MissingExtraError

try:
    import xarray  # noqa: F401
except ImportError as error:
    raise MissingExtraError("weather", "xarray") from error
