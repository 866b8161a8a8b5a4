import io
import json

import pytest
from rich.console import Console

from harness.runs.terminal import Line, print_plan, readable, write_plan

SECTIONS = {
    "weights": [Line("dense", 41_001_126), Line("tables", 1.28e10, "bytes", "row-sharded [8]")],
    "price": [Line("unknown", float("nan"), "USD")],
}


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (41_001_126, "", "41 M"),
        (1.28e10, "bytes", "12.8 GB"),
        (999, "bytes", "999 B"),
        (0.25, "s", "0.25 s"),
        (0, "", "0"),
        (3.5e15, "FLOP", "3.5 PFLOP"),
        (999_900_000, "", "1 G"),
    ],
)
def test_figures_are_readable(value, unit, text):
    assert readable(value, unit) == text


def test_every_line_is_printed_with_its_note():
    out = io.StringIO()
    print_plan(SECTIONS, console=Console(file=out, width=100))
    text = out.getvalue()
    for words in ("weights", "12.8 GB", "row-sharded [8]", "price", "unknown"):
        assert words in text


def test_figures_are_written_in_full(tmp_path):
    found = json.loads(write_plan(tmp_path / "plan.json", SECTIONS).read_text())
    assert found["weights"]["dense"] == {"value": 41_001_126, "unit": "", "note": ""}
    assert found["price"]["unknown"]["value"] is None
