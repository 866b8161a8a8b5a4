"""What ships of the spoken digits: the figures of the page, and a network that hears."""

import json
import os
from pathlib import Path

import pytest

from language.seqboat.speech import read_packed
from tests.fixtures.gates_in_folder import GatesInFolder

ROOT = Path(__file__).parents[4]
SHARED = Path(os.environ.get("GATES_SHARED", ROOT.parent / "shared")).resolve()
HEARD = pytest.mark.skipif(
    not (SHARED / "data/audio").is_dir(), reason="the Free Spoken Digit Dataset is not there"
)


@pytest.fixture
def shipped(tmp_path):
    """``gates`` in an empty folder next to the shared data."""
    (tmp_path / "shared").symlink_to(SHARED)
    (tmp_path / "work").mkdir()
    return GatesInFolder(tmp_path / "work")


@HEARD
def test_figures_of_the_page_are_of_what_ships(shipped):
    shipped.succeed("language", "evaluate", "--config", "fsdd")
    page = (ROOT / "docs/evidence/sequences.md").read_text()
    scores = json.loads((shipped.folder / "runs/language/fsdd/scores.json").read_text())
    rows = {r["method"]: r for r in scores["rows"] if r["metric"] == "accuracy" and not r["versus"]}
    for name, row in rows.items():
        low, high, value = (f"{row[k]:.3f}".removeprefix("0") for k in ("low", "high", "value"))
        shown = f"**{name}**".replace("seqboat", "SeqBoat") if name == "seqboat" else name
        assert f"| {shown} | {value} [{low}, {high}] |" in page


@HEARD
def test_the_network_that_ships_hears_digits(shipped, wave_writer):
    files = [one for one in read_packed(SHARED / "data/audio") if one.number == 1][::12]
    for one in files:
        wave_writer(shipped.folder / one.name, one.samples)
    out = shipped.succeed("language", "classify", *(one.name for one in files)).out
    right = [line.split("\t")[1] == line[0] for line in out.splitlines()]
    assert sum(right) >= 4
    assert len(right) == 5
