"""Sets of six retrieved adapters, from a library of random weights to the scores."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from torch.testing import assert_close

import apps.diffusion.embedded_world as worlds
import apps.diffusion.studies.retrieved_study as study
import diffusion.experiments.made_images as judge
import diffusion.experiments.retrieved_sets as sets_module
import diffusion.experiments.trained_gates as tasks
from apps.diffusion.studies.base_study import Asked, encoder_of
from apps.diffusion.studies.fusion_study import FEWER
from core_gates.errors import GatesError
from diffusion.data.concepts import LEFT_OUT, of_no_adapter, of_one_adapter
from diffusion.evaluation.fusion_scores import fixed_losses
from diffusion.experiments.combined_losses import seed_of
from diffusion.experiments.retrieved_sets import GATE, NEEDED, TOLD, Way, losses_of, needed
from diffusion.experiments.trained_gates import combinations
from diffusion.rivals.registry import make_rival
from harness.experiment import Run
from harness.runs.terminal import quiet_lightning


@pytest.fixture
def world(zoo_root, write, tmp_path):
    quiet_lightning()
    shutil.copytree(zoo_root, tmp_path / "runs")
    found = write.world_of(tmp_path / "runs")
    found.run.quick = False
    return found


@pytest.fixture
def few(monkeypatch):
    """Two combinations of each group."""
    every = tasks.combinations
    for module in (tasks, study, sets_module):
        monkeypatch.setattr(module, "combinations", lambda group: every(group)[:2])
    sets_module._sets.cache_clear()


@pytest.fixture
def sets(world, few):
    places = world.base_folder, encoder_of(world), world.zoo(0)
    return sets_module.sets_of(*places, "test2", "test")


def test_sets_hold_the_six_best_and_rules_open_them(sets):
    assert [len(task.adapters) for task in sets.tasks] == [6, 6]
    every = losses_of(sets, Way("all"), 2)
    told = losses_of(sets, Way(TOLD), 2)
    model, base = sets.bench.base.transformer, sets.bench.base
    for place, (pair, task) in enumerate(zip(sets.group, sets.tasks, strict=True)):
        fusion = make_rival("sum", model, {name: sets.library[name] for name in task.adapters})
        expected = fixed_losses(
            model, fusion, task.latents, task.text, steps=2, seed=seed_of(pair.name),
            shift=base.shift,
        )  # fmt: skip
        assert_close(every["losses"][place], expected.mean(), rtol=1e-4, atol=1e-5)
        wanted = needed(pair, task.adapters)
        assert wanted.sum() == len(set(pair.adapters) & set(task.adapters))
        assert told["useless_open"][place] == 0
    none = losses_of(sets, Way("absolute threshold", {"threshold": 2.0}), 2)
    assert_close(none["losses"], losses_of(bare(sets), Way(NEEDED), 2)["losses"])
    assert not none["any_open"].any()
    half = losses_of(sets, Way("all", {"strength": 0.5}), 2)["losses"]
    assert_close(half, losses_of(sets, Way("svd", {"weight": 0.5, "rank": 99}), 2)["losses"],
                 rtol=1e-3, atol=1e-4)  # fmt: skip


def bare(sets):
    """The same drawings under the same noise, of combinations that need no adapter."""
    group = [SimpleNamespace(name=pair.name, adapters=()) for pair in sets.group]
    return sets._replace(group=group)


def test_groups_need_one_none_and_no_adapter_that_is_left_out():
    assert [len(pair.adapters) for pair in (*of_one_adapter(), *of_no_adapter())] == [1] * 40 + [
        0
    ] * len(of_no_adapter())
    assert len(combinations("one")) == len(combinations("none")) == 24
    assert {len(p.adapters) for p in combinations("tried_retrieved")} == {0, 1, 2, 3}
    for group in ("tried_fewer", "retrieved_fewer", "tried_retrieved_fewer"):
        named = {name for pair in combinations(group) for name in pair.adapters}
        assert not named & set(LEFT_OUT)
        assert len(named) == 30 or group.startswith("tried_retrieved")
    assert len({pair.name for pair in combinations("none")}) == 24


@pytest.mark.slow
def test_the_study_from_a_library_to_its_scores(world, few, tmp_path, monkeypatch):
    monkeypatch.setattr(worlds, "JUDGE", {"steps": 2, "batch_size": 8})
    monkeypatch.setattr(judge, "SOME", 999)
    monkeypatch.setattr(study, "TRIALS", 2)
    monkeypatch.setattr(study, "TRAINING", study.TRAINING | {"steps": 2, "batch_size": 2})
    monkeypatch.setattr(study, "SAMPLER", {"steps": 1, "guidance": 2.0})
    for name in ("ties", "dare_linear", "mean", "top-3"):
        monkeypatch.delitem(study.SPACES, name)
    run = Run(tmp_path / "runs" / "diffusion" / "retrieved", app="diffusion")
    study.retrieved_study(Asked(run, (0, 1)), world)
    found = json.loads(run.scores.read_text())
    rows = {(r["method"], r["task"], r["metric"]): r for r in found["rows"] if r["versus"]}
    pictures = f"images of {study.BOTH}"
    expected = {*study.TASKS.values(), study.BOTH, study.UNSEEN, pictures}
    assert {task for _, task, _ in rows} == expected
    compared = {method for method, _, metric in rows if metric == study.LOSS}
    assert compared == {NEEDED, TOLD, study.BASE, *study.SPACES} - {study.CONSTANT}
    assert len(found["bars"]) == 7
    assert not any(FEWER in method for method, *_ in rows)
    assert (TOLD, pictures, study.RIGHT) in rows
    trained = {p.name for p in (run.folder / "gates").iterdir()}
    assert len(trained) == 4  # two seeds of both gates


def test_a_world_without_encoder_is_refused(world, tmp_path):
    shutil.rmtree(world.run.folder / "encoders")
    run = Run(tmp_path / "retrieved", app="diffusion")
    with pytest.raises(GatesError, match="no encoder of adapters"):
        study.retrieved_study(Asked(run, (0,)), world)


def test_rows_are_paired_logarithms_and_leave_out_what_is_not_there(few):
    base, ahead = np.array([1.0, 2.0]), np.array([1.1, 2.2])
    opened = {"needed_open": np.array([0.9, math.nan]), "useless_open": np.array([0.1, 0.3]),
              "any_open": np.array([1.0, 1.0])}  # fmt: skip
    found = {
        NEEDED: [{"test2.losses": base}],
        GATE: [{f"test2.{n}": v for n, v in (opened | {"losses": ahead}).items()}] * 2,
        "sum": [{"test2.losses": 2 * ahead}],
    }
    rows = {(r.method, r.metric, r.versus): r for r in study.rows_of(found, ["test2"], "a task")}
    assert rows[GATE, study.LOSS, ""].value == pytest.approx(math.log(1.1))
    assert rows["sum", study.LOSS, GATE].value == pytest.approx(math.log(2))
    assert rows[GATE, "needed_open", ""].value == pytest.approx(0.9)
    assert rows[GATE, "useless_open", ""].value == pytest.approx(0.2)
    assert not any(metric == study.RIGHT for _, metric, _ in rows)


def test_bars_have_the_sign_of_their_names():
    def row(method, task, metric, value, low, versus=""):
        return study.Row(method, task, metric, value, low, value + 0.1, versus=versus)

    rows = [
        row("soft threshold", study.BOTH, study.LOSS, math.log(1.3), math.log(1.15), GATE),
        row("top-2", study.UNSEEN, study.LOSS, 0.05, -0.01, GATE),
        row(TOLD, study.BOTH, study.LOSS, math.log(0.89), -0.2, GATE),
        row(f"{GATE}{study.FLOOR}", study.TASKS["none"], "any_open", 0.05, 0.0),
        row(GATE, study.BOTH, "useless_open", 0.2, 0.1),
        row(GATE, study.BOTH, "needed_open", 0.9, 0.8),
    ]
    bars = study.bars_of(rows, "soft threshold", "top-2")
    assert [bar.met for bar in bars] == [True, True, False, True, True, False, True]
