"""The figures of the evidence page are those that ship."""

import re
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).parents[4]
PAGE = (ROOT / "docs/evidence/caches.md").read_text()


def shipped(start):
    (path,) = (ROOT / "language/weights/scbench/scores").glob(f"{start}-answers-*/*.safetensors")
    return load_file(path)


def two_digits(value):
    return f"{value:.2f}".replace("0.", ".") if value >= 0.005 else "0"


def test_the_table_of_the_retriever_is_of_what_ships():
    both = [shipped(f"kv-of-retriever-mode-{mode}") for mode in ("turns", "requests")]
    rows = re.findall(r"^\| `([\w-]+)`(?:, (\d) bits)? \| (\S+) \| (.+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 15
    for name, bits, held, figures in rows:
        labels = [f"{name}:bits={bits}"] if bits else [f"{name}:keep={k}" for k in (0.5, 0.25)]
        expected = [two_digits(one[f"{k}|score"].mean()) for k in labels for one in both]
        assert figures.replace("|", " ").split() == expected
        share = both[0][f"{labels[0]}|held_bytes"].sum() / both[0][f"{labels[0]}|full_bytes"].sum()
        assert held == two_digits(share)


def test_the_table_of_smollm2_is_of_what_ships():
    scores = shipped("kv-of-smollm2-mode-requests")
    rows = dict(re.findall(r"^\| `(\S+)` \| (\S+) \[", PAGE, re.MULTILINE))
    labels = {name.partition("|")[0] for name in scores}
    assert rows == {name: two_digits(scores[f"{name}|score"].mean()) for name in labels}
