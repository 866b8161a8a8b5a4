import csv
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "evidence" / "benchmarks.md"
VERDICTS = {"True": "met", "False": "**missed**", "": "not measured"}


@pytest.mark.parametrize(
    "suite", ["weather", "core", "endoscopy", "recsys", "diffusion", "language"]
)
def test_the_page_shows_the_recorded_figures(suite):
    section = PAGE.read_text().partition(f"## Suite `{suite}`")[2].partition("\n## ")[0]
    path = PAGE.parent / re.search(r"\((\S+\.csv)\)", section)[1]  # the first is that of the table
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert len(rows) > 10
    for row in rows:
        comparison, _, variant = row["name"].partition(" · ")
        if "first call" in variant:
            continue
        cells = section.partition(f"| {comparison} ")[2]
        assert f"| {variant} | {row['value']} {row['unit']} |" in cells
        if row["bar"]:
            assert f"| ≤ {row['bar']}, {VERDICTS[row['met']]} |" in cells
