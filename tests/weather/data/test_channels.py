import numpy as np
import pytest
import torch
import xarray as xr

from core_gates.errors import GatesError
from weather.data.axes import to_dataset
from weather.data.store import store_channels
from weather.grid import regular_grid
from weather.state import ChannelSpec

CHANNELS = ChannelSpec(
    ("mean_sea_level_pressure", "2m_temperature"), ("temperature", "geopotential"), (850, 500)
)
GRID = regular_grid(4, 8, poles=False)


@pytest.fixture
def path(tmp_path):
    states = torch.ones(2, 6, *GRID.shape)
    times = np.asarray(["2020-01-01", "2020-01-02"], dtype="datetime64[ns]")
    dataset = to_dataset(states, CHANNELS, GRID, times=times)
    dataset["land_sea_mask"] = dataset["2m_temperature"].isel(time=0, drop=True)  # without time
    dataset["wind_chill"] = dataset["2m_temperature"]  # of an unknown unit
    dataset = dataset.rename(geopotential="z", latitude="lat")
    dataset.to_netcdf(tmp_path / "store.nc", engine="h5netcdf")
    return tmp_path / "store.nc"


def test_known_variables_with_a_time_and_all_levels_are_taken(path):
    found = store_channels(path)
    assert found.surface == ("2m_temperature", "mean_sea_level_pressure")
    assert found.upper == ("geopotential", "temperature")
    assert found.levels == (500, 850)


def test_variables_and_levels_can_be_chosen(path):
    found = store_channels(path, ["temperature", "wind_chill"], [850])
    assert found == ChannelSpec(("wind_chill",), ("temperature",), (850,))
    assert store_channels(path, ["2m_temperature"], [850]) == ChannelSpec(("2m_temperature",))


def test_what_is_missing_is_named(path, tmp_path):
    with pytest.raises(
        GatesError, match=r"store.nc: level 700 is missing, found 500, 850|850, 500"
    ):
        store_channels(path, levels=[850, 700])
    with pytest.raises(GatesError, match=r"variable salinity is missing, found .*wind_chill"):
        store_channels(path, ["salinity"])
    with xr.open_dataset(path, engine="h5netcdf") as dataset:
        dataset[["wind_chill"]].to_netcdf(tmp_path / "odd.nc", engine="h5netcdf")
    with pytest.raises(GatesError, match=r"holds no variable of 10m_u.*found wind_chill; name"):
        store_channels(tmp_path / "odd.nc")
