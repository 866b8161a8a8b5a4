"""The table of gates of docs/evidence/studies.md, as recorded next to it."""

import csv
import re
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs" / "evidence" / "studies.md"


def test_the_page_shows_the_recorded_gates():
    text = PAGE.read_text().replace("−", "-")
    lines = re.search(r"\| gate \| accuracy .*\n\|[-|]+\n((?:\|.*\n)+)", text)[1].splitlines()
    recorded = csv.DictReader((PAGE.parent / "studies_gates.csv").read_text().splitlines())
    for line, row in zip(lines, recorded, strict=True):
        name, accuracy, less, active, load = (cell.strip() for cell in line.split("|")[1:-1])
        name = name.replace("a single expert", "one-expert").replace("`, ", "-").strip("`")
        assert (name, accuracy, active) == (row["gate"], row["accuracy"], row["active_experts"])
        assert load.replace("–", "") == row["load_cv"], name
        figures = [row[column] for column in ("less_softmax", "less_low", "less_high")]
        assert re.findall(r"-?[\d.]+", less) == [figure for figure in figures if figure], name
        assert ("*" in less) == (row["significant"] == "true"), name
