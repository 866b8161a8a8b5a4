import io

from rich.console import Console

from harness.runs.terminal import Line, print_plan

SECTIONS = {
    "weights": [Line("dense", 41_001_126), Line("tables", 1.28e10, "bytes", "row-sharded [8]")],
    "price": [Line("unknown", float("nan"), "USD")],
}


def test_every_line_is_printed_with_its_note():
    out = io.StringIO()
    print_plan(SECTIONS, console=Console(file=out, width=100))
    text = out.getvalue()
    for words in ("weights", "12.8 GB", "row-sharded [8]", "price", "unknown"):
        assert words in text
