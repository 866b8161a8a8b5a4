import json
from itertools import pairwise

import numpy as np
import polars as pl
import pytest

from apps.video.studies.progressive import ProgressiveStudy, States, days_of, score, slices_of
from core_gates.errors import GatesError
from harness.experiment import Run
from harness.files.piece import read_record
from recsys.experiments.contest import Contest

SOURCE = "data.source.init_args."
FEED = {
    "data.source.class_path": "video_multitask.sources.simulated.SimulatedFeed",
    f"{SOURCE}rows": 3000, f"{SOURCE}users": 150, f"{SOURCE}videos": 80, f"{SOURCE}days": 6,
    f"{SOURCE}validation_days": 1, f"{SOURCE}test_days": 3, "data.batch_size": 128,
}  # fmt: skip
DAYS = (20220411, 20220412, 20220413)


@pytest.fixture(scope="module")
def study(settings, tmp_path_factory):
    """Finishes the study in one run folder, and returns the run."""
    folder = tmp_path_factory.mktemp("study") / "run"

    def finish(**options):
        run = Run(folder, app="video", settings=settings | FEED, **options)
        ProgressiveStudy(epochs=2).finish(run, Contest(), (0,), {})
        return run

    return finish


def state(run, name):
    return States().load(run.folder / "states" / name)


@pytest.mark.slow
def test_every_day_is_predicted_by_what_was_known_before_it(study, settings):
    run = study()
    names = {path.name for path in (run.folder / "states").iterdir()}
    assert names == {"once-s0", "longer-s0"} | {
        f"{method}-{day}-s0"
        for method, days in (("progressive", DAYS[:2]), ("retrained", DAYS[1:]))
        for day in (f"day{d}" for d in days)
    }
    days = days_of(settings | FEED, "date")
    begins = {day: int(rows["time_ms"].min()) for day, rows in days.days.items()}
    once = state(run, "once-s0").transform.fitted
    assert once.rows == len(days.first) == 1500
    assert once.last < begins[DAYS[0]]
    for name, before in [
        ("progressive-day20220411-s0", DAYS[1]),
        ("progressive-day20220412-s0", DAYS[2]),
        ("retrained-day20220413-s0", DAYS[2]),
    ]:
        found = state(run, name).transform.fitted
        assert found.last < begins[before]
        assert found.rows == len(days.until(before))
    chain = [f"progressive-day{day}-s0" for day in DAYS[:2]]
    records = [read_record(run.folder / "states" / name) for name in ("once-s0", *chain)]
    for before, after in pairwise(records):
        assert after.settings["start"] == before.fingerprint


@pytest.mark.costly("a chain of trained networks")
def test_the_chain_grows_and_moves_on_from_the_day_before(study):
    run = study()
    first, second = state(run, "once-s0"), state(run, "progressive-day20220411-s0")
    known, grown = (s.transform.tables["user_id"].values for s in (first, second))
    assert grown[: len(known)].equals(known)
    assert len(grown) > len(known)
    assert (
        second.weights["ranker.layers.0.bank.stacks.8.weight"].shape[0]
        > (first.weights["ranker.layers.0.bank.stacks.8.weight"].shape[0])
    )
    steps = [float(s.optimizer["0.0.step"]) for s in (first, second)]
    assert steps == [2 * (1500 // 128), 2 * (1500 // 128) + 500 // 128]
    longer = float(state(run, "longer-s0").optimizer["0.0.step"])
    assert longer == 3 * (1500 // 128)  # two days of 500 rows are less than one pass more
    counted = [name for name in first.weights if name.endswith("num_batches_tracked")]
    assert counted
    assert all(second.weights[n] > first.weights[n] for n in counted)


def test_scores_tell_the_methods_from_each_other(study):
    found = json.loads(study().scores.read_text())
    value = {
        (r["method"], r["task"], r["metric"]): r["value"] for r in found["rows"] if not r["versus"]
    }
    methods = ("progressive", "once", "retrained", "longer", "oracle")
    losses = [value[m, "test", "summed log_loss"] for m in methods]
    assert (len(set(losses)), losses[-1]) == (5, min(losses))
    first = [value[m, "day 1", "summed log_loss of a day"] for m in methods[:3]]
    assert len(set(first)) == 1  # all begin alike
    assert len({value[m, "day 3", "summed log_loss of a day"] for m in methods[:3]}) == 3
    tasks = {r["task"] for r in found["rows"]}
    assert {"new users", "new videos", "later users", "day 2", "long_view"} <= tasks
    assert [bar["name"] for bar in found["bars"]] == [
        f"summed log_loss of {method} − progressive, lower end" for method in ("once", "longer")
    ]


def test_a_killed_chain_is_taken_on_with_the_same_bits(study):
    run = study()
    folder = run.folder / "states" / "progressive-day20220412-s0"
    before = states_of(run)
    whole = (folder / "state.safetensors").read_bytes()
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()
    (folder / "transform").rmdir()
    folder.rmdir()
    study()
    assert (folder / "state.safetensors").read_bytes() == whole
    after = states_of(run)
    assert {n for n in before if before[n] != after[n]} == {folder.name}


def states_of(run):
    return {
        path.name: (path / "state.safetensors").stat().st_mtime_ns
        for path in (run.folder / "states").iterdir()
    }


def test_slices_are_disjoint_and_causal(settings):
    days = days_of(settings | FEED, "date")
    found = slices_of(days)
    test = pl.concat(list(days.days.values()))
    assert all(len(rows) == len(test) for rows in found.values())
    assert (sum(found[f"day {k}"].astype(int) for k in (1, 2, 3)) == 1).all()
    for what, column in (("users", "user_id"), ("videos", "video_id")):
        new, later = found[f"new {what}"], found[f"later {what}"]
        assert not (new & later).any()
        assert not set(days.first[column]) & set(test[column].to_numpy()[new | later])
        for row in np.flatnonzero(later)[:20]:
            value, day = test[column][int(row)], test["date"][int(row)]
            assert len(test.filter(pl.col(column) == value, pl.col("date") < day))
        for row in np.flatnonzero(new)[:20]:
            value, day = test[column][int(row)], test["date"][int(row)]
            assert not len(test.filter(pl.col(column) == value, pl.col("date") < day))


def test_perfect_predictions_score_zero(settings):
    days = days_of(settings | FEED, "date")
    labels = pl.concat(list(days.days.values())).select(
        [task.column for task in days.data.schema.tasks]
    )
    sure = labels.to_numpy().astype(float)
    rows = score({"progressive": [sure], "once": [1 - sure]}, days)
    value = {(r.method, r.task): r.value for r in rows if r.metric == "summed log_loss"}
    assert value["progressive", "test"] == pytest.approx(0, abs=1e-4)
    assert value["once", "test"] > 100


def test_wrong_columns_and_too_few_days_are_refused(settings, refuses):
    refuses(
        GatesError,
        ("have no column 'week' of the day", lambda: days_of(settings | FEED, "week")),
        (
            "there is 1 test day",
            lambda: days_of(settings | FEED | {f"{SOURCE}test_days": 1}, "date"),
        ),
    )
    with pytest.raises(ValueError, match="daily_epochs must be at least 1"):
        ProgressiveStudy(daily_epochs=0)
