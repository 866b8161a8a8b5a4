"""Analyses of reports by a method, and tables of reports for people."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from core_gates.errors import GatesError
from weather.baselines.assimilator import FreeRun
from weather.baselines.optimal_interpolation import OptimalInterpolation
from weather.experiments.experiment import Method
from weather.observations.report_table import ObservationTable
from weather.operations.analyses import AnalysisOptions, Assimilation, Kept, tuned
from weather.operations.report_tables import LeftOut, read_reports, simulate_reports
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


METHOD = Method("oi", lambda s: OptimalInterpolation(None, scale=s["scale"]), {"scale": (0.01, 1)})


def test_a_stored_setting_is_taken_in_silence():
    said = []
    assert tuned({"oi@0.1": {"scale": 0.3}}, METHOD, "0.1", said.append).scale == 0.3
    assert said == []


def test_a_setting_that_is_missing_or_of_another_box_is_named():
    for settings in ({}, {"oi@0.1": {"inflation": 0.3}}):
        said = []
        assert abs(tuned(settings, METHOD, "0.1", said.append).scale - 0.1) < 1e-12
        (line,) = said
        assert "oi@0.1 was never tuned" in line


def test_a_method_without_settings_needs_none():
    said = []
    assert tuned({}, Method("free_run", lambda _: FreeRun()), "0.1", said.append).members == 1
    assert said == []


@pytest.fixture
def assimilation(twin, tmp_path):
    """``assimilation(**options)`` of simulated reports of the last time, and what it says."""
    source = twin.source()
    nature, table = twin.folder / "nature.zarr", tmp_path / "reports.parquet"
    simulate_reports(source, nature, table, stations=40, member=1, start=-1, times=1, seed=0)
    said = []

    def build(kept=None, **options):
        options = {"background": str(nature), "method": "inverse_distance"} | options
        model = SimpleNamespace(hours=6.0, variant=lambda _: SimpleNamespace(analysis=None))
        given = AnalysisOptions(str(table), **options)
        return Assimilation(model, source, kept or Kept("twin"), given, say=said.append)

    return build, said


def test_a_method_analyzes_a_background(assimilation, twin, tmp_path):
    build, said = assimilation
    job = build()
    found = job.analyze()
    path = job.write(found, tmp_path / "analysis.zarr", made_by={"revision": "abc"})
    assert "was never tuned" in said[0]
    assert said[-1].startswith(np.datetime_as_string(found.times[-1], unit="m"))
    with xr.open_zarr(twin.folder / "nature.zarr") as nature, xr.open_zarr(path) as written:
        mean = nature.mean("number").load()
        truth, before = nature["height"].values[-1, 1], mean["height"].values
        after = written["height"].values
        facts = written.attrs
    assert np.allclose(after[:-1], before[:-1])  # without reports a background stays
    errors = [np.sqrt(np.mean((one[-1] - truth) ** 2)) for one in (before, after)]
    assert errors[1] < errors[0]
    assert (facts["method"], facts["configuration"], facts["revision"]) == (
        "inverse_distance", "twin", "abc",
    )  # fmt: skip
    assert facts["used_cells"][-1] > 20
    assert sum(facts["used_cells"][:-1]) == 0


def test_what_is_kept_is_used(assimilation):
    """A tuned setting changes the analysis and is named; a file of weights is looked for."""

    class Mine(Kept):
        def chosen(self, name):
            assert name.startswith("inverse_distance@")
            box = build().experiment.methods(build().task)
            (one,) = (method.box for method in box if method.name == "inverse_distance")
            return {name: {axis: low for axis, (low, _) in one.items()}}

    build, said = assimilation
    plain = build().analyze()
    said.clear()
    job = build(Mine())
    assert not torch.equal(job.analyze().states, plain.states)
    assert said == [] or "never tuned" not in said[0]
    assert job.attributes["settings"] != "{}"
    with pytest.raises(GatesError, match="there are no weights of adas_increment: train them"):
        build(method="adas_increment").analyze()


def test_what_cannot_be_analyzed_is_refused(assimilation):
    build, _ = assimilation
    for options, cycles, line in (
        ({"task": "9"}, 1, "--task '9' is unknown"),
        ({"method": "magic"}, 1, "--method 'magic' is unknown: choose from adas_increment"),
        ({"background": None}, 1, "--background is missing: give a store"),
        ({}, 0, "--cycles must be at least 1, found 0"),
        ({}, 2, "--cycles 2 needs --forecast"),
    ):
        with pytest.raises(GatesError, match=line):
            build(**options).analyze(cycles)
