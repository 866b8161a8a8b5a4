"""``gates video tune``, ``evaluate`` and ``report`` on a small feed."""

import json
import random
import re
import shutil
from pathlib import Path

import jsonschema
import polars as pl
import pytest

ROOT = Path(__file__).parents[2]
BASE = "data.source.init_args"


@pytest.fixture(scope="module")
def scores(feed):
    return json.loads((feed.folder / "runs/video/small/scores.json").read_text())


def value(scores, method, metric="summed log_loss", task="test"):
    (found,) = [
        row["value"]
        for row in scores["rows"]
        if (row["method"], row["metric"], row["task"]) == (method, metric, task)
        and not row["versus"]
    ]
    return found


def test_evaluate_writes_scores_with_bars(feed, scores):
    schema = json.loads((ROOT / "docs/reference/scores.schema.json").read_text())
    jsonschema.validate(scores, schema)
    assert {row["method"] for row in scores["rows"]} >= {"home", "mmoe", "duration", "oracle"}
    for method in ("home", "mmoe", "duration"):
        assert value(scores, "oracle") < value(scores, method)
    names = [bar["name"] for bar in scores["bars"]]
    assert names == [
        "summed log-loss of mmoe − home, lower end",
        "lowest summed log-loss of a method − that of the oracle",
    ]
    assert scores["seeds"] == [0, 1]
    text = (feed.folder / "runs/video/small/scores.md").read_text()
    assert text.startswith("# video: small\n")
    assert "simulated: 40 users, 60 videos, 6 days" in text


def test_a_second_call_finds_everything(feed, scores):
    weights = {p: p.stat().st_mtime_ns for p in feed.folder.rglob("result.*")}
    for verb in ("tune", "evaluate"):
        assert "missing" not in feed.video(verb).out
    assert {p: p.stat().st_mtime_ns for p in feed.folder.rglob("result.*")} == weights
    again = json.loads((feed.folder / "runs/video/small/scores.json").read_text())
    assert again["rows"] == scores["rows"]


def test_tuning_alone_trains_no_network(gates_in, small_feed, tmp_path):
    small_feed(tmp_path)
    words = ("tune", "--only", "[mmoe]", "--contest.trials", 1)
    out = gates_in(tmp_path).video(*words).out
    assert "running 1 missing trial: mmoe-trial0-s100" in out
    again = gates_in(tmp_path).video(*words).out
    assert "missing" not in again
    for said in (out, again):
        assert re.search(r"│ mmoe +│ model.learning_rate 0\.\d+ +│ +\d[\d.]+ │ +1 │", said)
    nothing = gates_in(tmp_path).video("tune", "--contest.space", "{}").out
    assert nothing == "nothing to choose: no method has settings that are searched\n"
    run = tmp_path / "runs/video/small"
    assert {path.name for path in run.iterdir()} == {"trials", "choices"}
    assert [path.name for path in (run / "choices").iterdir()] == ["mmoe-s100"]


def test_other_settings_are_refused_or_replace(feed, faulty_inputs):
    more = ("video", "evaluate", "--config", "small", "--model.learning_rate", "0.1")
    faulty_inputs(
        {
            "other": (more, "choices/home-s100 was made with other settings .*learning_rate"),
            "quick": ((*more, "--quick"), "holds a full evaluation, which a quick run would"),
        },
        run=feed,
        folder=feed.folder,
    )


@pytest.mark.costly("draws eleven figures")
def test_the_report_is_one_page_without_network(feed, scores):
    path = feed.folder / feed.video("report").out.splitlines()[-1]
    page = path.read_text()
    assert path.name == "report.html"
    sections = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
    assert sections == [
        "Scores", "Calibration", "One user's list", "Experts", "Fields", "Learning curves",
        "Tuning", "Data and settings",
    ]  # fmt: skip
    assert page.count("data:image/png;base64,") >= 8
    assert not re.findall(r"(?:src|href)=[\"'](?!data:|#)", page)
    assert len(pl.read_csv(feed.folder / "runs/video/small/figures/ranked-list.csv")) > 10
    assert "product of the predicted probabilities of effective_view" in page
    assert not re.search(r"product of the predicted probabilities of [^.;]*skip", page)
    fields = pl.read_csv(feed.folder / "runs/video/small/figures/importance.csv")
    assert "duration_ms" in str(fields.to_dicts())


def test_a_report_before_an_evaluation_says_what_to_do(gates_in, small_feed, tmp_path):
    small_feed(tmp_path)
    gates = gates_in(tmp_path)
    assert "scores.json does not exist: run `gates video evaluate` first" in gates.refuse(
        "video", "report", "--config", "small"
    )
    gates.video("evaluate", "--quick")
    for _ in range(2):
        gates.video("report")
    page = (tmp_path / "runs/video/small/report.html").read_text()
    assert "No network of this run is trained yet: run <code>evaluate</code> first." in page


@pytest.mark.slow
def test_the_report_of_folds_draws_the_first(gates_in, small_feed, tmp_path):
    path = small_feed(tmp_path)
    folds = f"folds: [3, 4], fold_setting: {BASE}.seed"
    text = re.sub(r"\nevaluate:.*", "", path.read_text(), flags=re.DOTALL)
    path.write_text(f"{text}\nevaluate: {{seeds: [0], {folds}}}\nreport: {{{folds}}}\n")
    gates = gates_in(tmp_path)
    gates.video("evaluate", "--contest.trials", 1)
    names = {p.name for p in (tmp_path / "runs/video/small/weights").iterdir()}
    assert names == {f"{m}-f{f}-s0" for m in ("home", "mmoe") for f in (3, 4)}
    gates.video("report", "--contest.trials", 1)
    page = (tmp_path / "runs/video/small/report.html").read_text()
    assert "Calibration" in page
    assert "is trained yet" not in page


@pytest.mark.slow
def test_a_killed_evaluation_ends_with_the_same_bits(small_feed, kill_and_resume, tmp_path):
    """Killed inside a piece and between two of them."""
    seed = next(s for s in range(99) if sorted(random.Random(s).sample(range(1, 7), 2)) == [1, 4])
    command = ["video", "evaluate", "--config", str(small_feed(tmp_path, epochs=2))]
    command += ["--seeds", "[0]", "--contest.trials", "1"]
    globs = ["weights/*/*", "trials/*/*", "choices/*/*", "baselines/*/*", "scores.json"]
    folder = kill_and_resume(command, app="video", seed=seed, compare=globs)
    assert len(list(folder.glob("*/*/record.json"))) == 7


def test_only_and_folders_of_other_machines(feed, gates_in, tmp_path):
    """A run folder that was moved is the same; methods that are left out stay as they were."""
    shutil.copytree(feed.folder, tmp_path / "moved")
    gates = gates_in(tmp_path / "moved")
    full = (tmp_path / "moved/runs/video/small/scores.json").read_bytes()
    some = ("video", "evaluate", "--config", "small", "--only", "[mmoe, duration]")
    for words in (some, (*some[:4], "--seeds", "0")):
        assert "holds a full evaluation, which one of " in gates.refuse(*words)
        assert (tmp_path / "moved/runs/video/small/scores.json").read_bytes() == full
    gates.succeed(*some, "--overwrite")
    out = gates.succeed(*some).out  # no full evaluation any more
    assert "missing" not in out
    found = json.loads((tmp_path / "moved/runs/video/small/scores.json").read_text())
    assert ({row["method"] for row in found["rows"]}, found["bars"]) == ({"mmoe", "duration"}, [])
    assert "--only names 'mmo'; known are home, mmoe, duration" in gates.refuse(
        "video", "evaluate", "--config", "small", "--only", "[mmo]"
    )
