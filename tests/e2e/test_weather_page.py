"""Figures on the page of results of weather are those of the evaluation that it names."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/evidence/weather.md").read_text()
SCORES = json.loads((ROOT / "tests/golden/weather/osse_scores.json").read_text())


def figures_of(config):
    rows = SCORES[config]["rows"]
    return {(row["method"], row["task"], row["metric"]): row["value"] for row in rows}


FIGURES = figures_of("osse")
TASKS = ("0.01/perfect", "0.1/perfect", "0.01/error", "0.1/error")
FEW = f"{TASKS[0]}/4 timelines"


def shown(row, digits=2):
    value, low, high = (f"{row[name]:.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def rows_of(config):
    return {(row["method"], row["task"], row["metric"]): row for row in SCORES[config]["rows"]}


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_ratios_of_the_page_are_those_of_the_scores():
    rows, section = rows_of("osse"), PAGE.partition("| over `oi` | ")[2].partition("\n\n")[0]
    table = {cells[0]: cells[1:] for cells in map(cells_of, section.splitlines()[2:])}
    tasks = (*TASKS, FEW)
    known = {f"`{method}`" for method, _, metric in rows if metric == "over_oi"}
    assert {"`four_d_var`", "`letkf`", "`damped_oi`", "`adas_oi`"} <= set(table) & known
    for name, cells in table.items():
        method, *over = re.findall(r"`(\w+)`", name)
        before, metric = ("gate/" if over == ["ungated_oi"] else ""), f"over_{(over or ['oi'])[0]}"
        found = [rows.get((method, f"{before}{task}", metric)) for task in tasks]
        if not over and found[0] is not None:
            assert all(found)
        assert cells == [shown(row) if row else "" for row in found], name


def test_the_table_of_the_page_is_that_of_the_scores():
    section = PAGE.partition("## Errors and costs")[2].partition("## ")[0]
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


def test_the_claims_of_the_page_are_those_of_the_scores():
    rows, mixed = rows_of("osse"), rows_of("mixed")
    section = PAGE.partition("| claim | ")[2].partition("\n\n")[0]
    ours = {cells[0]: cells[2:4] for cells in map(cells_of, section.splitlines()[2:])}
    claims = iter(ours)
    assert next(claims).startswith("gates help")
    gate = shown(rows["adas_oi", "gate/pooled", "over_ungated_oi"], 3)
    assert ours["gates help: `adas_oi` over `ungated_oi`, four tasks"] == [gate, "no"]
    ahead, own = (rows[method, FEW, "over_oi"] for method in ("four_d_var", "adas_oi"))
    cost = [rows[method, FEW, "milliseconds"]["value"] for method in ("four_d_var", "adas_oi")]
    assert ours[next(claims)] == [
        f"{shown(own)}, 4D-Var {shown(ahead)}",
        f"no, at 1/{cost[0] / cost[1]:.0f} of its cost",
    ]
    gate = shown(mixed["adas_oi", "gate/pooled", "over_ungated_oi"], 3)
    assert ours["gates help where reports are of mixed quality, too"] == [gate, "no"]
    alone = mixed["adas_increment", "mixed/declared", "over_oi"]["value"]
    bear = ours["networks alone bear reports that they never saw"]
    assert bear == [f"{alone:.2f} times the error of `oi`", "no"]
    for claim, metric in (
        ("better than any interpolation: over `damped_oi`", "over_damped_oi"),
        ("better than `oi`", "over_oi"),
    ):
        found = [rows["adas_oi", task, metric] for task in TASKS]
        assert ours[claim] == [", ".join(f"{row['value']:.2f}" for row in found), "yes"]
        assert all(row["high"] < 1 for row in found)
    stated = mixed["adas_oi", "mixed/declared", "over_oi"]
    assert ours["the same with reports of mixed quality"] == [shown(stated), "yes"]
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
    section = PAGE.partition("| mixed reports | ")[2].partition("\n\n")[0]
    rows = [cells_of(line)[1:] for line in section.splitlines()[2:]]
    found, methods = figures_of("mixed"), ("oi", "damped_oi", "adas_oi", "ungated_oi")
    tasks = [f"mixed/{reports}" for reports in ("declared", "withheld", "denied")]
    assert rows == [[f"{found[m, task, 'rmse_h']:.3g}" for m in methods] for task in tasks]
