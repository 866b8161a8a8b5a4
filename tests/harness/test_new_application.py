"""The application of ``docs/develop/new_application.md``, taken from the page and run."""

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from apps.main import APPS, App, main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "develop" / "new_application.md").read_text()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
VERBS = dict.fromkeys(("fit", "tune", "evaluate", "report"), "a verb")
TABLE = {
    "digits": App("digits_page.commands", "digits", VERBS, stop="digits_page.commands:tour"),
    "tour": APPS["tour"],
}
FAST = ("--trainer.max_epochs", "1", "--trainer.accelerator", "cpu")
QUIET = ("--trainer.enable_model_summary", "false", "--trainer.enable_progress_bar", "false")
SMALL = ("--seeds", "0,1", "--trials", "2", *FAST)


def block():
    (code,) = (body for language, body in FENCE.findall(PAGE) if language == "python")
    return code


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder, with the package of the page on the path."""
    folder = tmp_path_factory.mktemp("digits")
    package = folder / "package" / "digits_page"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "commands.py").write_text(block())
    sys.path.insert(0, str(package.parent))
    yield folder
    sys.path.remove(str(package.parent))  # its modules stay: parsers look up every subclass


@pytest.fixture(scope="module")
def gates(folder):
    """Run words of a command line in the folder: exit code, output, errors."""

    def run(*words):
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.chdir(folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                code = main([*words], TABLE)
            except SystemExit as leave:
                code = int(leave.code or 0)
        return code, out.getvalue(), err.getvalue()

    return run


@pytest.fixture(scope="module")
def run_folder(folder, gates):
    """The run after ``fit`` and ``evaluate``."""
    code, out, err = gates("digits", "fit", *FAST, *QUIET)
    assert code == 0, err
    assert out.splitlines()[-1] == "runs/digits/default/weights/fit-s0"
    code, out, err = gates("digits", "evaluate", *SMALL)
    assert code == 0, err
    for said in (
        "running 4 missing trials:",
        "training 4 missing networks:",
        "− switch",
        "bars met",
    ):
        assert said in out, out
    assert out.splitlines()[-1] == "runs/digits/default/scores.json"
    return folder / "runs" / "digits" / "default"


def test_it_is_as_short_and_tidy_as_the_page_says():
    code = block()
    assert len(code.splitlines()) <= 140
    words = ["--config", "pyproject.toml", "--stdin-filename", "apps/digits/commands.py", "-"]
    for verb in (["check"], ["format", "--diff"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *verb, *words],
            input=code, cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_missing_is_made_once(gates, run_folder):
    code, out, _ = gates("digits", "evaluate", *SMALL)
    assert code == 0
    assert "missing" not in out
    kinds = {path.parent.name for path in run_folder.glob("*/*") if path.is_dir()}
    assert {"trials", "choices", "weights"} <= kinds
    assert len(list(run_folder.glob("weights/*/record.json"))) == 5


def test_its_scores_fit_the_schema_and_name_their_data(run_folder):
    schema = json.loads((ROOT / "docs/reference/scores.schema.json").read_text())
    scores = json.loads((run_folder / "scores.json").read_text())
    jsonschema.validate(scores, schema)
    assert [(row["method"], row["versus"]) for row in scores["rows"]] == [
        ("switch", None), ("top2", None), ("top2", "switch"),
    ]  # fmt: skip
    assert all(row["value"] > 0.5 for row in scores["rows"][:2])
    assert scores["rows"][2]["p"] is not None
    assert [bar["met"] for bar in scores["bars"]] == [
        bar["value"] >= 0.85 for bar in scores["bars"]
    ]
    assert (scores["seeds"], [one["name"] for one in scores["data"]]) == ([0, 1], ["digits"])


def test_what_is_refused_is_one_line(gates, run_folder, faulty_inputs, folder):
    fit, evaluate = ("digits", "fit", *FAST), ("digits", "evaluate", *SMALL)
    lr = "--model.learning_rate"
    faulty_inputs(
        {
            "another training": (fit, "run folder runs/digits/default exists: add --resume"),
            "another seed": ((*fit, "--resume", "--seed_everything", "1"), "seed 0, now 1"),
            "another rate": ((*fit, "--resume", lr, "0.5"), f"{lr[2:]} 0.01, now 0.5"),
            "other trials": ((*evaluate, "--trials", "3"), "trials 2, now 3"),
            "a quick run": ((*evaluate, "--quick"), "holds a full evaluation"),
            "some methods": (
                (*evaluate, "--only", "top2"),
                "which one of top2 alone would replace",
            ),
            "fewer seeds": ((*evaluate, "--seeds", "0"), "one of 1 instead of 2 seeds would"),
            "no epochs": (("digits", "fit", FAST[0], "x"), "expected int"),
        },
        run=gates,
        folder=folder,
    )


def test_a_longer_training_goes_on(gates, run_folder):
    before = (run_folder / "metrics.csv").read_text()
    words = ("--resume", *FAST, *QUIET, "--trainer.max_epochs", "2")
    code, _, err = gates("digits", "fit", *words)
    assert code == 0, err
    after = (run_folder / "metrics.csv").read_text()
    assert after.startswith(before)
    assert len(after) > len(before)


def test_a_short_look_trains_nothing_and_has_no_bars(gates, run_folder):
    full = (run_folder / "scores.json").read_bytes()
    (run_folder / "scores.json").unlink()
    code, _, err = gates("digits", "evaluate", *SMALL, "--quick", "--seeds", "0,1,2")
    assert code == 0, err
    scores = json.loads((run_folder / "scores.json").read_text())
    assert scores["quick"]
    assert scores["bars"] == []
    assert not (run_folder / "weights" / "top2-s2").exists()
    (run_folder / "scores.json").write_bytes(full)
    code, _, err = gates("digits", "evaluate", "--quick", "--name", "other")
    assert code == 2
    assert err.endswith("a quick run trains nothing: leave out --quick\n")


def test_the_report_shows_everything(gates, run_folder):
    code, out, err = gates("digits", "report", *FAST)
    assert code == 0, err
    assert out.splitlines()[-1] == "runs/digits/default/report.html"
    page = (run_folder / "report.html").read_text()
    sections = re.findall(r'<h2 id="s\d+">(.*?)</h2>', page)
    assert sections == ["Scores", "Learning curves", "Tuning", "Data and settings"]
    names = ("bars", "differences", "learning-curves", "trials")
    shown = PAGE.split("ls runs/digits/default/figures")[1].split("```")[0]
    for name in (f"{name}.{kind}" for name in names for kind in ("csv", "png")):
        assert (run_folder / "figures" / name).stat().st_size > 20
        assert name in shown


def test_the_tour_stops_there(gates, folder):
    code, out, err = gates("tour", "--only", "digits")
    assert code == 0, err
    assert "of 397 images" in out
    assert "One seed shows no difference." in (folder / "runs/tour/report.html").read_text()


def test_the_commands_of_the_page_exist(gates):
    found = [line.split() for line in re.findall(r"^\$ gates (digits .*)$", PAGE, re.MULTILINE)]
    assert {words[1] for words in found} == set(VERBS)
    for verb in VERBS:
        known = gates("digits", verb, "--help")[1]
        known += gates("digits", verb, "--help.trainer")[1]
        given = {word for words in found if words[1] == verb for word in words if word[:2] == "--"}
        assert given <= set(re.findall(r"--[\w.]+", known)), verb
