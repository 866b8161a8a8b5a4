"""Figures on the page of weather are those of the evaluation that it names."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/weather.md").read_text()
FOUND = json.loads((ROOT / "tests/golden/weather/osse_scores.json").read_text())
FIGURES = {(row["method"], row["task"], row["metric"]): row["value"] for row in FOUND["rows"]}
TASKS = ("0.01/perfect", "0.1/perfect", "0.01/error", "0.1/error")


def test_the_page_opens_with_the_sentences_of_the_scores():
    opening = " ".join(PAGE.partition("## ")[0].split())
    beats, _, gates = FOUND["headline"].partition("Gates ")
    assert f"**Does Adas beat OI?** {beats.strip()}" in opening
    assert f"**Do gates help?** Gates {gates}" in opening


def test_the_table_of_the_page_is_that_of_the_scores():
    section = PAGE.partition("## What it shows")[2].partition("On real fields")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.MULTILINE)
    table = {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}
    methods = {method for method, task, metric in FIGURES if (task, metric) == (TASKS[0], "rmse_h")}
    assert methods <= set(table)
    for method in methods:
        for task, cell in zip(TASKS, table[method], strict=False):
            value, lost = (FIGURES.get((method, task, m)) for m in ("rmse_h", "lost"))
            expected = "" if value is None else f"{value:.3g}" + (f" ({lost:.0f})" if lost else "")
            assert cell == expected, (method, task)
        assert table[method][4] == f"{FIGURES[method, TASKS[0], 'milliseconds']:.2g}"


def test_what_speaks_against_us_is_on_the_page():
    few = f"{TASKS[0]}/4 timelines"
    ahead, own, letkf = (FIGURES[m, few, "over_oi"] for m in ("four_d_var", "adas_oi", "letkf"))
    text = " ".join(PAGE.split())
    assert (
        f"it errs by {ahead:.2f} of optimal interpolation, where `adas_oi` errs by {own:.2f}"
        in text
    )
    assert f"by {letkf:.2f}." in text
    missed = [bar["name"] for bar in FOUND["bars"] if not bar["met"]]
    assert missed == ["adas_oi over oi, 0.1/perfect"]
    assert f"by {FIGURES['adas_oi', TASKS[1], 'over_oi']:.2f}, and networks" in text
