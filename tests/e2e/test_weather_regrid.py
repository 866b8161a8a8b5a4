"""``gates weather regrid``: a store on another grid."""

import numpy as np
import pytest
import xarray as xr

NAME = "32x16_equiangular_conservative"


@pytest.fixture(scope="module")
def here(tmp_path_factory, gates_in):
    gates = gates_in(tmp_path_factory.mktemp("regrid"))
    gates.weather("prepare", config="era5_ensemble")
    store = gates.folder / "runs/weather/era5_ensemble/era5_ensemble.zarr"
    store.rename(gates.folder / "era5.zarr")
    (gates.folder / "file").write_text("x")
    return gates


def test_to_a_named_grid_and_back_to_that_of_a_store(here):
    out = here.succeed("weather", "regrid", "era5.zarr", NAME, "coarse.zarr").out
    assert out.splitlines()[-1] == "coarse.zarr"
    with xr.open_zarr(here.folder / "coarse.zarr", consolidated=True) as new, xr.open_zarr(
        here.folder / "era5.zarr"
    ) as old:  # fmt: skip
        assert dict(new.sizes) == {**old.sizes, "latitude": 16, "longitude": 32}
        assert new["temperature"].attrs["units"] == "K"
        assert len(new.attrs["revision"]) >= 40
        for name in ("geopotential", "temperature"):
            rows = new[name].mean("longitude")
            weights = np.cos(np.deg2rad(new["latitude"]))
            found = (rows * weights).sum("latitude") / weights.sum()
            assert np.isfinite(found).all()
    words = ["coarse.zarr", "era5.zarr", "fine.zarr", "--method", "bilinear"]
    here.succeed("weather", "regrid", *words)
    with xr.open_zarr(here.folder / "fine.zarr") as new, xr.open_zarr(
        here.folder / "era5.zarr"
    ) as old:  # fmt: skip
        assert np.array_equal(new["latitude"], old["latitude"])
        assert 0.1 < float(abs((new["temperature"] - old["temperature"]).load()).mean()) < 3
    assert not list(here.folder.glob(".*"))


FAULTS = {
    "unknown grid": (("era5.zarr", "64x", "o.zarr"), "'64x' is neither .* a grid nor a store: "),
    "no source": (("era.zarr", NAME, "o.zarr"), "era.zarr: does not exist; did you mean era5.zarr"),
    "contradiction": (
        ("era5.zarr", NAME, "o.zarr", "--method", "bilinear"),
        "--method bilinear contradicts the grid 32x16_equiangular_conservative, leave one",
    ),
    "taken": (("era5.zarr", NAME, "file"), "file exists: choose another OUTPUT or add --over"),
    "below a file": (("era5.zarr", NAME, "file/o.zarr"), "file is a file and no folder"),
    "itself": (
        ("era5.zarr", NAME, "era5.zarr", "--overwrite_output"),
        "era5.zarr is the output era5.zarr: choose another OUTPUT",
    ),
    "no store": (("file", NAME, "o.zarr"), "file: is neither Zarr, NetCDF nor GRIB"),
    "impossible grid": (("era5.zarr", "8x8_gaussian_with_poles", "o"), "no rows on the poles"),
}


def test_faulty_calls_write_nothing(here, faulty_inputs):
    table = {name: (("weather", "regrid", *words), said) for name, (words, said) in FAULTS.items()}
    faulty_inputs(table, folder=here.folder)
