"""The tables of docs/evidence/benchmarks.md are those of the recorded runs."""

import csv
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "evidence" / "benchmarks.md"
RESULTS = PAGE.parents[2] / "benchmarks" / "results"
SECTIONS = {
    f"Suite `{suite}`": suite
    for suite in ("core", "weather", "endoscopy", "recsys", "diffusion", "language")
} | {"Block gates": "block_gates", "SeqBoat": "seqboat"}
DEVICES = {"seqboat": "intel-r-xeon-r-processor"}  # all others: the EPYC
FIGURE = re.compile(r"(\*\*)?([\d.]+)(?: MB| %)?(?: (?:≤|>) ([\d.]+))?(?:\*\*)?")
PART = re.compile(r"(.+?) (\**[\d.]+(?: [≤>] [\d.]+\**)?)")
FIXED = ("MB", "%")  # units of fixed amounts, which have no baseline
BAR = re.compile(r" \(≤ ([\d.]+)\)")


def words(text):
    return set(re.findall(r"[^\s,·]+", text))


def recorded(suite, device):
    """Rows with a ratio, without the rates."""
    (path,) = RESULTS.glob(f"{suite}-{device}-*.csv")
    rows = list(csv.DictReader(path.read_text().splitlines()))
    return [row for row in rows if row["ratio"]]


def shown(section):
    """Label, baseline, cell and column's bar of every figure of the tables of a section."""
    for table in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE):
        head, _, *rows = ([c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines())
        title, _, over = BAR.sub("", f" {head[0]}").partition(" over ")
        bars = [BAR.search(name) or BAR.search(head[0]) for name in head]
        for row in rows:
            if head == ["comparison", "over", "ratios"]:
                for part in row[2].split("; "):
                    label, cell = PART.fullmatch(part).groups()
                    yield words(f"{row[0]} {label}"), words(row[1]), cell, None
                continue
            for name, cell, bar in zip(head[1:], row[1:], bars[1:], strict=True):
                label = words(f"{title} {row[0]} {BAR.sub('', name)}")
                if cell:
                    yield label, words(over), cell, bar and bar[1]


@pytest.mark.parametrize(("title", "suite"), SECTIONS.items(), ids=SECTIONS.values())
def test_the_page_shows_the_recorded_figures(title, suite):
    section = PAGE.read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]
    path = (PAGE.parent / re.search(r"\((\S+\.csv)\)", section)[1]).resolve()
    device = DEVICES.get(suite, "amd-epyc")
    assert path == RESULTS / f"{suite}-{device}-2-cores-1-thread.csv"
    rows, found = recorded(suite, device), []
    names = {row["name"]: words(row["name"]) for row in rows}
    for label, over, cell, bar in shown(section):
        bold, figure, limit = FIGURE.fullmatch(cell).groups()
        suits = [
            row
            for row in rows
            if label <= names[row["name"]]
            and row["ratio"] != "1"
            and (over <= words(row["baseline"]) or row["unit"] in FIXED)
        ]
        row = min(suits, key=lambda row: len(names[row["name"]] - label), default=None)
        assert row, (label, cell)
        assert figure == row["value" if row["unit"] in FIXED else "ratio"], row["name"]
        assert (limit or (bar if row["bar"] else None) or "") == row["bar"], row["name"]
        assert bool(bold) == (row["met"] == "False"), row["name"]
        found.append(row["name"])
    assert len(set(found)) == len(found) > 5
    assert {row["name"] for row in rows if row["bar"]} <= {*found}


def verdicts(device):
    suites = {path.name.partition(f"-{device}")[0] for path in RESULTS.glob(f"*-{device}-*.csv")}
    rows = [row for suite in suites for row in recorded(suite, device)]
    return [(row["met"] == "True", row["ratio"]) for row in rows if row["bar"]]


def test_the_page_counts_the_bars():
    page = " ".join(PAGE.read_text().split())
    epyc, xeon = verdicts("amd-epyc"), verdicts("intel-r-xeon")
    assert f"Of {len(epyc)} bars {sum(met for met, _ in epyc)} are met" in page
    missed = sorted(ratio for met, ratio in xeon if not met)
    said = re.search(rf"missed {len(missed)} of {len(xeon)}: (.*?)\. Its other runs", page)[1]
    assert sorted(re.findall(r"\d\.\d+", said)) == missed
