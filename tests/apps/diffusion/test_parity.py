"""``gates diffusion evaluate --config parity``: a bar per comparison with golden vectors."""

import json
from pathlib import Path

import pytest

from apps.main import main
from diffusion.evaluation.parity import COMPARISONS
from diffusion.rivals.k_lora import KLora

VECTORS = Path(__file__).parents[2] / "golden" / "autolora"
COMMAND = ["diffusion", "evaluate", "--config", "parity", "--vectors"]


@pytest.fixture
def scores(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path / "runs" / "diffusion" / "parity" / "scores.json"


def test_every_comparison_is_a_bar(scores, capsys):
    assert main([*COMMAND, str(VECTORS)]) == 0
    bars = json.loads(scores.read_text())["bars"]
    assert [bar["name"] for bar in bars] == list(COMPARISONS)
    assert all(0 < bar["value"] <= bar["bar"] == 1e-6 for bar in bars)
    assert "6 of 6 figures of 159 comparisons agree" in capsys.readouterr().out
    assert main([*COMMAND, str(VECTORS), "--only", "merges of PEFT", "--overwrite"]) == 0
    rows = json.loads(scores.read_text())["rows"]
    assert [row["method"] for row in rows] == ["merges of PEFT"]


def test_a_deviation_is_a_bar_that_is_missed_and_named(scores, monkeypatch):
    monkeypatch.setattr(KLora, "choice", lambda *_: "1")
    assert main([*COMMAND, str(VECTORS)]) == 0
    found = json.loads(scores.read_text())
    assert [bar["name"] for bar in found["bars"] if not bar["met"]] == ["choices of K-LoRA"]
    assert found["headline"].startswith("5 of 6 figures")
    assert [note.partition(" at ")[0] for note in found["notes"]] == ["choices of K-LoRA: worst"]


def test_a_folder_without_vectors_is_one_line(scores, tmp_path, capsys):
    for words, message in (
        (COMMAND[:-1], "parity compares with golden vectors: give the folder"),
        ([*COMMAND, str(tmp_path)], "encoder_a.npz is missing or damaged (FileNotFoundError)"),
    ):
        assert main(words) == 2
        line = capsys.readouterr().err
        assert message in line
        assert line.count("\n") == 1
