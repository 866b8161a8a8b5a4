"""Figures on the page of results of weather are those of the evaluation that it names."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/evidence/weather.md").read_text()
SCORES = json.loads((ROOT / "tests/golden/weather/osse_scores.json").read_text())
FOUND = SCORES["osse"]


def figures_of(config):
    rows = SCORES[config]["rows"]
    return {(row["method"], row["task"], row["metric"]): row["value"] for row in rows}


FIGURES = figures_of("osse")
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


def shown(row, digits=2):
    value, low, high = (f"{row[name]:.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def test_what_speaks_against_us_is_on_the_page():
    rows = {(row["method"], row["task"], row["metric"]): row for row in FOUND["rows"]}
    few, text = f"{TASKS[0]}/4 timelines", " ".join(PAGE.split())
    ahead, own, letkf = (rows[m, few, "over_oi"] for m in ("four_d_var", "adas_oi", "letkf"))
    assert f"it has {shown(ahead)} times the error of optimal interpolation" in text
    assert f"`adas_oi` {shown(own)} and the LETKF, with twenty members, {shown(letkf)}." in text
    damped = ", ".join(shown(rows["adas_oi", task, "over_damped_oi"]) for task in TASKS)
    assert f"Over it, `adas_oi` has {damped} times the error on the four tasks." in text
    gate = rows["adas_oi", "gate/pooled", "over_ungated_oi"]
    assert f"pooled over four tasks, have {shown(gate, 3)} times the error." in text
    assert [bar["name"] for one in SCORES.values() for bar in one["bars"] if not bar["met"]] == []


def test_the_tables_of_outages_are_those_of_the_scores():
    found, section = figures_of("outage"), PAGE.partition("| outage | ")[2].partition("\n\n")[0]
    head, _, *lines = section.splitlines()
    methods = re.findall(r"`(\w+)`", head)
    assert methods[:3] == ["oi", "damped_oi", "adas_oi"]
    metrics = [
        f"rmse_{name}" for name in ("silent_10_days", "recovered_5_days", "recovered_10_days")
    ]
    wanted = [
        (f"{density}/outage", metric, ".3g") for density in ("0.01", "0.1") for metric in metrics
    ]
    wanted += [("single_report", "over_background", ".3f")]
    wanted += [("single_report", "worst_over_background", ".2f")]
    for line, (task, metric, form) in zip(lines, wanted, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")][1:]
        values = [found.get((method, task, metric)) for method in methods]
        assert cells == ["" if value is None else format(value, form) for value in values]
    assert {value for (_, _, metric), value in found.items() if metric == "changed"} == {0.0}


def test_the_table_of_mixed_reports_is_that_of_the_scores():
    section = PAGE.partition("| mixed reports | ")[2].partition("On real fields")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")][1:]
            for line in section.partition("\n\n")[0].splitlines()[2:]]  # fmt: skip
    found, methods = figures_of("mixed"), ("oi", "damped_oi", "adas_oi", "ungated_oi")
    tasks = [f"mixed/{reports}" for reports in ("declared", "withheld", "denied")]
    assert rows == [[f"{found[m, task, 'rmse_h']:.3g}" for m in methods] for task in tasks]
    text = " ".join(section.split())
    named = {(row["method"], row["task"], row["metric"]): row for row in SCORES["mixed"]["rows"]}
    assert f"`adas_oi` has {shown(named['adas_oi', tasks[0], 'over_oi'])} times the error" in text
    alone = found["adas_increment", tasks[0], "over_oi"]
    assert f"which never saw such reports, {alone:.2f} times." in text
    gate = named["adas_oi", "gate/pooled", "over_ungated_oi"]
    assert f"the four tasks of `osse`, have {shown(gate, 3)} times the error." in text
