"""Which reports of a table no analysis uses."""

import numpy as np
import pandas as pd
import pytest

from core_gates.errors import GatesError
from weather.observations.report_table import ObservationTable
from weather.operations.report_tables import LeftOut, read_reports
from weather.state import ChannelSpec


def test_reports_that_count_nowhere_are_explained():
    channels = ChannelSpec((), ("temperature",), (850,))
    noon = np.datetime64("2020-01-01T12", "ns")
    rows = {
        "time": [noon, noon, noon, noon, noon + np.timedelta64(9, "h")],
        "variable": ["temperature", "geopotential", "temperature", "temperature", "temperature"],
        "value": [280.0, 15000.0, 260.0, 250.0, 280.0],
        "level_hpa": [850.0, 850.0, 700.0, np.nan, 850.0],
    }
    frame = pd.DataFrame(rows).assign(latitude=0.0, longitude=0.0, error=1.0)
    table = ObservationTable.from_frame(frame)
    assert LeftOut.of(table, channels, np.array([noon])).line() == (
        "4 of 5 reports are left out: 1 not within 3 h of an analysis (2020-01-01 21:00:00 to "
        "2020-01-01 21:00:00); 1 of variables that the configuration lacks (geopotential); 2 of "
        "levels that it lacks (700, none given)"
    )
    good = ObservationTable.from_frame(frame.head(1))
    assert LeftOut.of(good, channels, np.array([noon])).line() == ""


def test_a_table_of_no_use_is_refused(tmp_path):
    channels, noon = ChannelSpec((), ("temperature",), (850,)), np.datetime64("2020-01-01T12", "ns")
    row = {"time": noon, "variable": "temperature", "value": 280.0, "level_hpa": 850.0}
    frame = pd.DataFrame([row]).assign(latitude=0.0, longitude=0.0, error=1.0)
    for name, changes in (("good", {}), ("wrong", {"value": 1e5})):
        frame.assign(**changes).to_csv(tmp_path / f"{name}.csv", index=False)
    table = read_reports(tmp_path / "good.csv")
    found = LeftOut.of(table, channels, np.array([noon]))
    found.require_used("good.csv", np.array([noon]), "advice")
    late = np.array([noon + np.timedelta64(9, "h")])
    with pytest.raises(
        GatesError,
        match=r"good.csv: no report belongs .* 2020-01-01T21:00 to .*"
        "1 of 1 reports are left out: 1 not within 3 h .*: nothing is written, wait",
    ):
        LeftOut.of(table, channels, late).require_used("good.csv", late, "wait")
    with pytest.raises(GatesError, match="every report of temperature is out of range or flagged"):
        read_reports(tmp_path / "wrong.csv")
    both = pd.concat([frame, frame.assign(value=1e5)])
    both.to_csv(tmp_path / "both.csv", index=False)
    said = []
    assert len(read_reports(tmp_path / "both.csv", said.append)) == 2
    assert said == ["1 of 2 reports are out of range or flagged, left out"]
