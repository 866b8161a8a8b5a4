"""The page of a run is made of what its folder holds."""

import csv
import html
import json
import re

import pytest
import torch
from matplotlib.figure import Figure

from core_gates.errors import GatesError
from harness.evidence import Bar, Row
from harness.experiment import Arrays, Run
from harness.files import Data
from harness.report.sections import found_choices, run_page

ROWS = [
    Row("a", "noon", "mse", 2.0, 1.5, 2.5, 9),
    Row("b", "noon", "mse", 1.0, 0.5, 1.5, 9),
    Row("b", "noon", "mse", -1.0, -1.5, -0.5, 9, "a", 0.01),
    Row("b", "noon", "bias", -0.1, -0.2, 0.1, 9, "a", 0.4),
]
CURVES = "epoch,step,train/loss,val/loss\n0,0,3.0,\n0,1,2.0,2.5\n"


def bowl(piece, job):
    return {"score": (piece["rate"] - 0.5) ** 2}


@pytest.fixture
def run(tmp_path):
    """A run with scores, a training's log, a tuning and weights."""
    run = Run(tmp_path / "runs/toy/one", app="toy", settings={"model.dim": 8})
    run.finish(
        ROWS,
        [Bar("error of b", 1.0, "<=", 2.0, "K")],
        seeds=[3, 4],
        headline="B wins.",
        data=[Data("set", "test", "ab" * 32, 7, "objects")],
        notes=["Mind the *gap*."],
    )
    spaces = {"a": {"rate": (0.1, 0.3)}, "b": [{"rate": rate} for rate in (0.1, 0.5, 0.9)]}
    run.tune(spaces, bowl, trials=3)
    run.store("weights", Arrays()).keep(run.piece("a", 3, extra="yes"), {"w": torch.ones(1)})
    (run.folder / "metrics.csv").write_text(CURVES)
    return run


def text_of(page):
    found = re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", page.html(), flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>+", " ", found))


def sections(page):
    return re.findall(r'<h2 id="s\d+">(.*?)</h2>', page.html())


def test_choices_are_shown_with_their_edges(run):
    page = run_page(run).html()
    cells = re.findall(r"<tr><td>([ab])</td><td[^>]*>([^<]*)</td><td[^>]*>(\d)</td>", page)
    assert [cell[0] for cell in cells] == ["a", "b"]
    assert cells[0][1].endswith(", at an edge")
    assert cells[1][1:] == ("0.5000", "3")


def test_choices_that_ship_are_shown_where_settings_agree(run, tmp_path, monkeypatch):
    package = tmp_path / "package"
    (package / "weights/default").mkdir(parents=True)
    (run.folder / "choices").rename(package / "weights/default/choices")
    monkeypatch.setattr("harness.experiment.run.files", lambda _: package)
    for dim, shown in ((8, True), (9, False)):
        other = Run(run.folder, app="toy", settings={"model.dim": dim}, package="package")
        assert ("Tuning" in sections(run_page(other))) == shown


def test_choices_that_ship_are_compared_with_the_settings_of_their_own_method(
    tmp_path, monkeypatch
):
    package = tmp_path / "package"
    common, own = {"net": "A", "dim": 8}, {"b": {"net": "B"}, "c": {"dim": None}}
    made = Run(package / "weights/default", app="toy", settings=common)
    made.tune({name: {"rate": (0.1, 0.3)} for name in "abc"}, bowl, trials=2, own=own)
    monkeypatch.setattr("harness.experiment.run.files", lambda _: package)
    run = Run(tmp_path / "run", app="toy", settings=common, package="package")
    assert list(found_choices(run, own)) == ["a", "b", "c"]
    assert list(found_choices(run, {**own, "b": {"net": "C"}})) == ["a", "c"]


def test_each_figure_lies_next_to_the_page_with_its_numbers(run):
    def draw(page):
        figure = Figure()
        figure.subplots().plot([1, 2], [3, 4])
        page.section("Two pictures").figure(figure).figure(figure, "again")

    run_page(run, draw).write(run.folder / "report.html")
    folder = run.folder / "figures"
    names = ["bars", "differences", "learning-curves", "trials", "two-pictures", "two-pictures-2"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{name}.{kind}" for name in names for kind in ("png", "csv")
    )
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in folder.glob("*.png"))
    tables = {
        p.stem: list(csv.DictReader(p.read_text().splitlines())) for p in folder.glob("*.csv")
    }
    assert [(r["metric"], r["value"], r["p"]) for r in tables["differences"]] == [
        ("mse", "-1.0", "0.01"), ("bias", "-0.1", "0.4"),
    ]  # fmt: skip
    assert [row["value"] for row in tables["bars"]] == ["1.0"]
    curve = [(r["metric"], r["step"], r["value"]) for r in tables["learning-curves"]]
    assert curve == [
        ("train/loss", "0.0", "3.0"), ("train/loss", "1.0", "2.0"), ("val/loss", "1.0", "2.5"),
    ]  # fmt: skip
    assert len(tables["trials"]) == 6
    assert [row["chosen"] for row in tables["trials"]].count("True") == 2
    assert [(r["x"], r["y"]) for r in tables["two-pictures"]] == [("1.0", "3.0"), ("2.0", "4.0")]


def test_what_is_not_there_has_no_section(tmp_path):
    run = Run(tmp_path, app="toy", quick=True)
    run.finish(ROWS[:2], [Bar("error", 1.0, "<=", 2.0)], seeds=[0])
    page = run_page(run)
    assert sections(page) == ["Scores", "Data and settings"]
    assert "A quick run" in text_of(page)


def test_a_report_needs_scores(tmp_path):
    with pytest.raises(GatesError, match="does not exist: run `gates toy evaluate` first"):
        run_page(Run(tmp_path, app="toy"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metrics.csv", "step,loss\n0,x\n", "metrics.csv is damaged"),
        ("choices/a-s100/result.json", "{", "missing or damaged"),
        ("choices/a-s100/result.json", json.dumps({"x": 1}), "holds no choice: delete it"),
    ],
)
def test_damage_is_one_line(refuses, run, name, content, said):
    (run.folder / name).write_text(content)
    refuses(GatesError, (said, lambda: run_page(run)))


def test_several_trainings_have_a_curve_each(run):
    (run.folder / "distill").mkdir()
    (run.folder / "distill/metrics.csv").write_text(CURVES)
    assert "Logged by fit, distill." in text_of(run_page(run))
