"""A small piece of ERA5 that ships inside the package.

Ten members of the ERA5 ensemble of data assimilations at four times (1 and 2 January 2017, 00 and
12 UTC): geopotential and temperature at 850 and 500 hPa on a 3-degree grid. Member 0 is the
unperturbed control; it lies nearer to the ensemble mean than any other member and should not
serve as a truth.
"""

from importlib.resources import as_file, files
from typing import NamedTuple

import numpy as np
import xarray as xr
from torch import Tensor

from harness.files import Data
from weather.data.tensors import dataset_grid, to_tensor
from weather.grid import Grid
from weather.state import ERA5_SAMPLE, ChannelSpec

ATTRIBUTION = (
    "Contains modified Copernicus Climate Change Service information 2017 (ERA5 ensemble of data "
    "assimilations). Neither the European Commission nor ECMWF is responsible for any use that "
    "may be made of the Copernicus information or data it contains."
)


class Era5Sample(NamedTuple):
    """The sample as tensors.

    Attributes:
        fields: float32 (number 10, time 4, C 4, H 61, W 120), geopotential in m² s⁻² and
            temperature in K.
        grid: 61 latitudes from 90 to -90 and 120 longitudes from 0 to 357 degrees.
        channels: z850, z500, t850, t500, the level order of the file.
        times: (4,) datetime64, UTC.
    """

    fields: Tensor
    grid: Grid
    channels: ChannelSpec
    times: np.ndarray


def sample_data() -> list[Data]:
    """Describe the file of the sample by its content."""
    with as_file(files("weather.data") / "assets" / "era5_ensemble.nc") as path:
        return [Data.of("era5_ensemble", "truth", path)]


def load_era5_sample() -> Era5Sample:
    """Read the ERA5 ensemble sample; show `ATTRIBUTION` wherever its fields are published."""
    with (
        as_file(files("weather.data") / "assets" / "era5_ensemble.nc") as path,
        xr.open_dataset(path, engine="h5netcdf") as dataset,
    ):
        fields = to_tensor(dataset, ERA5_SAMPLE).transpose(0, 1).contiguous()
        return Era5Sample(fields, dataset_grid(dataset), ERA5_SAMPLE, dataset["time"].values)
