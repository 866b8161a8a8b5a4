"""``gates weather tune``, ``evaluate`` and ``report`` on the unit configuration."""

import json
import re
from pathlib import Path

import jsonschema
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def evaluated(gates):
    return gates.weather("evaluate", "--quick")


@pytest.fixture(scope="module")
def scores(gates, evaluated):
    return json.loads((gates.folder / "runs/weather/unit/scores.json").read_text())


def figure(scores, method, metric, task="0.1/perfect"):
    (row,) = [
        row
        for row in scores["rows"]
        if (row["method"], row["metric"], row["task"]) == (method, metric, task)
        and not row["versus"]
    ]
    return row["value"]


TUNED = ["--cycles", 6, "--densities", "[0.1]", "--trials", 1, "--trial_steps", 2]


def choices(gates, name):
    folder = gates.folder / "runs/weather" / name / "choices"
    return {p.parent.name: json.loads(p.read_text()) for p in folder.glob("*/result.json")}


@pytest.mark.slow
def test_tune_keeps_a_choice_of_every_method(gates):
    result = gates.weather("tune", "--name", "tuned", *TUNED)
    found = choices(gates, "tuned")
    assert set(found["letkf-task-0.1_error-s0"]["setting"]) == {"length_km", "excess", "relaxation"}
    assert {"adas_increment-s0", "ungated-s0"} <= set(found)
    assert {len(choice["trials"]) for choice in found.values()} == {1}
    lines = result.out.splitlines()
    assert lines[-1] == "runs/weather/tuned/choices"
    assert any(line.startswith("oi@0.1/perfect  scale 0.") for line in lines)


def test_an_interrupted_tuning_goes_on(gates, monkeypatch):
    words = ["--name", "broken", *TUNED, "--only", "[oi, ungated]"]
    begun = []

    def interrupted(self, piece, *_, **__):
        begun.append(piece.name)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("apps.weather.networks.Training.fit", interrupted)
        assert gates("weather", "tune", "--config", "unit", *words).code == 130
    assert begun == ["ungated-trial0-s0"]
    before = choices(gates, "broken")
    assert set(before) == {"oi-task-0.1_error-s0", "oi-task-0.1_perfect-s0"}
    out = gates.weather("tune", *words).out
    assert "running 1 missing trial: ungated-trial0-s0" in out
    assert "oi-task" not in out
    assert before.items() < choices(gates, "broken").items()


def test_evaluate_writes_scores_and_prints_their_path_last(gates, evaluated, scores):
    schema = json.loads((ROOT / "docs/reference/scores.schema.json").read_text())
    jsonschema.validate(scores, schema)
    assert evaluated.out.splitlines()[-1] == "runs/weather/unit/scores.json"
    assert "leaving out 1 missing network of 2: ungated-s0" in evaluated.out
    assert "of `fit`, with the optimizer of the configuration: adas_increment" in evaluated.out
    assert "never tuned: inverse_distance@0.1/perfect, " in evaluated.out
    assert scores["bars"] == []
    assert "adas_increment" in {row["method"] for row in scores["rows"]}
    missing = {row["method"]: row for row in scores["rows"] if "note" in row}
    assert set(missing) == {"ungated"}
    assert missing["ungated"]["value"] is None
    assert missing["ungated"]["note"] == (
        "seed 0 is not trained: run `gates weather fit --config unit --seed_everything 0 "
        "--data.source.init_args.seed 0 --model.network.gated false`"
    )
    assert f"ungated: {missing['ungated']['note']}" in evaluated.out
    assert {row["task"] for row in scores["rows"]} == {"0.1/perfect", "0.1/error"}
    text = (gates.folder / "runs/weather/unit/scores.md").read_text()
    assert text.startswith("# weather: unit\n\nrmse_h on 0.1/perfect: adas_increment ")
    assert "\n\n## 0.1/perfect\n\n| method | rmse_h |" in text
    assert scores["notes"] == text.split("\n\n")[2:5]
    assert scores["quick"]
    (data,) = scores["data"]
    assert data["name"] == "nature.zarr"


def test_assimilation_helps_in_state_and_in_observation_space(scores):
    assert figure(scores, "letkf", "rmse_h") < 0.5 * figure(scores, "free_run", "rmse_h")
    for metric in ("ob_rms_h", "oa_rms_h", "withheld_rmse_h"):
        assert figure(scores, "letkf", metric) < figure(scores, "free_run", metric)
    assert figure(scores, "letkf", "oa_rms_h") < figure(scores, "letkf", "ob_rms_h")
    # What is withheld is farther from the analysis than what was assimilated.
    assert figure(scores, "letkf", "oa_rms_h") < figure(scores, "letkf", "withheld_rmse_h")
    assert figure(scores, "free_run", "ob_rms_h") == figure(scores, "free_run", "oa_rms_h")


@pytest.mark.costly("tunes, trains and scores all methods of a configuration")
def test_evaluate_makes_what_is_missing_and_nothing_twice(gates):
    words = ["--name", "whole", "--data.steps", 2, "--data.source.init_args.recorded_steps", 1]
    words += ["--data.validation_steps", 1, "--tuning.trial_steps", 2, "--tuning.cycles", 6]
    words += ["--trainer.val_check_interval", 1, "--train", "true"]
    words += ["--only", "[adas_increment, ungated, oi]"]
    result = gates.weather("evaluate", *words)
    assert "running 2 missing trials: adas_increment-trial0-s0, " in result.out
    assert "training 2 missing networks: adas_increment-s0, ungated-s0" in result.out
    scores = json.loads((gates.folder / "runs/weather/whole/scores.json").read_text())
    assert {row["method"] for row in scores["rows"]} >= {"adas_increment", "ungated", "oi"}
    assert {row["task"] for row in scores["rows"]} == {"0.1/perfect", "0.1/error"}
    assert scores["bars"] == []
    assert "missing" not in gates.weather("evaluate", *words).out
    scores_again = json.loads((gates.folder / "runs/weather/whole/scores.json").read_text())
    assert scores_again["rows"] == scores["rows"]
    assert "missing" not in gates.weather("evaluate", *words, "--only", "[oi]", "--overwrite").out
    some = json.loads((gates.folder / "runs/weather/whole/scores.json").read_text())
    assert ({row["method"] for row in some["rows"]}, some["bars"]) == ({"oi", "free_run"}, [])
    for row in some["rows"]:
        assert row in scores["rows"]


KILLED = """
import os, signal, sys
from pathlib import Path
from weather.experiments.twin.twin_scores import TwinScores
from weather.training.adas_module import AdasModule
from apps.main import main

place, number, *words = sys.argv[1:]
calls = 0

def dying(function, here):
    def call(*args, **kwargs):
        global calls
        if here == place:
            calls += 1
            if calls > int(number):
                os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

AdasModule.training_step = dying(AdasModule.training_step, "step")
TwinScores.compute = dying(TwinScores.compute, "cycles")
main(words)
"""


@pytest.mark.slow
def test_an_evaluation_killed_between_and_inside_pieces_ends_with_the_same_bits(
    gates, forked, monkeypatch
):
    words = ["--only", "[ungated, oi]", "--seeds", "[0]", "--data.steps", 8, "--train", "true"]
    words += ["--tuning.trial_steps", 2, "--tuning.cycles", 6]
    gates.weather("evaluate", *words, "--name", "unbroken")
    monkeypatch.chdir(gates.folder)
    Path("killed.py").write_text(KILLED)
    for place, number in (("step", 7), ("cycles", 2)):  # 2 steps of the trial, 5 of the training
        command = ["killed.py", place, str(number), "weather", "evaluate", "--config", "unit"]
        process = forked.Forked([*command, *map(str, words), "--name", "killed"])
        said = process.communicate(120)[1].decode()
        assert process.returncode == -9, said[-2000:]
    killed = gates.folder / "runs/weather/killed"
    assert len(list(killed.glob("cycles/[!.]*/record.json"))) == 2
    out = gates.weather("evaluate", *words, "--name", "killed").out
    assert "making 4 missing cycles of 6: " in out
    assert "weights" not in out
    whole = gates.folder / "runs/weather/unbroken"
    assert contents(whole) == contents(killed)
    assert len(contents(whole)) > 20


def contents(folder):
    """Results, and their records but for what differs from call to call."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.name in ("record.json", "scores.json"):
            record = json.loads(path.read_text())
            for field in ("seconds", "revision", "command", "git"):
                record.pop(field, None)
            found[name] = record
        elif path.is_file() and path.suffix != ".md":  # which names the run
            found[name] = path.read_bytes()
    return found


@pytest.mark.slow
def test_evaluate_scores_a_checkpoint_in_place_of_the_networks(gates):
    weights = "runs/weather/unit/weights/adas_increment-s0/weights.safetensors"
    words = ["--name", "pinned", "--quick", "--ckpt_path"]
    assert "missing network" not in gates.weather("evaluate", *words, weights).out
    scores = json.loads((gates.folder / "runs/weather/pinned/scores.json").read_text())
    methods = {row["method"] for row in scores["rows"]}
    assert "adas_increment" in methods
    assert not methods & {"adas_official", "ungated"}
    assert scores["bars"] == []
    assert "no checkpoint at nothing.ckpt" in gates.refuse(
        "weather", "evaluate", "--config", "unit", *words, "nothing.ckpt"
    )


def test_report_is_one_page_without_network(gates, evaluated):
    path = gates.weather("report").out.splitlines()[-1]
    page = (gates.folder / path).read_text()
    assert "ungated: seed 0 is not trained: run <code>gates weather fit --config unit " in page
    assert path == "runs/weather/unit/report.html"
    assert page.count("data:image/png;base64,") >= 3
    assert not re.findall(r"(?:src|href)=[\"'](?!data:|#)", page)
    assert "letkf" in page
    sections = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
    assert sections[:3] == ["Scores", "What the metrics mean", "Departures from the observations"]
    assert sections[3:] == ["Analyses", "Gates", "Learning curves", "Data and settings"]
    assert "network.stages.0.conv" in page


@pytest.mark.slow
def test_the_ensemble_tasks_are_scored_and_drawn(gates):
    words = ["--quick", "--seeds", "[99]", "--densities", "[0.01]", "--name", "real"]
    out = gates.weather("evaluate", *words, config="era5_ensemble").out
    assert out.splitlines()[-1] == "runs/weather/real/scores.json"
    scores = json.loads((gates.folder / "runs/weather/real/scores.json").read_text())
    assert {row["task"] for row in scores["rows"]} == {"persistence/0.01", "ensemble/0.01"}
    task = "persistence/0.01"
    assert figure(scores, "background", "ratio_z500", task) == 1
    assert figure(scores, "oi", "rmse_z500", task) < figure(scores, "background", "rmse_z500", task)
    assert figure(scores, "oi", "oa_rms_z500", task) < figure(scores, "oi", "ob_rms_z500", task)
    gates.weather("report", "--name", "real", config="era5_ensemble")
    page = (gates.folder / "runs/weather/real/report.html").read_text()
    assert "member 9 is the truth" in page
    assert "geopotential in m² s⁻²" in page
