import numpy as np
import pandas as pd
import pytest

from core_gates.errors import GatesError
from weather.observations.readers.formats import read_csv_table, read_parquet_table


def table(**columns):
    frame = {
        "time": "2017-01-02T12:00", "latitude": [50.0, 51.0], "longitude": 8.0,
        "level_hpa": [850.0, np.nan], "variable": ["temperature", "2m_temperature"],
        "value": [270.0, 280.0], "error": [1.0, 2.0], "station": "A",
    }  # fmt: skip
    return pd.DataFrame(frame | columns)


@pytest.fixture
def read(tmp_path):
    def read(frame):
        csv, parquet = tmp_path / "t.csv", tmp_path / "t.parquet"
        frame.to_csv(csv, index=False)
        frame.to_parquet(parquet)
        first, second = read_csv_table(csv), read_parquet_table(parquet)
        assert first.rejected == second.rejected
        assert len(first.frame) == len(second.frame)
        return first

    return read


def test_columns_are_taken_as_they_are(read):
    found = read(table())
    assert found.reports == 2
    assert not found.rejected
    assert found.frame["error"].tolist() == [1.0, 2.0]
    assert set(found.frame["source"]) == {"table"}


def test_missing_errors_are_those_of_the_variable_in_its_unit(read):
    assert read(table().drop(columns="error")).frame["error"].tolist() == [1.5, 1.5]
    assert read(table(error=[np.nan, 3.0])).frame["error"].tolist() == [1.5, 3.0]
    heights = table(variable="geopotential", level_hpa=500.0, value=5500.0, units="gpm")
    found = read(heights.drop(columns="error")).frame["error"]
    assert found.tolist() == pytest.approx([82 / 9.80665] * 2)


def test_flagged_and_textual_rows_are_rejected(read):
    found = read(table(qc=[3, 0]))
    assert len(found.frame) == 1
    assert found.rejected == {"flagged in the file": 1}
    found = read(table(value=["cold", "280.0"]))
    assert found.frame["value"].tolist() == [280.0]
    assert found.rejected == {"text in place of a number": 1}


def test_other_columns_are_named(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("when,where\n1,2\n")
    with pytest.raises(GatesError, match=r"lacks the column time, latitude, .*, found when, where"):
        read_csv_table(path)
    path.write_text('a,b\n"1\n')
    with pytest.raises(GatesError, match="unreadable CSV"):
        read_csv_table(path)
