"""``gates weather ingest``: files of several formats -> a table that ``assimilate`` reads."""

import re

import numpy as np
import pandas as pd
import pytest
import xarray as xr

LEVELS = {
    # hPa: gpm, deg C, wind from, m/s
    850: (1457, 5.0, 270, 10.0),
    500: (5574, -20.0, 270, 25.0),
}


def igra(station, latitude, longitude):
    """A sounding of two levels, in the published columns."""
    header = (
        f"#{station:<11} 2017 01 02 12 1104 {len(LEVELS):>4} ncdc-gts ncdc-gts "
        f"{round(latitude * 1e4):>7} {round(longitude * 1e4):>8}"
    )
    rows = [
        f"10 -9999 {100 * p:>6} {z:>5} {round(10 * t):>5} -9999 -9999 {d:>5} {round(10 * f):>5}"
        for p, (z, t, d, f) in LEVELS.items()
    ]
    return "\n".join([header, *rows]) + "\n"


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "reports"
    (place / "more").mkdir(parents=True)
    sites = {f"S{n:010d}": (40.0 + 3 * n, 6.0 * n) for n in range(8)}
    text = "".join(igra(name, *site) for name, site in sites.items())
    (place / "sondes-data.txt").write_text(text)
    table = {
        "time": "2017-01-02T11:30", "latitude": -30.0, "longitude": [20.0, 140.0],
        "level_hpa": 850.0, "variable": "temperature", "value": [287.0, 288.0], "station": "X",
    }  # fmt: skip
    pd.DataFrame(table).to_csv(place / "more" / "table.csv", index=False)
    (place / "notes.dat").write_bytes(b"\0\1\2\3")
    return tmp_path


def test_mixed_files_are_ingested_and_assimilated(folder, gates_in):
    gates = gates_in(folder)
    found = gates.succeed("weather", "ingest", "reports")
    lines = [line.split() for line in found.out.splitlines()]
    assert ["file", "format", "reports", "kept", "rejected"] in lines
    assert ["sondes-data.txt", "IGRA-2", "16", "64", "0"] in lines
    assert ["table.csv", "table", "2", "2", "0"] in lines
    assert ["notes.dat", "-", "0", "0", "0"] in lines
    assert "notes.dat: refused: unknown binary format" in found.out
    assert found.out.splitlines()[-2:] == [
        "66 values of 9 stations, 2017-01-02T11:04 to 2017-01-02T11:30, from 2 of 3 files, "
        "1 refused",
        "observations.parquet",
    ]  # fmt: skip
    written = pd.read_parquet(folder / "observations.parquet")
    assert set(written.attrs["files"]) == {"sondes-data.txt", "table.csv"}
    assert len(written.attrs["files"]["table.csv"]["sha256"]) == 64

    (store,) = gates.succeed("weather", "prepare", "--config", "era5_ensemble").out.splitlines()[
        -1:
    ]
    words = ["--background", store, "--observations", "observations.parquet", "--method", "oi"]
    checks = ["--gross_check", "1e6", "--config", "era5_ensemble"]
    done = gates.succeed("weather", "assimilate", *words, *checks)
    observed = int(re.search(r"2017-01-02T12:00  (\d+) cells observed", done.out)[1])
    assert observed == 8 * 4 + 2  # geopotential and temperature at two levels, and the table
    with xr.open_zarr(folder / "analysis.zarr") as analysis, xr.open_zarr(folder / store) as before:
        change = analysis["temperature"] - before["temperature"].mean("number")
        last = change.isel(time=-1).sel(level=850)
        assert float(np.abs(last.sel(latitude=-30, longitude=21)).max()) > 0.01
        assert float(np.abs(change.isel(time=0)).max()) < 1e-3  # means in float32


def test_the_output_in_the_folder_is_no_source(folder, gates_in):
    gates = gates_in(folder)
    words = ["weather", "ingest", "reports", "--output", "reports/all.parquet"]
    first = gates.succeed(*words).out.splitlines()[-2]
    assert gates.succeed(*words, "--overwrite_output").out.splitlines()[-2] == first


TABLE = b"time,latitude,longitude,level_hpa,variable,value\n"
NO_FILE = r"no file holds an observation \(a\."
FAULTS = {
    "another time": (
        ("reports", "--start", "1999-01-01", "--end", "1999-02-01"),
        "no value of 3 files is left; they are of 2017-01-02T11:30",
    ),
    "empty": (("empty",), rf"{NO_FILE}txt: empty file", {"empty/a.txt": b""}),
    "no file": (("bare",), "bare holds no file", {"bare/.hidden": b""}),
    "no folder": (("nowhere",), "nowhere does not exist"),
    "no source": ((), "SOURCES|sources"),
    "taken": (
        ("reports", "--output", "taken.csv"),
        "taken.csv exists: choose another --output",
        {"taken.csv": b"mine"},
    ),
    "suffix": (("reports", "--output", "o.nc"), r"o\.nc ends in '\.nc', expected \.parquet"),
    "below a file": (("reports", "--output", "f/o.csv"), "f is a file and no", {"f": b""}),
    "start": (("reports", "--start", "noon"), "--start 'noon' is no time"),
    "end": (
        ("reports", "--start", "2017-02-01", "--end", "2017-01-01"),
        "--end 2017-01-01 is not after --start 2017-02-01",
    ),
    "itself": (
        ("reports/more/table.csv", "--output", "reports/more/table.csv", "--overwrite_output"),
        "holds no file",
    ),
    "all damaged": (
        ("bad",),
        rf"{NO_FILE}parquet: damaged or truncated Parquet; copy it again; b\.bufr: truncated BUFR",
        {"bad/a.parquet": b"PAR1" + bytes(40), "bad/b.bufr": b"BUFR\0\0\1\4"},
    ),
    "unit": (
        ("unit",),
        "it looks like gpm: add a column units with gpm",
        {"unit/t.csv": TABLE + b"2017-01-02T12:00,50,8,500,geopotential,5500\n"},
    ),
}


def test_faulty_calls_write_nothing(folder, faulty_inputs):
    table = {
        name: (("weather", "ingest", *words), *rest) for name, (words, *rest) in FAULTS.items()
    }
    faulty_inputs(table, folder=folder)
