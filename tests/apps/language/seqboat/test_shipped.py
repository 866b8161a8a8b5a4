"""What ships of SeqBoat: the figures of the page, a network that hears, and one that writes."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from harness.experiment import Arrays
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


NAMES = {"seqboat": "**SeqBoat**", "always": "all", "never": "none"}


@HEARD
@pytest.mark.parametrize("config", ["fsdd", "fsdd_speakers", "activation"])
def test_figures_of_the_page_are_of_what_ships(config, shipped):
    out = shipped.succeed("language", "evaluate", "--config", config).out
    count = {"fsdd": 7, "fsdd_speakers": 18, "activation": 12}[config]
    assert f"{count} of {count} scores come with the package; --shipped false" in out
    page = (ROOT / "docs/evidence/sequences.md").read_text()
    scores = json.loads((shipped.folder / f"runs/language/{config}/scores.json").read_text())
    rows = [row for row in scores["rows"] if row["metric"] == "accuracy" and row["low"] is not None]
    assert len(rows) >= 7
    for row in rows:
        shown, versus = NAMES.get(row["method"], row["method"]), row["versus"]
        signed = ("+" if versus else "") + ".3f"
        figures = [format(row[k], signed).replace("0.", ".") for k in ("value", "low", "high")]
        value, low, high = (one.replace("-", "−") for one in figures)
        start = f"| {shown} | " if not versus else ""
        assert f"{start}{value} [{low}, {high}] |" in page


@HEARD
def test_the_network_that_ships_hears_digits(shipped, wave_writer):
    files = [one for one in read_packed(SHARED / "data/audio") if one.number == 1][::12]
    packed = shipped.succeed("language", "classify", *(one.name for one in files)).out
    for one in files:
        wave_writer(shipped.folder / one.name, one.samples)
    out = shipped.succeed("language", "classify", *(one.name for one in files)).out
    assert packed == out
    assert "cannot be read" in shipped.refuse("language", "classify", f"none/{files[0].name}")
    right = [line.split("\t")[1] == line[0] for line in out.splitlines()]
    assert sum(right) >= 4
    assert len(right) == 5


def test_bits_of_the_page_are_of_what_ships():
    bits = {}
    for folder in sorted(ROOT.glob("language/weights/seqboat_bytes/[sb][ca]*/*")):
        for method, found in Arrays().load(folder).items():
            if method != "density":
                bits.setdefault(method, []).append(found.numpy())
    assert len(bits["seqboat"]) == len(bits["decoder"]) == 3
    means = {m: np.mean([one[:, 0].sum() / one[:, 1].sum() for one in b]) for m, b in bits.items()}
    page = (ROOT / "docs/evidence/sequences.md").read_text()
    for method in ("PPMd", "adaptive counts, same window", "order 5", "decoder", "seqboat"):
        (line,) = re.findall(rf"\| {re.escape(NAMES.get(method, method))} \| [^.]*\| .*", page)
        assert f"| {means[method]:.3f} [" in line
        gap = f"{means[method] - means['seqboat']:+.3f} [".replace("0.", ".").replace("-", "−")
        assert gap in line or method == "seqboat"


def test_the_network_that_ships_continues_ragged_prompts_as_single_ones(tmp_path):
    gates = GatesInFolder(tmp_path)
    prompts = ["def mean(values):", "import", "class Reader:\\n"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    words = ("language", "generate", "--weights", "seqboat", "--max_tokens", "20")
    together = gates.succeed(*words, "--prompts", "prompts.txt").out
    for number, prompt in enumerate(prompts, 1):
        assert f"[{number}] {gates.succeed(*words, '--prompt', prompt).out}" in together
