"""Whole studies on a world of random weights, a few combinations and steps of each."""

import json
import re
import shutil

import pytest

import apps.diffusion.embedded_world as worlds
import apps.diffusion.studies.base_study as base
import apps.diffusion.studies.fused_views as views
import apps.diffusion.studies.fusion_study as fusion
import diffusion.experiments.combined_losses as losses
import diffusion.experiments.made_images as judge
import diffusion.experiments.trained_gates as tasks
from apps.diffusion.studies.base_study import Asked
from core_gates.errors import GatesError
from diffusion.data.scenes import colors_of
from diffusion.data.shapes import SHAPES
from harness.experiment import Run
from harness.runs.terminal import quiet_lightning


@pytest.fixture
def world(zoo_root, write, tmp_path, monkeypatch):
    """A world in which everything but the judge is made, and the judge sees few drawings."""
    quiet_lightning()
    monkeypatch.setenv("COLUMNS", "160")
    shutil.copytree(zoo_root, tmp_path / "runs")
    found = write.world_of(tmp_path / "runs")
    found.run.quick = False
    monkeypatch.setattr(worlds, "JUDGE", {"steps": 2, "batch_size": 8})
    monkeypatch.setattr(judge, "SOME", 999)
    return found


@pytest.fixture
def asked(tmp_path):
    """Ask for one study, in the folder of its name."""

    def ask(name, seeds=(0,)):
        return Asked(Run(tmp_path / "runs" / "diffusion" / name, app="diffusion"), seeds)

    return ask


def scores_of(asked):
    return json.loads(asked.run.scores.read_text())


def test_base(world, asked, monkeypatch):
    monkeypatch.setattr(base, "CAPTIONS", 6)
    monkeypatch.setattr(base, "EACH", 1)
    monkeypatch.setattr(base, "JUDGED", 40)
    monkeypatch.setattr(base, "SAMPLER", {"steps": 1, "guidance": 2.0})
    base.base_study(asked("base"), world)
    found = scores_of(asked("base"))
    assert len(found["bars"]) == 4
    rows = {(r["method"], r["task"], r["metric"]): r for r in found["rows"]}
    assert rows["true drawings", base.UNSEEN_SCENES, "shape_right"]["n"] == 40
    assert rows["base", base.UNSEEN_SCENES, "both_right"]["value"] <= 1
    assert rows["adapters", base.ALONE, "concept_right"]["n"] == 40
    named = {r["method"] for r in found["rows"] if r["task"] == base.ALONE}
    assert {"fish", "dotted", "sepia"} < named


@pytest.mark.parametrize("name", ["none", "fish", "dotted"])
def test_the_base_is_scored_on_colors_of_no_training_and_no_choice(name):
    shown = base.shown_scenes(name)
    for part in ("adapter", "test"):
        seen = {(shape, pair) for shape in SHAPES for pair in colors_of(shape, part)}
        assert not seen & {(one.shape, (one.color, one.ground)) for one in shown}


def test_retrieval(world, asked, monkeypatch):
    for name, own in base.METHODS.items():
        monkeypatch.setitem(base.METHODS, name, own | {"steps": 2, "captions": 4})
    monkeypatch.setattr(base, "WORDS", 40)
    shutil.rmtree(world.run.folder / "encoders")
    base.retrieval_study(asked("retrieval"), world)
    found = scores_of(asked("retrieval"))
    assert len(found["bars"]) == 6
    rows = {(r["method"], r["task"], r["metric"]): r for r in found["rows"] if not r["versus"]}
    assert rows["chance", base.KNOWN, "recall@1"]["value"] == pytest.approx(1 / 40)
    assert rows["phrase lookup", base.KNOWN, "recall@1"]["value"] < 0.1
    assert rows[base.READ, base.SHIPPED, "recall@3"]["n"] == 40
    sizes = {task: rows["encoder", task, "recall@1"]["n"] for task in
             (base.KNOWN, "known subjects", "known styles", base.NEW)}  # fmt: skip
    assert list(sizes.values()) == [36, 14, 22, 4]


@pytest.fixture
def few(monkeypatch):
    """Two combinations of each group, few steps and trials, two variants and three rivals."""
    every = tasks.combinations
    for module in (tasks, losses, fusion, views):
        monkeypatch.setattr(module, "combinations", lambda group: every(group)[:2])
    for name, own in list(fusion.VARIANTS.items()):
        if name in ("gates", "gates + switch", "gates (fewer adapters)",
                    "x_lora layerwise", "layer_strengths", "layer_strengths + role"):  # fmt: skip
            monkeypatch.setitem(fusion.VARIANTS, name, own | {"steps": 1, "batch_size": 2})
        else:
            monkeypatch.delitem(fusion.VARIANTS, name)
    for name in list(fusion.SPACES):
        if name not in ("sum", "switch"):
            monkeypatch.delitem(fusion.SPACES, name)
    for name in list(fusion.PLAIN):
        if name not in ("none", "alone0", "alone1", "sum", "mean"):
            monkeypatch.delitem(fusion.PLAIN, name)
    for rival, own in losses.FITTING.items():
        less = {name: 2 for name in ("drawings", "times", "evaluations", "steps") if name in own}
        monkeypatch.setitem(losses.FITTING, rival, own | less)
    monkeypatch.setattr(fusion, "TRIALS", 3)
    monkeypatch.setattr(fusion, "TRIED_STEPS", 1)
    monkeypatch.setattr(fusion, "TIMES", 2)
    monkeypatch.setattr(fusion, "MOST", 2)
    monkeypatch.setattr(losses, "TRIED_TIMES", 2)
    monkeypatch.setattr(judge, "TIMES", 2)
    monkeypatch.setattr(views, "SAMPLER", {"steps": 2, "guidance": 2.0})
    monkeypatch.setattr(views, "COSTED", 2)


@pytest.mark.slow
def test_fusion(world, asked, few):
    shutil.rmtree(world.run.folder / "gates")
    fusion.fusion_study(asked("fusion", (0, 1)), world)
    found = scores_of(asked("fusion"))
    tasks_found = {row["task"] for row in found["rows"]}
    assert {*fusion.GROUPS.values()} <= tasks_found
    names = {row["method"] for row in found["rows"]}
    assert {"sum", "sum tuned", "switch tuned", "gates"} <= names
    assert {"layer_strengths", "x_lora layerwise", "gates + switch"} <= names
    assert {"layer_strengths + role", "gates + role"} <= names
    assert not any("fewer" in name for name in names)
    useless = {r["method"] for r in found["rows"] if r["metric"] == fusion.USELESS}
    assert {"gates", "gates + switch", "sum"} <= useless
    assert "x_lora layerwise" not in useless
    opened = [r["method"] for r in found["rows"] if r["metric"] == fusion.OPENING]
    assert opened == ["gates + switch"]
    fresh = {r["method"] for r in found["rows"] if r["task"] == fusion.GROUPS["new2"]}
    assert {"gates", "sum", "sum tuned", "none"} - fresh == {"none"}
    assert "gates + switch" not in fresh
    seen = [row for row in found["rows"] if row["method"] in views.SEEING]
    assert {row["task"] for row in seen} == {fusion.GROUPS["test2"]}
    assert sorted(row["versus"] or "" for row in seen) == ["", "gates"]
    assert not any("sees" in bar["name"] for bar in found["bars"])
    before = asked("fusion").run.scores.read_text()
    shutil.rmtree(asked("fusion").run.folder / "gates")  # losses are taken as they are
    made = sorted(p.stat().st_mtime_ns for p in asked("fusion").run.folder.rglob("result.*"))
    fusion.fusion_study(asked("fusion", (0, 1)), world)
    after = sorted(p.stat().st_mtime_ns for p in asked("fusion").run.folder.rglob("result.*"))
    assert made == after
    losses_of = [r for r in json.loads(before)["rows"] if r["metric"] == fusion.METRIC]
    again = [r for r in scores_of(asked("fusion"))["rows"] if r["metric"] == fusion.METRIC]
    assert losses_of == again


@pytest.mark.slow
def test_images(world, asked, few):
    shutil.rmtree(world.run.folder / "gates")
    fusion.images_study(asked("images", (0, 1)), world)
    found = scores_of(asked("images"))
    assert "retention in unseen pairs" in {row["task"] for row in found["rows"]}
    images = [p.name for p in (asked("images").run.folder / "images").iterdir()]
    assert sum(name.startswith("gates-of") for name in images) == 4  # two seeds, pairs and triples
    white = [r["value"] for r in found["rows"] if r["method"] == "white image" and not r["versus"]]
    assert len(white) == 2
    assert all(0.1 < value < 0.9 for value in white)
    gates_rows = {(r["method"], r["metric"]): r["value"] for r in found["rows"]
                  if r["task"].startswith("cost")}  # fmt: skip
    assert gates_rows["gates", "seconds_over_none"] > 0


@pytest.mark.parametrize(
    ("only", "words"),
    [
        (("none", "gates", "sum tunde"), "--only is 'sum tunde'; choose one of"),
        (("sum",), "--only is sum, without none or gates: name both"),
    ],
)
def test_methods_of_fusion_that_cannot_be_compared_are_refused(only, words, tmp_path):
    run = Run(tmp_path / "fusion", app="diffusion", only=only)
    with pytest.raises(GatesError, match=re.escape(words)):
        fusion.fusion_study(Asked(run, (0,)), None)
    assert not (tmp_path / "fusion").exists()
