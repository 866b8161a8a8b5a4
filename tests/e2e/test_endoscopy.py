"""Every verb of ``gates endoscopy`` on the unit configuration, from frames to report."""

import json
import re
import runpy
import shutil
from pathlib import Path

import jsonschema
import numpy as np
import pandas as pd
import pytest
import torch

from endoscopy.bundles.sizing_bundle import load_bundle
from endoscopy.data.frame_table import REQUIRED
from endoscopy.data.readers.real_colon import read_real_colon
from endoscopy.data.readers.sun import read_sun

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "apps" / "endoscopy" / "configs").glob("*.yaml"))
RUN = Path("runs/endoscopy/unit")


@pytest.fixture(scope="module")
def evaluated(sizing):
    return sizing.endoscopy("evaluate")


@pytest.fixture(scope="module")
def audited(sizing, evaluated):
    return sizing.endoscopy("audit")


def read_scores(sizing, name="unit"):
    return json.loads((sizing.folder / f"runs/endoscopy/{name}/scores.json").read_text())


def figure(scores, method, metric, task="test"):
    (row,) = [
        row
        for row in scores["rows"]
        if (row["method"], row["metric"], row["task"]) == (method, metric, task)
        and row["versus"] is None
    ]
    return row["value"]


def test_render_writes_the_layout_of_real_data_once(sizing):
    table, report = read_real_colon(sizing.folder / RUN / "rendered")
    assert (len(table), set(table.frames["database"])) == (64, {"SYNTH"})
    assert report.total("excluded") == 0
    other, _ = read_real_colon(sizing.folder / RUN / "rendered-brand_b")
    assert set(other.frames["brand"]) == {"B"}
    frame = table.path(0)
    before = frame.stat().st_mtime_ns
    assert sizing.endoscopy("render").out.splitlines()[0] == str(RUN / "rendered")
    assert frame.stat().st_mtime_ns == before


def test_prepare_reports_and_writes_one_table(sizing):
    out = sizing.endoscopy("prepare").out
    assert "64 frames of 32 objects" in out
    assert "train 12 objects, 24 frames; validation 4 objects" in out
    path = sizing.folder / out.splitlines()[-1]
    assert len(pd.read_parquet(path)) == 64
    assert json.loads((path.parent / "read_report.json").read_text())["kept"] == 64


def test_prepare_tells_the_size_of_the_cache_before_it_builds_it(sizing):
    words = ["--name", "cached", "--data.cache_folder", "another", "--data.cache_form", "raw"]
    lines = sizing.endoscopy("prepare", *words).out.splitlines()
    (told,) = [line for line in lines if line.startswith("cache of")]
    size = sum(path.stat().st_size for path in Path(sizing.folder / lines[-2]).iterdir())
    assert abs(size - float(re.search(r"([\d.]+) MB", told)[1]) * 1e6) < 0.05 * size + 5e4


def test_fit_leaves_a_run_and_a_network_that_knows_its_scope(sizing):
    folder = sizing.folder / RUN
    known = set(pd.read_csv(folder / "metrics.csv").columns)
    assert {"train/loss", "val/mae_mm", "val/macro_f1", "gate/mean"} <= known
    best = torch.load(folder / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    bundle = load_bundle(folder / "weights/configured-s0")
    name, kept = next((n, v) for n, v in bundle.model.state_dict().items() if v.ndim > 1)
    assert torch.equal(kept, best[f"model.{name}"].bfloat16().float())
    assert bundle.scope.trained_on == "synthetic"
    assert bundle.scope.calibrated_for == ()  # two epochs on twelve objects beat no constant
    assert "no better than a constant" in bundle.facts["held out"]
    assert bundle.intervals == {}  # four calibration objects are too few
    assert "research only" in (folder / "weights/configured-s0/README.md").read_text().lower()


@pytest.mark.costly("an evaluation from shipped weights")
def test_evaluate_with_all_weights_builds_the_cache_that_it_reads(sizing, evaluated):
    before = read_scores(sizing)
    shutil.rmtree(sizing.folder / RUN / "cache")
    assert "missing network" not in sizing.endoscopy("evaluate").out
    after = read_scores(sizing)
    test = [[r for r in s["rows"] if not r["task"].startswith("audit")] for s in (before, after)]
    assert test[0] == test[1]


def test_evaluate_begins_with_the_baselines_and_ends_with_the_path(sizing, evaluated):
    lines = evaluated.out.splitlines()
    assert "training 1 missing network of 2: crop-s0" in lines
    (first,) = [line for line in lines if line.startswith("constant: macro F1")]
    assert "area alone" in first
    assert re.search(r"significantly (better|worse) than the constant", first)
    assert lines[-1] == str(RUN / "scores.json")
    markdown = (sizing.folder / RUN / "scores.md").read_text()
    scores = read_scores(sizing)
    assert markdown.splitlines()[2] == scores["headline"]
    assert first.startswith(scores["headline"])
    assert "| constant |" in markdown
    assert [one["name"] for one in scores["data"]] == ["synthetic"]
    schema = json.loads((ROOT / "docs/reference/scores.schema.json").read_text())
    jsonschema.validate(scores, schema)


def test_scores_are_those_of_the_predictions(sizing, evaluated):
    scores = read_scores(sizing)
    frames = pd.read_parquet(sizing.folder / RUN / "predictions.parquet")
    own = frames[(frames["task"] == "test") & (frames["variant"] == "configured")]
    assert own["unique_id"].nunique() == 12
    objects = own.groupby("unique_id").agg({"gt": "first", "predicted_mm": "median"})
    mae = (objects["predicted_mm"] - objects["gt"]).abs().mean()
    assert np.isclose(figure(scores, "configured", "mae_mm"), mae)
    assert {row["task"] for row in scores["rows"]} >= {"test", "test, frames", "agc"}
    assert figure(scores, "area", "mape") < figure(scores, "constant", "mape")
    assert figure(scores, "configured", "mape") != figure(scores, "crop", "mape")


def test_evaluate_again_trains_nothing_and_scores_the_same(sizing, evaluated):
    before = read_scores(sizing)["rows"]
    out = sizing.endoscopy("evaluate").out
    assert "missing" not in out
    assert "weights  " not in out
    assert read_scores(sizing)["rows"] == before


def test_evaluate_scores_a_checkpoint(sizing, evaluated):
    words = ["--name", "pinned", "--ckpt_path", RUN / "checkpoints/best.ckpt"]
    assert "missing" not in sizing.endoscopy("evaluate", *words).out
    pinned, kept = read_scores(sizing, "pinned"), read_scores(sizing)
    assert np.isclose(figure(pinned, "configured", "mape"), figure(kept, "configured", "mape"))


def test_variants_are_compared_in_pairs(sizing, evaluated):
    scores = read_scores(sizing)
    rows = [row for row in scores["rows"] if row.get("versus") and row["task"] == "test"]
    assert {row["method"] for row in rows} >= {"crop", "mask area + photometry"}
    assert {row["versus"] for row in rows} == {"configured"}
    for row in (row for row in rows if row["method"] == "crop"):
        gap = [figure(scores, name, row["metric"]) for name in ("crop", "configured")]
        assert np.isclose(row["value"], gap[0] - gap[1])
        assert row["low"] <= row["high"]
    assert {"macro_f1", "mape"} <= {row["metric"] for row in rows}
    assert "| crop − configured |" in (sizing.folder / RUN / "scores.md").read_text()
    metrics = {row["metric"] for row in scores["rows"]}
    assert {"macro_f1 at 4.75/10", "auroc_5mm", "quadratic_kappa"} <= metrics


def test_subgroups_are_numbers(sizing, evaluated):
    table = pd.read_parquet(sizing.folder / RUN / "subgroups.parquet")
    assert {"all", "shape", "distance_mm"} <= set(table["column"])
    everyone = table[table["column"] == "all"].iloc[0]
    assert everyone["objects"] == 12
    assert np.isclose(everyone["mape"], figure(read_scores(sizing), "configured", "mape"))


@pytest.mark.costly("all audits of a network and the studies of gates")
def test_audit_adds_its_figures_to_the_scores(sizing, audited):
    assert "training 2 missing networks of 3: shortcut-s0, depth-s0" in audited.out
    assert "making 1 missing cue: " in audited.out
    scores = read_scores(sizing)
    tasks = {row["task"] for row in scores["rows"]}
    audits = ("shortcut", "partition", "masks", "boxes", "oracle_scale", "ladder", "ladder_order")
    assert {f"audit: {name}" for name in audits} | {"test"} <= tasks
    constant = figure(scores, "constant", "mape", "audit: ladder")
    assert figure(scores, "area + metric depth", "mape", "audit: ladder") < 0.6 * constant
    sizing.endoscopy("evaluate")
    assert {row["task"] for row in read_scores(sizing)["rows"]} == tasks


@pytest.mark.costly("draws fourteen figures")
def test_report_is_one_page_that_begins_with_the_baselines(sizing, audited):
    path = sizing.endoscopy("report").out.splitlines()[-1]
    page = (sizing.folder / path).read_text()
    assert path == str(RUN / "report.html")
    assert page.index("constant: macro F1") < page.index("<h2")
    assert page.count("data:image/png;base64,") >= 8
    assert not re.findall(r"(?:src|href)=[\"'](?!data:|#)", page)
    assert "crop − configured" in page
    assert "macro_f1 at 4.75/10" in page
    assert "distance_mm" in page
    titles = ("Scores", "Agreement", "Other scores", "Subgroups", "Gates", "Audits")
    titles += ("Learning curves", "Data and settings")
    assert all(f">{title}</h2>" in page for title in titles)
    figures = {path.stem for path in (sizing.folder / RUN / "figures").glob("*.png")}
    assert figures == {path.stem for path in (sizing.folder / RUN / "figures").glob("*.csv")}
    assert {"bars", "differences", "learning-curves", "subgroups", "audits"} <= figures
    widths = [row.count("<th") for row in re.findall(r"<thead>(.*?)</thead>", page)]
    assert max(widths) <= 9  # no table is wider than the page


HONEST = ["--variants", "[plain, dual]", "--seeds", "[0, 1]", "--train_objects", "[6, 8]"]
HONEST += ["--steps", "3", "--name", "honest"]
OTHER = "configured-s0 was made with other settings .*"
SEEN = ["--ckpt_path", RUN / "checkpoints/best.ckpt", "--data.split_seed", 7, "--name", "leaking"]
REFUSED = {
    "longer": (["--trainer.max_epochs", 9], f"{OTHER}trainer.max_epochs 2, now 9.*--overwrite"),
    "another split": (["--data.split_seed", 7], f"{OTHER}data.split_seed 1, now 7.*--overwrite"),
    "no gates": (
        ["--model.model.init_args.gates", "none", "--model.gradient_routing", "off"],
        f"{OTHER}model.model.gates fsg, now none.*--overwrite",
    ),
    "quick": (["--name", "quick", "--quick", "--seeds", [0]], "no trained network of configured"),
    "no checkpoint": (["--ckpt_path", "nothing.ckpt"], "no checkpoint at nothing.ckpt"),
    "seen": (SEEN, r"trained on \d+ of 12 test objects"),
    "trials": ([*HONEST, "--trials", '{"plain": [{"learning_rate": 1e-3}]}'], "as many trials"),
}


def test_what_cannot_be_evaluated_is_refused(sizing, evaluated, faulty_inputs):
    table = {
        name: (("endoscopy", "evaluate", "--config", "unit", *words), said)
        for name, (words, said) in REFUSED.items()
    }
    faulty_inputs(table, run=sizing, folder=sizing.folder)


@pytest.mark.slow
def test_the_honest_table_runs_only_what_is_missing(sizing):
    rates = [{"learning_rate": rate} for rate in (1e-3, 1e-2)]
    trials = dict.fromkeys(("plain", "dual"), rates)
    words = [*HONEST, "--trials", json.dumps(trials), "--trial_objects", "6"]
    first = sizing.endoscopy("evaluate", *words).out
    assert "running 4 missing trials: plain-trial0-s100" in first
    assert "8 missing runs: " in first
    folder = sizing.folder / "runs/endoscopy/honest"
    runs = sorted(path.name for path in (folder / "runs").iterdir())
    assert (runs[0], len(runs)) == ("baselines-n6-s0", 8 + 4)
    before = read_scores(sizing, "honest")["rows"]
    shutil.rmtree(folder / "runs" / "plain-n8-s1")
    kept = (folder / "runs" / "dual-n6-s0" / "result.parquet").stat().st_mtime_ns
    again = sizing.endoscopy("evaluate", *words).out
    assert "1 missing run of 8: plain-n8-s1" in again
    assert "trials" not in again
    assert (folder / "runs" / "dual-n6-s0" / "result.parquet").stat().st_mtime_ns == kept
    assert read_scores(sizing, "honest")["rows"] == before
    table = pd.read_parquet(folder / "honest.parquet")
    assert (set(table["train_objects"]), set(table["seeds"])) == ({6, 8}, {2})
    _check_honest_report(sizing, folder, again)
    assert "trainer.max_steps 3, now 5" in sizing.refuse(
        "endoscopy", "evaluate", "--config", "unit", *words, "--steps", "5"
    )
    words = [*words, "--steps", "5", "--overwrite", "--train_objects", "[6]"]
    assert "4 missing runs: " in sizing.endoscopy("evaluate", *words).out
    assert "5 optimizer steps" in (folder / "scores.md").read_text()


def _check_honest_report(sizing, folder, printed):
    """Baselines are in the headline and at every size, the chosen settings on the page."""
    scores = read_scores(sizing, "honest")
    for task in ("6 objects", "8 objects"):
        assert figure(scores, "area", "mape", task) != figure(scores, "constant", "mape", task)
    for part in ("constant: macro F1", "area alone: macro F1", "the plain network is"):
        assert part in scores["headline"]
    assert scores["headline"] in printed
    path = sizing.endoscopy("report", "--name", "honest").out.splitlines()[-1]
    text = (sizing.folder / path).read_text()
    assert text.index("constant: macro F1") < text.index("<h2")
    assert ">Tuning</h2>" in text
    assert (folder / "figures/trials.csv").is_file()
    assert "dual − plain" in text


def test_a_report_begins_with_the_baselines_or_is_refused(sizing):
    sizing.endoscopy("audit", "--name", "audited", "--study", "ladder")
    assert "run `gates endoscopy evaluate` first" in sizing.refuse(
        "endoscopy", "report", "--config", "unit", "--name", "audited"
    )


@pytest.fixture(scope="module")
def real_layouts(sizing):
    """Fake colonoscopies in the layouts of REAL-Colon and SUN, and three folds of each."""
    for name, read in {"real_colon": read_real_colon, "sun": read_sun}.items():
        make = runpy.run_path(str(ROOT / "tests" / "data" / name / "make.py"))
        make["official"](sizing.folder / "data" / name)
        objects = read(sizing.folder / "data" / name)[0].objects
        folds = objects["patient"].factorize()[0] % 3 if name == "real_colon" else range(3)
        table = pd.DataFrame({"unique_id": objects["unique_id"]})
        table["kfold_id"] = [folds[row % len(folds)] for row in range(len(table))]
        table.to_csv(sizing.folder / "data" / f"{name}_folds.csv", index=False)
    make = runpy.run_path(str(ROOT / "tests" / "data" / "real_colon" / "make.py"))
    make["official"](sizing.folder / "data" / "with_depths", targets=True)
    frames = read_real_colon(sizing.folder / RUN / "rendered")[0].frames
    frames["frame_path"] = frames["frame_path"].str.replace("$SYNTHETIC_PATH", "rendered")
    (sizing.folder / "data" / "rendered").symlink_to(sizing.folder / RUN / "rendered")
    frames[[*REQUIRED, "patient"]].to_csv(sizing.folder / "data" / "frames.csv", index=False)


@pytest.mark.fault("endoscopy C13")
def test_audits_that_the_data_cannot_support_are_left_out_before_training(sizing, real_layouts):
    words = ["--name", "real", "--data.synthetic", "null", "--data.real_colon", "data/real_colon"]
    words += ["--data.split", "file", "--data.split_file", "data/real_colon_folds.csv"]
    words += ["--trainer.max_epochs", 1, "--data.batch_size", 2]
    lines = sizing.endoscopy("audit", *words).out.splitlines()
    left_out = [line.split()[0] for line in lines[:4]]
    assert left_out == ["shortcut", "masks", "oracle_scale", "ladder"]
    assert all(" left out: it needs " in line for line in lines[:4])
    assert "training 1 missing network: configured-f0-s0" in lines
    assert sum("training starts from random weights" in line for line in lines) == 1
    assert {row["task"] for row in read_scores(sizing, "real")["rows"]} == {"audit: boxes"}
    line = sizing.refuse(
        "endoscopy", "audit", "--config", "unit", *words, "--study", "oracle_scale"
    )
    assert "--study oracle_scale needs a mask of every frame: fill mask_path" in line


def test_a_table_of_frames_is_enough(sizing, real_layouts):
    words = ["--data.table", "data/frames.csv", "--name", "own", "--data.size", 32]
    out = sizing.endoscopy("prepare", *words, config="table").out
    assert "64 frames of 32 objects" in out
    assert "split 5 folds of patients, made with seed 1: " in out
    assert Path(pd.read_parquet(sizing.folder / out.splitlines()[-1])["frame_path"][0]).is_file()
    frames = pd.read_csv(sizing.folder / "data/frames.csv", dtype=str)
    frames.loc[:1, "frame_path"] = "nowhere.jpg"
    frames.to_csv(sizing.folder / "data/gone.csv", index=False)
    words[1] = "data/gone.csv"
    data = sizing.folder / "data"
    expected = f"{data}/nowhere.jpg (image does not exist; relative paths begin in {data})"
    assert expected in sizing.refuse("endoscopy", "prepare", "--config", "table", *words)


@pytest.mark.costly("networks at their real size")
@pytest.mark.fault("endoscopy A5")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_trains_a_step(path, sizing, real_layouts):
    words = ["--name", f"step-{path.stem}", "--trainer.max_epochs", 1, "--data.batch_size", 2]
    words += ["--trainer.limit_train_batches", 1, "--trainer.limit_val_batches", 1]
    words += ["--trainer.check_val_every_n_epoch", 1, "--trainer.precision", "32-true"]
    words += ["--data.num_workers", 0, "--data.cache_folder", f"small/{path.stem}-cache"]
    words += ["--data.eval_frames_per_object", 1, "--data.frames_per_object", 1]
    if "synthetic:" in path.read_text():
        for part, count in {"train": 2, "validation": 1, "test": 1, "calibration": 1}.items():
            words += [f"--data.{part}_objects", count]
        words += ["--data.synthetic", f"small/{path.stem}", "--rendering.frames", 1]
    elif path.stem != "table":
        source = "sun" if path.stem == "sun" else "real_colon"
        words += ["--data.split", "file", "--data.split_file", f"data/{source}_folds.csv"]
    if "fsg_resnet18" in path.read_text():
        words += ["--data.size", 96]
    if path.stem == "resnet_depth":
        words += ["--data.real_colon", "data/with_depths"]
    sizing.endoscopy("fit", *words, config=path.stem)
    weights = sizing.folder / f"runs/endoscopy/step-{path.stem}/weights"
    name = "configured-s0" if "split: counts" in path.read_text() else "configured-f0-s0"
    scope = load_bundle(weights / name).scope
    assert scope.trained_on
    assert scope.calibrated_for == ()  # one step earns no millimeters


@pytest.mark.slow
def test_killed_trainings_end_like_unbroken_ones(sizing, kill_and_resume, monkeypatch):
    monkeypatch.chdir(sizing.folder)
    command = ["endoscopy", "fit", "--config", "unit"]
    command += ["--trainer.max_epochs", "6"]
    folder = kill_and_resume(command, app="endoscopy", rows=[4, 11])
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert len(state["optimizer_states"]) == 2


FOLDS = ["--data.split", "made", "--data.num_folds", 4, "--data.level", "object"]
OTHER_FIT = {
    "fold": (["--data.fold", 2], "data.fold 0, now 2"),
    "seed": (["--seed_everything", 1], "seed 0, now 1"),
    "rate": (["--model.learning_rate", 0.5], "model.learning_rate 0.003, now 0.5"),
    "look": (["--rendering.brand", "B"], "rendering.brand A, now B"),
}


@pytest.fixture(scope="module")
def folded(sizing):
    """A training of fold 0 of rendered objects."""
    words = [*FOLDS, "--name", "folded", "--trainer.max_epochs", 1]
    sizing.endoscopy("fit", *words)
    return words


@pytest.mark.fault("endoscopy A1")
@pytest.mark.parametrize("case", OTHER_FIT)
def test_a_training_is_not_resumed_as_another_one(case, sizing, folded):
    """``fit --data.fold 2 --resume`` once wrote the network of fold 0 as that of fold 2."""
    words, told = OTHER_FIT[case]
    folder = sizing.folder / "runs/endoscopy/folded"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    line = sizing.refuse("endoscopy", "fit", "--config", "unit", *folded, *words, "--resume")
    assert told in line
    assert "--name NEW" in line
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert [path.name for path in (folder / "weights").iterdir()] == ["configured-f0-s0"]


KILLED = """
import os, sys
from apps.main import main
from endoscopy.training.sizing_module import SizingModule
step, seen = SizingModule.training_step, []
def killed(self, batch, batch_idx):
    seen.append(1)
    if len(seen) > int(sys.argv[1]):
        os.kill(os.getpid(), 9)
    step(self, batch, batch_idx)
SizingModule.training_step = killed
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.costly("an evaluation that is killed twice")
@pytest.mark.fault("endoscopy C12")
def test_an_evaluation_killed_inside_a_training_ends_with_the_same_bits(
    sizing, evaluated, forked, monkeypatch
):
    monkeypatch.chdir(sizing.folder)
    Path("killed.py").write_text(KILLED)
    words = ["endoscopy", "evaluate", "--config", "unit", "--name", "killed", "--variants"]
    words += ["[crop]", "--shifts", "[]"]
    for steps, code in ((3, -9), (99, 0)):
        process = forked.Forked(["killed.py", str(steps), *words])
        said = process.communicate(120)[1].decode()
        assert process.returncode == code, said
        assert "missing rendered set" not in said
    one, two = (
        load_bundle(f"runs/endoscopy/{name}/weights/crop-s0").model.state_dict()
        for name in ("unit", "killed")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [path.name for path in Path("runs/endoscopy/killed/weights").iterdir()] == ["crop-s0"]
