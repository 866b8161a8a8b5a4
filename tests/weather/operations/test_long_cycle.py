"""Analyses of reports by a method, once and in a cycle that is continued after a kill."""

import os
import random
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from core_gates.errors import GatesError
from weather.assimilation import Reports
from weather.baselines.assimilator import FreeRun, InverseDistance, Nudging
from weather.baselines.optimal_interpolation import OptimalInterpolation
from weather.experiments.experiment import Method
from weather.grid import regular_grid
from weather.observations.report_table import ObservationTable
from weather.operations import long_cycle
from weather.operations.analyses import AnalysisOptions, Assimilation, Kept, tuned
from weather.operations.long_cycle import CycleParts, run_cycle
from weather.operations.report_tables import LeftOut, read_reports, simulate_reports
from weather.state import ChannelSpec, Normalizer


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


def test_a_table_of_no_use_is_refused(tmp_path, refuses, refused):
    channels, noon = ChannelSpec((), ("temperature",), (850,)), np.datetime64("2020-01-01T12", "ns")
    row = {"time": noon, "variable": "temperature", "value": 280.0, "level_hpa": 850.0}
    frame = pd.DataFrame([row]).assign(latitude=0.0, longitude=0.0, error=1.0)
    for name, changes in (("good", {}), ("wrong", {"value": 1e5})):
        frame.assign(**changes).to_csv(tmp_path / f"{name}.csv", index=False)
    table = read_reports(tmp_path / "good.csv")
    found = LeftOut.of(table, channels, np.array([noon]))
    found.require_used("good.csv", np.array([noon]), "advice")
    late = np.array([noon + np.timedelta64(9, "h")])
    refuses(
        GatesError,
        (
            (
                r"good.csv: no report belongs .* 2020-01-01T21:00 to .*"
                "1 of 1 reports are left out: 1 not within 3 h .*: nothing is written, wait"
            ),
            lambda: LeftOut.of(table, channels, late).require_used("good.csv", late, "wait"),
        ),
        (
            "every report of temperature is out of range or flagged",
            lambda: read_reports(tmp_path / "wrong.csv"),
        ),
    )
    pd.concat([frame, frame.assign(value=1e5)]).to_csv(tmp_path / "both.csv", index=False)
    said = []
    both = read_reports(tmp_path / "both.csv", said.append)
    assert (len(both), said) == (2, ["1 of 2 reports are out of range or flagged, left out"])
    refused("no report belongs", LeftOut.of(both, channels, late).require_used, "", late, "wait")


METHOD = Method("oi", lambda s: OptimalInterpolation(None, scale=s["scale"]), {"scale": (0.01, 1)})


@pytest.mark.parametrize(
    ("settings", "scale", "silent"),
    [
        ({"oi@0.1": {"scale": 0.3}}, 0.3, True),
        ({"oi@0.1": {"inflation": 0.3}}, 0.1, False),
        ({}, 0.1, False),
    ],
)
def test_a_stored_setting_is_taken_in_silence_another_is_named(settings, scale, silent):
    said = []
    assert tuned(settings, METHOD, "0.1", said.append).scale == pytest.approx(scale)
    assert ["oi@0.1 was never tuned" in line for line in said] == [True] * (not silent)


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
    two = simulate_reports(twin.source(), twin.folder / "nature.zarr", tmp_path / "two.parquet",
                           stations=40, member=1, start=-2, times=2, seed=0)  # fmt: skip
    assert two.frame["latitude"].nunique() > 40  # other places at each time
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


def test_what_is_kept_is_used(assimilation, refused):
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
    refused(
        "there are no weights of adas_increment: train them", build(method="adas_increment").analyze
    )


def test_what_cannot_be_analyzed_is_refused(assimilation, refused):
    build, _ = assimilation
    for options, cycles, line in (
        ({"task": "9"}, 1, "--task '9' is unknown"),
        ({"method": "magic"}, 1, "--method 'magic' is unknown: choose from free_run"),
        ({"background": None}, 1, "--background is missing: give a store"),
        ({}, 0, "--cycles must be at least 1, found 0"),
        ({}, 2, "--cycles 2 needs --forecast"),
    ):
        refused(line, lambda given=options, n=cycles: build(**given).analyze(n))


GRID = regular_grid(8, 12, poles=False)
CHANNELS = ChannelSpec(("2m_temperature",), ("temperature",), (850, 500))
CYCLES = 8
TIMES = np.datetime64("2020-01-01", "ns") + np.arange(CYCLES) * np.timedelta64(6, "h")
OUTAGE = (3, 4)


def truth(number):
    """A wave that moves eastwards by a column in every cycle."""
    wave = (2 * torch.pi * torch.arange(12) / 12).sin().roll(number) * 5
    return (torch.tensor([285.0, 280.0, 255.0])[:, None, None] + wave).expand(3, 8, 12).float()


def table():
    """Thirty reports at every time but those of the outage, with errors, and a wrong one."""
    draw, rows = np.random.default_rng(0), []
    for number, time in enumerate(TIMES):
        if number in OUTAGE:
            continue
        field = truth(number).numpy()
        for _ in range(30):
            channel, row, column = draw.integers(3), draw.integers(8), draw.integers(12)
            rows.append({
                "time": time, "latitude": float(GRID.latitude[row]),
                "longitude": float(GRID.longitude[column]),
                "variable": "2m_temperature" if channel == 0 else "temperature",
                "level_hpa": [np.nan, 850.0, 500.0][channel], "error": 0.5,
                "value": field[channel, row, column] + 0.5 * draw.normal(),
            })  # fmt: skip
    rows[45]["value"] += 60
    return ObservationTable.from_frame(pd.DataFrame(rows))


TABLE = table()


class Drift:
    """The dynamics of the truth, with damping."""

    def __call__(self, x, hours):
        mean = x.mean((-2, -1), keepdim=True)
        return (mean + 0.99 * (x - mean)).roll(round(hours / 6), -1)


class Trend:
    """The same with a little of the trend of two frames, which it is given six hours apart."""

    frames, step_hours = 2, 6.0

    def __call__(self, x, hours, previous=None):
        before = x if previous is None else previous.roll(1, -1)
        return (x + 0.2 * (x - before)).roll(1, -1)


class Half:
    """Drift that can take half a cycle, by interpolation."""

    def __call__(self, x, hours):
        return x + (hours / 6) * (x.roll(1, -1) - x)


METHODS = {
    "inverse distance": (lambda _: InverseDistance(GRID), Drift()),
    "free run": (lambda _: FreeRun(), Drift()),
    "two frames": (lambda _: InverseDistance(GRID), Trend()),
    "a method that remembers": (lambda model: Nudging(GRID, model, radius_km=4000.0), Half()),
    "own times": (lambda _: InverseDistance(GRID), Half()),
}


def run(path, case="inverse distance", *, cycles=CYCLES, forecast=None, limit=5.0, **options):
    build, model = METHODS[case]
    model = forecast or model
    by = "interpolation_in_time" if case == "own times" else "nearest_cell"
    sd = torch.full((3,), 2.0)
    reports = Reports(lambda _: TABLE, GRID, CHANNELS, sd, observation_operator=by)
    units = Normalizer(torch.tensor([285.0, 280.0, 255.0]), torch.full((3,), 4.0))
    parts = CycleParts(reports, build(model), model, 6.0, units, limit)
    times = TIMES[0] + np.arange(cycles) * np.timedelta64(6, "h")
    settings = {"case": case}
    return run_cycle(parts, truth(0) + 3, times, path, settings=settings,
                     attributes={"method": case}, **options)  # fmt: skip


def opened(path, name):
    with xr.open_zarr(path / name, consolidated=True) as found:
        return found.load()


def assert_same(path, other):
    """Hold folders that began with another number of cycles to the same values."""
    for name in (long_cycle.ANALYSES, long_cycle.BACKGROUNDS):
        xr.testing.assert_identical(opened(path, name), opened(other, name))
    tables = [(one / long_cycle.DEPARTURES).read_text() for one in (path, other)]
    assert tables[0] == tables[1]


def contents(path):
    return {p.relative_to(path): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_what_a_cycle_writes(tmp_path):
    reports = run(tmp_path / "c")
    background, analysis = (
        opened(tmp_path / "c", n) for n in ("backgrounds.zarr", "analyses.zarr")
    )
    assert analysis["temperature"].dims == ("time", "level", "latitude", "longitude")
    assert analysis["temperature"].dtype == np.float32
    np.testing.assert_array_equal(analysis["time"], TIMES)
    np.testing.assert_array_equal(background["2m_temperature"][0], truth(0)[0] + 3)
    # The analysis, never the background, starts the next forecast.
    fields = torch.from_numpy(background["2m_temperature"].values)
    for number in range(1, CYCLES):
        last = torch.from_numpy(analysis["2m_temperature"].values[number - 1])[None, None]
        assert torch.equal(Drift()(last, 6.0)[0, 0], fields[number])
    # An outage is the plain forecast, to the last bit.
    same = [np.array_equal(analysis["temperature"][n], background["temperature"][n])
            for n in range(CYCLES)]  # fmt: skip
    assert same == [n in OUTAGE for n in range(CYCLES)]
    errors = [float(abs(one["2m_temperature"].values[-1] - truth(CYCLES - 1)[0].numpy()).mean())
              for one in (background, analysis)]  # fmt: skip
    assert errors[1] < errors[0] < 2
    for one in (background, analysis):
        assert one.attrs["used_cells"] == reports.counts()["used_cells"]
        assert one.attrs["rejected_cells"] == [0, 1, 0, 0, 0, 0, 0, 0]
        assert one.attrs["method"] == "inverse distance"
        assert [used == 0 for used in one.attrs["used_cells"]] == same


def test_departures_are_those_of_the_stores(tmp_path):
    run(tmp_path / "c")
    rows = pd.read_csv(tmp_path / "c" / "departures.csv")
    assert (len(rows), rows["channel"].tolist()[:3]) == (3 * CYCLES, ["t2m", "t850", "t500"])
    one = rows[(rows["time"] == "2020-01-01T12:00") & (rows["channel"] == "t850")].iloc[0]
    frame = TABLE.frame
    here = frame[(frame["time"] == TIMES[2]) & (frame["level_hpa"] == 850)]
    cells = here.groupby(["latitude", "longitude"])["value"].mean()
    assert one["used"] == len(cells)
    for name, store in (("ob", "backgrounds.zarr"), ("oa", "analyses.zarr")):
        field = opened(tmp_path / "c", store)["temperature"].sel(time=TIMES[2], level=850)
        away = [value - float(field.sel(latitude=a, longitude=b, method="nearest"))
                for (a, b), value in cells.items()]  # fmt: skip
        assert one[f"{name}_bias"] == pytest.approx(np.mean(away), abs=1e-4)
        assert one[f"{name}_rms"] == pytest.approx(np.sqrt(np.mean(np.square(away))), abs=1e-4)
    assert (rows["oa_rms"].dropna() < rows["ob_rms"].dropna()).mean() > 0.9
    assert rows["rejected"].sum() == 1
    assert rows.loc[rows["used"] == 0, ["ob_bias", "oa_rms"]].isna().all(axis=None)


def killed(path, case, target, at):
    """Run in a process that dies at the n-th call of a function, before or after its work."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    owner = getattr(long_cycle, target.split(".")[0])
    name, calls = target.split(".")[1], []
    original = getattr(owner, name)

    def dying(self, *words):
        calls.append(words)
        if len(calls) == at:
            os._exit(9)
        return original(self, *words)

    setattr(owner, name, dying)
    run(path, case)
    os._exit(0)


ONCE_A_DAY = ("inverse distance", "free run", "own times")  # the others keep more


@pytest.mark.parametrize(
    "case",
    [pytest.param(one, marks=pytest.mark.slow) if one in ONCE_A_DAY else one for one in METHODS],
)
def test_a_killed_cycle_ends_with_the_same_bits(tmp_path, case):
    run(tmp_path / "whole", case)
    draw = random.Random(case)
    kills = 0
    for target in ("StreamedStore.write", "Partial.save", "StreamedStore.write"):
        at = draw.randrange(2, 9) if target.startswith("Str") else draw.randrange(1, 3)
        kills += killed(tmp_path / "c", case, target, at) == 9
        assert not (tmp_path / "c").exists()
    assert kills == 3
    run(tmp_path / "c", case)
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "whole"]


def test_the_previous_analysis_matters_to_two_frames(tmp_path):
    """Else the test above would not show that it is read again."""
    run(tmp_path / "two", "two frames")
    run(tmp_path / "one", "two frames", forecast=lambda x, hours: Trend()(x, hours))
    assert contents(tmp_path / "two") != contents(tmp_path / "one")


class Growing(Drift):
    """Leaves the climate in the fifth forecast."""

    def __init__(self, factor):
        self.factor, self.calls = factor, 0

    def __call__(self, x, hours):
        self.calls += 1
        found = super().__call__(x, hours)
        return found + self.factor if self.calls == 5 else found


@pytest.mark.parametrize(
    ("factor", "shown"), [(50.0, "departs from its mean by 1"), (np.nan, "nan")]
)
def test_a_diverged_cycle_ends_and_keeps_what_was_good(tmp_path, factor, shown):
    run(tmp_path / "whole", cycles=5)
    with pytest.raises(GatesError) as caught:
        run(tmp_path / "c", forecast=Growing(factor))
    said = str(caught.value)
    assert said.startswith("cycle 6 of 8, 2020-01-02T06:00: the background has diverged: ")
    assert shown in said
    assert said.endswith("; 5 cycles are kept, --cycles 5 finishes with them")
    assert not (tmp_path / "c").exists()
    run(tmp_path / "c", cycles=5)
    assert_same(tmp_path / "c", tmp_path / "whole")


def test_fewer_and_more_cycles_than_before(tmp_path):
    for stop, cycles in ((6, 3), (4, 8)):
        path = tmp_path / f"c{cycles}"
        assert killed(path, "inverse distance", "Partial.save", stop) == 9
        run(path, cycles=cycles)
        run(tmp_path / f"whole{cycles}", cycles=cycles)
        assert_same(path, tmp_path / f"whole{cycles}")


def test_other_settings_do_not_continue_it(tmp_path, refused):
    assert killed(tmp_path / "c", "inverse distance", "Partial.save", 3) == 9
    refused(
        r"begun with other settings \(case inverse distance, now", run, tmp_path / "c", "free run"
    )
    run(tmp_path / "c", "free run", overwrite=True)
    assert opened(tmp_path / "c", "analyses.zarr").attrs["method"] == "free run"


def test_reports_in_another_unit_are_refused_at_the_first_cycle(tmp_path, monkeypatch, refused):
    wrong = TABLE.frame.assign(value=TABLE.frame["value"] * 1.2)
    wrong = pd.concat([wrong] * 3, ignore_index=True)
    monkeypatch.setattr(f"{__name__}.TABLE", ObservationTable(wrong))
    refused(r"cycle 1 of 8, .*rejects all \d+ observed cells of", run, tmp_path / "c")
    assert not list(tmp_path.iterdir())
