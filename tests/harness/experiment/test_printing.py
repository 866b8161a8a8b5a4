"""What the terminal shows of scores."""

import math
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from harness.evidence import Row, smaller_is_better
from harness.experiment import Choice, Scores, print_choices, print_scores

NAN = math.nan
ROWS = [
    Row("home", "test", "summed log_loss", 2.5, 2.4, 2.6, 9),
    Row("mmoe", "test", "summed log_loss", 2.6, 2.5, 2.7, 9),
    Row("trees", "test", "summed log_loss", 2.25, 2.0, 2.5, 9),
    Row("mmoe", "test", "summed log_loss", 0.1, 0.05, 0.2, 9, "home", 0.01),
    Row("trees", "test", "summed log_loss", -0.25, -0.5, -0.125, 9, "home", 0.2),
    Row("home", "test", "auc inter", NAN),
    Row("home", "test", "auc watch", 0.75),
    Row("test rows", "slices", "log-loss, new users", 1234.0),
]


def printed(rows, width=120, **options):
    console = Console(width=width, record=True, file=StringIO())
    print_scores(Path("scores.json"), Scores(rows), console=console, **options)
    return console.export_text().splitlines()


def cells(line):
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_methods_are_sorted_and_differences_stand_beside_the_figure():
    lines = printed(ROWS, unprinted=("slices",))
    assert [cell.strip() for cell in lines[2].strip("┃").split("┃")] == [
        "method", "summed log-loss", "− home", "auc watch",
    ]  # fmt: skip
    assert [cells(line) for line in lines if line.startswith("│")] == [
        ["trees", "2.250 [2.000, 2.500]", "−0.2500 [−0.5000, −0.1250]", "–"],
        ["home", "2.500 [2.400, 2.600]", "", "0.7500"],
        ["mmoe", "2.600 [2.500, 2.700]", "0.1000 [0.0500, 0.2000]*", "–"],
    ]
    assert lines[-4].startswith("* significant after Holm")
    assert lines[-3].startswith("slices: in the report")
    assert lines[-2] == "2 more figures are in the file below"


@pytest.mark.parametrize(
    ("metric", "smaller"),
    [("summed log_loss", True), ("log-loss, new users", True), ("rmse_z500", True),
     ("auc inter", False), ("gauc", False), ("macro_f1", False), ("pcoc", None),
     ("rmse_ratio", None), ("bias_mm", None), ("click rate", None)],
)  # fmt: skip
def test_the_better_side_is_told_by_the_name(metric, smaller):
    assert smaller_is_better(metric) is smaller


@pytest.mark.fault("video V3")
def test_choices_among_trials_that_diverged():
    trials = [{"rate": 1e30, "score": None}, {"rate": 0.5, "score": NAN}, {"rate": 0.1}]
    console = Console(width=120, record=True, file=StringIO())
    chosen = {"home": Choice({"rate": 0.1}, [*trials, {"rate": 0.1, "score": 2.5}], [])}
    print_choices({**chosen, "mmoe": Choice({"rate": 0.2}, trials, [])}, console)
    rows = [cells(line) for line in console.export_text().splitlines() if line.startswith("│")]
    assert rows == [["home", "rate 0.1000", "2.500", "4"], ["mmoe", "rate 0.2000", "–", "3"]]
