"""Tables of a long period, read when their time comes."""

import numpy as np
import pandas as pd
import pytest

from core_gates.errors import GatesError
from weather.observations import ingest
from weather.observations.ingest import ReportArchive
from weather.observations.report_table import ObservationTable

START = pd.Timestamp("2020-01-01")


def reports(hours, value=280.0):
    return pd.DataFrame(
        {"time": START + pd.to_timedelta(hours, unit="h"), "latitude": 10.0, "longitude": 20.0,
         "variable": "temperature", "level_hpa": 500.0, "value": value, "error": 1.0}
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A table a day, one of them in a subfolder."""
    place = tmp_path / "reports"
    (place / "later").mkdir(parents=True)
    for day in range(6):
        name = place / ("later" if day == 5 else "") / f"{day}.{'csv' if day % 2 else 'parquet'}"
        table = ObservationTable.from_frame(reports(24 * day + np.arange(0, 24, 6.0)))
        table.write(name)
    (place / "notes.txt").write_text("x")
    return place


def times(table):
    return ((table.frame["time"] - START) / pd.Timedelta("1h")).tolist()


def test_only_tables_around_a_time_are_taken(folder, monkeypatch):
    found = ReportArchive(folder)
    assert (found.count, found.flagged) == (24, 0)
    assert found.last == np.datetime64("2020-01-06T18", "ns")
    assert times(found.around(np.datetime64("2020-01-02T12", "ns"), 3)) == [24, 30, 36, 42]
    assert times(found.around(np.datetime64("2020-01-02T00", "ns"), 7)) == [*range(0, 48, 6)]
    assert len(found.around(np.datetime64("2021-01-02", "ns"), 3)) == 0
    read, original = [], ingest.ObservationTable.read
    monkeypatch.setattr(
        ingest.ObservationTable,
        "read",
        lambda path, **k: read.append(path.name) or original(path, **k),
    )
    for day in range(1, 7):
        found.around(np.datetime64(f"2020-01-0{day}T06", "ns"), 3)
        found.around(np.datetime64(f"2020-01-0{day}T12", "ns"), 3)
    assert 0 < len(read) == len(set(read)) < 6  # four were kept, and none is read twice
    assert len(found._kept) == ingest.KEPT


def test_one_table_and_its_hash(folder):
    one = ReportArchive(folder / "0.parquet")
    assert (one.count, len(one.digest)) == (4, 64)
    assert ReportArchive(folder).digest != one.digest
    before = ReportArchive(folder).digest
    ObservationTable.from_frame(reports([3.0], 281.0)).write(folder / "1.csv")
    assert ReportArchive(folder).digest != before


def test_faults(tmp_path, folder):
    (folder / "2.parquet").write_bytes(b"PAR1")
    with pytest.raises(GatesError, match=r"2\.parquet cannot be read as a table"):
        ReportArchive(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / ".hidden.csv").write_text("x")
    with pytest.raises(GatesError, match=r"empty holds no table .*gates weather ingest"):
        ReportArchive(empty)
    ObservationTable.empty().write(empty / "a.csv")
    with pytest.raises(GatesError, match="empty holds no reports"):
        ReportArchive(empty)
    flagged = reports([0.0]).assign(qc=1)
    flagged.to_csv(empty / "a.csv", index=False)
    with pytest.raises(GatesError, match="every report of temperature is out of range or flagged"):
        ReportArchive(empty)
    reports([1.0]).to_csv(empty / "b.csv", index=False)
    assert ReportArchive(empty).flagged == 1  # good ones in another table
