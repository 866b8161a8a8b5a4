"""``gates weather prepare`` and ``observe``: nature runs, the ERA5 sample, simulated reports."""

import numpy as np
import pandas as pd
import xarray as xr

NATURE = "runs/weather/unit/nature.zarr"


def test_prepare_leaves_what_exists(gates):
    recording = gates.folder / "runs/weather/unit/recording.safetensors"
    before = recording.stat().st_mtime_ns
    result = gates.weather("prepare")
    assert result.out.splitlines()[-1] == "runs/weather/unit/recording.safetensors"
    assert recording.stat().st_mtime_ns == before


def test_prepare_unpacks_the_era5_sample(gates):
    result = gates.weather("prepare", config="era5_ensemble")
    with gates.opened(result.out.splitlines()[-1]) as sample:
        assert dict(sample.sizes) == {
            "time": 4,
            "number": 10,
            "level": 2,
            "latitude": 61,
            "longitude": 120,
        }
    observed = gates.weather("observe", "--output", "era5.csv", config="era5_ensemble")
    assert "2000 reports of 500 stations at 1 times" in observed.out
    assert set(pd.read_csv(gates.folder / "era5.csv")["variable"]) == {
        "geopotential",
        "temperature",
    }


def test_observations_are_the_truth_with_errors(gates):
    table = pd.read_parquet(gates.folder / "observations.parquet")
    assert len(table) == 600
    winds = table[table["variable"] == "u_component_of_wind"]
    with xr.open_zarr(gates.folder / NATURE) as nature:
        field = nature["u_component_of_wind"].isel(time=-1, number=1)
        nearest = field.sel(
            latitude=xr.DataArray(winds["latitude"].values),
            longitude=xr.DataArray(winds["longitude"].values),
            method="nearest",
        ).values
    departure = winds["value"].to_numpy() - nearest
    # The nearest point is another one for a few reports, at 360 degrees and between rows.
    assert 0.7 < 1.4826 * np.median(np.abs(departure)) < 1.4
