"""Files of reports: what is ingested, counted, and read again by time."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest

from core_gates.errors import GatesError
from weather.observations import ingest as module
from weather.observations.ingest import ReportArchive, files_in, ingest
from weather.observations.readers.formats import read_file
from weather.observations.report_table import ObservationTable, Period


def good(**columns):
    frame = {
        "time": "2017-01-02T12:00", "latitude": 50.0, "longitude": 8.0, "level_hpa": 500.0,
        "variable": "temperature", "value": [250.0, 251.0, 252.0], "error": 1.0,
        "station": ["A", "B", "C"],
    }  # fmt: skip
    return pd.DataFrame(frame | columns)


@pytest.fixture
def folder(tmp_path):
    """Write files by name: tables, or bytes."""

    def write(**files):
        for name, content in files.items():
            path = tmp_path / name.replace("__", ".")
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                content.to_csv(path, index=False)
        return tmp_path

    return write


def accounts(folder, period=None):
    found = ingest(files_in([folder]), period)
    return found.table.frame, {one.path.name: one for one in found.files}


def test_the_good_one_of_five_is_stored_and_the_others_have_a_reason_each(folder, tmp_path):
    truncated = tmp_path / "x.parquet"
    good().to_parquet(truncated)
    content = truncated.read_bytes()
    truncated.unlink()
    frame, files = accounts(
        folder(
            good__csv=good(),
            empty__txt=b"",
            truncated__parquet=content[: len(content) // 2],
            unit__csv=good(value=[-23.0, -22.0, -21.0]),
            garbage__dat=bytes(range(256)) * 20,
        )
    )
    assert frame["value"].tolist() == [250.0, 251.0, 252.0]
    assert (files["good.csv"].kept, files["good.csv"].failed) == (3, False)
    reasons = {
        "empty.txt": "empty file",
        "truncated.parquet": "damaged or truncated Parquet; copy it again",
        "unit.csv": "looks like degrees Celsius: add 273.15",
        "garbage.dat": "unknown binary format",
    }
    for name, words in reasons.items():
        assert (files[name].failed, files[name].kept) == (True, 0), name
        assert words in files[name].why, name


@pytest.mark.parametrize(
    ("column", "bad", "reason"),
    [
        ("time", "noon", "without time"),
        ("time", None, "without time"),
        ("latitude", 91.0, "without latitude"),
        ("longitude", np.nan, "without longitude"),
        ("value", np.nan, "without value"),
        ("error", -1.0, "without error"),
        ("level_hpa", -5.0, "of impossible pressure"),
        ("value", 500.0, "out of range"),
        ("value", np.inf, "without value"),
    ],
)
def test_a_bad_row_costs_itself_alone(column, bad, reason, folder):
    table = good()
    table[column] = [table[column][0], bad, table[column][2]]
    frame, files = accounts(folder(t__csv=table))
    assert frame["station"].tolist() == ["A", "C"]
    assert (files["t.csv"].rejected, files["t.csv"].kept) == ({reason: 1}, 2)


def test_values_reported_again_are_stored_once_the_last_of_them(folder):
    first, second = good(), good(value=[250.0, 260.0, 252.0])
    frame, files = accounts(folder(a__csv=first, b__csv=second))
    assert frame["value"].tolist() == [250.0, 260.0, 252.0]
    assert files["a.csv"].rejected == {"reported again": 3}
    assert (files["a.csv"].kept, files["b.csv"].kept) == (0, 3)


def test_another_time_is_rejected_by_the_half_open_period(folder):
    times = ["2017-01-02T08:59", "2017-01-02T09:00", "2017-01-02T15:00"]
    period = Period.parse("2017-01-02T09:00", "2017-01-02T15:00Z")
    frame, files = accounts(folder(t__csv=good(time=times)), period)
    assert frame["station"].tolist() == ["B"]
    assert files["t.csv"].rejected == {"of another time": 2}


def test_stations_at_seam_and_pole_and_times_in_any_order_are_sound(folder):
    times = ["2017-01-02T12:00", "2017-01-02T06:00", "2017-01-02T09:00Z"]
    table = good(time=times, latitude=[90.0, -90.0, 0.0], longitude=[360.0, -180.0, -0.25])
    frame, files = accounts(folder(t__csv=table))
    assert frame["station"].tolist() == ["B", "C", "A"]
    assert frame["longitude"].tolist() == [180.0, 359.75, 0.0]
    assert not files["t.csv"].rejected


def test_nothing_left_is_refused_with_the_times_that_were_found(folder):
    place = folder(t__csv=good(), u__csv=good(time="2018-01-01"))
    period = Period.parse("1999-01-01", "1999-02-01")
    with pytest.raises(GatesError) as caught:
        ingest(files_in([place]), period)
    assert str(caught.value) == (
        "no value of 2 files is left; they are of 2017-01-02T12:00 to 2018-01-01T00:00, asked for "
        "is 1999-01-01T00:00 to 1999-02-01T00:00: nothing is written, give other files or another "
        "period"
    )


def test_files_without_observations_are_refused_with_reasons(folder):
    place = folder(a__csv=b"", b__grib=b"GRIB" + bytes(90), c__csv=good().head(0))
    with pytest.raises(GatesError) as caught:
        ingest(files_in([place]))
    assert str(caught.value) == (
        "no file holds an observation (a.csv: empty file; b.grib: passed over: GRIB: model fields "
        "on a grid, no reports; c.csv: nothing is left): nothing is written, give other files"
    )


def test_files_are_found_in_subfolders_but_for_hidden_ones_and_stores(tmp_path, refused):
    for name in ("b/one.csv", "a.csv", ".hidden", "store.zarr/c/0", "b/.git/x", "out.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = files_in([tmp_path, tmp_path / "a.csv"], leave_out=tmp_path / "out.parquet")
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a.csv", "b/one.csv"]
    refused("nowhere does not exist", files_in, [tmp_path / "nowhere"])
    refused(
        r"x?\.git holds no file",
        files_in,
        [tmp_path / "b" / ".git"],
        leave_out=tmp_path / "b" / ".git" / "x",
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"CDF\x01" + bytes(60), "NetCDF-3: model fields"),
        (b"\x89HDF\r\n\x1a\n" + bytes(60), "damaged or truncated NetCDF or HDF5"),
        (b"PK\x03\x04" + bytes(60), "damaged archive"),
        (b"BUFR\x00\x10\x00\x04" + bytes(60), "truncated BUFR"),
        (b"Dear colleague,\n", "unknown format; see docs/reference/observations.md"),
        (b"   \n\n", "empty file"),
        ("\u00e9t\u00e9".encode("latin-1") * 9, "unknown format"),
    ],
)
def test_other_content_is_named(content, words, folder):
    _, files = accounts(folder(good__csv=good(), x__dat=content))
    assert words in files["x.dat"].why
    assert files["good.csv"].kept == 3


@pytest.mark.fault("46 H5")
@pytest.mark.parametrize("suffix", [".csv", ".txt", ".parquet", ".nc", ".zip"])
@pytest.mark.parametrize(
    "space",
    [b"\xc2\xa0", b"\xa0", b" \xc2\xa0\r\n", b"\xef\xbb\xbf", "\u2003\n".encode()],
    ids=["utf-8", "latin-1", "line", "byte order mark", "wide"],
)
def test_a_file_of_spaces_of_any_kind_is_an_empty_file_to_every_reader(
    space, suffix, tmp_path, refused
):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(space)
    refused(r"^empty file$", read_file, path, Period())
    if suffix in module.SUFFIXES:
        for read in (ObservationTable.read, ReportArchive):
            refused(r"x\.\w+ cannot be read as a table \(empty file\)", read, path)


def test_a_reader_that_fails_unforeseen_costs_its_file_alone(folder, monkeypatch):
    def fail(path, period):
        if path.suffix == ".dat":
            raise ZeroDivisionError("by\nzero")
        return original(path, period)

    original = module.read_file
    monkeypatch.setattr(module, "read_file", fail)
    _, files = accounts(folder(good__csv=good(), x__dat=b"x"))
    assert files["x.dat"].why == "ZeroDivisionError while reading: by zero; copy it again"
    assert files["good.csv"].kept == 3


def test_times_of_a_period_are_checked(refused):
    for start, end, words in (
        ("yesterday", None, "--start 'yesterday' is no time, write it as"),
        (None, "2017-13-01", "--end '2017-13-01' is no time"),
        ("2017-01-02", "2017-01-02", "--end 2017-01-02 is not after --start"),
    ):
        refused(words, Period.parse, start, end)
    zone = Period.parse("2017-01-02T12:00+02:00", None)
    assert zone.holds(np.datetime64("2017-01-02T10:00"))
    assert not zone.holds(np.datetime64("2017-01-02T09:59"))
    assert str(zone) == "2017-01-02T10:00 to any time"


def test_the_real_files_have_the_counts_of_their_readme(real):
    ingested = ingest(files_in([real]))
    files = {one.path.name: one for one in ingested.files}
    assert len(files) == 11
    assert not any(one.failed for one in ingested.files)
    assert files["metar_2020-01.parquet"].reports == 12_549
    sondes = [one for name, one in files.items() if name.endswith("_raob.txt")]
    assert [one.reports for one in sondes] == [100, 100, 78, 86]
    assert files["2009022800_metar.txt"].reports == 314
    frame = ingested.table.frame
    assert len(frame) == sum(one.kept for one in ingested.files)
    month = frame[frame["time"] >= "2019-12-31"]
    assert (month["station"].nunique(), len(month)) == (12, files["metar_2020-01.parquet"].kept)
    text = files["2009022800_metar.txt"]
    lines = (real / "2009022800_metar.txt").read_text().splitlines()
    sites = Counter(line.split(" METAR ")[-1].split(" SPECI ")[-1] for line in lines)
    temperatures = frame[(frame["variable"] == "2m_temperature") & (frame["time"] < "2010")]
    assert len(temperatures) == len(sites) == 250
    assert text.rejected["reported again"] > 0


START = pd.Timestamp("2020-01-01")


def reports(hours, value=280.0):
    return pd.DataFrame(
        {"time": START + pd.to_timedelta(hours, unit="h"), "latitude": 10.0, "longitude": 20.0,
         "variable": "temperature", "level_hpa": 500.0, "value": value, "error": 1.0}
    )  # fmt: skip


@pytest.fixture
def archive(tmp_path):
    """A table a day, one of them in a subfolder."""
    place = tmp_path / "reports"
    (place / "later").mkdir(parents=True)
    for day in range(6):
        name = place / ("later" if day == 5 else "") / f"{day}.{'csv' if day % 2 else 'parquet'}"
        ObservationTable.from_frame(reports(24 * day + np.arange(0, 24, 6.0))).write(name)
    (place / "notes.txt").write_text("x")
    return place


def times(table):
    return ((table.frame["time"] - START) / pd.Timedelta("1h")).tolist()


def test_only_tables_around_a_time_are_taken(archive, monkeypatch):
    found = ReportArchive(archive)
    assert (found.count, found.flagged) == (24, 0)
    assert found.last == np.datetime64("2020-01-06T18", "ns")
    assert times(found.around(np.datetime64("2020-01-02T12", "ns"), 3)) == [24, 30, 36, 42]
    assert times(found.around(np.datetime64("2020-01-02T00", "ns"), 7)) == [*range(0, 48, 6)]
    assert len(found.around(np.datetime64("2021-01-02", "ns"), 3)) == 0
    read, original = [], module.ObservationTable.read
    monkeypatch.setattr(
        module.ObservationTable,
        "read",
        lambda path, **k: read.append(path.name) or original(path, **k),
    )
    for day in range(1, 7):
        found.around(np.datetime64(f"2020-01-0{day}T06", "ns"), 3)
        found.around(np.datetime64(f"2020-01-0{day}T12", "ns"), 3)
    assert 0 < len(read) == len(set(read)) < 6  # four were kept, and none is read twice
    assert len(found._kept) == module.KEPT


def test_one_table_and_its_hash(archive):
    one = ReportArchive(archive / "0.parquet")
    before = ReportArchive(archive).digest
    ObservationTable.from_frame(reports([3.0], 281.0)).write(archive / "1.csv")
    assert (one.count, len({one.digest, before, ReportArchive(archive).digest})) == (4, 3)


def test_faults(tmp_path, archive, refused):
    (archive / "2.parquet").write_bytes(b"PAR1")
    refused(r"2\.parquet cannot be read as a table", ReportArchive, archive)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / ".hidden.csv").write_text("x")
    refused(r"empty holds no table .*gates weather ingest", ReportArchive, empty)
    ObservationTable.empty().write(empty / "a.csv")
    refused("empty holds no reports", ReportArchive, empty)
    reports([0.0]).assign(qc=1).to_csv(empty / "a.csv", index=False)
    refused("every report of temperature is out of range or flagged", ReportArchive, empty)
    reports([1.0]).to_csv(empty / "b.csv", index=False)
    assert ReportArchive(empty).flagged == 1  # good ones in another table
