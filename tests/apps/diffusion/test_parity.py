"""``gates diffusion evaluate --config parity`` with two groups of checks."""

import json
from pathlib import Path

import pytest

from apps.diffusion.studies import parity
from apps.main import main

VECTORS = Path(__file__).parents[2] / "golden" / "autolora"
GROUPS = ("golden vectors", "published sizes")
COMMAND = ["diffusion", "evaluate", "--config", "parity"]


@pytest.fixture
def few(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(parity, "GROUPS", {name: parity.GROUPS[name] for name in GROUPS})
    return tmp_path / "runs" / "diffusion" / "parity"


def test_worst_cases_are_bars_and_a_second_run_computes_nothing(few, capsys, monkeypatch):
    assert main([*COMMAND, "--vectors", str(VECTORS)]) == 0
    first = json.loads((few / "scores.json").read_text())
    assert {bar["met"] for bar in first["bars"]} == {True}
    named = {bar["name"]: bar for bar in first["bars"]}
    assert len(named) == 11
    assert 0 < named["PEFT: merges"]["value"] <= named["PEFT: merges"]["bar"] == 1e-6
    assert named["fused modules of FLUX.1-dev − 304"]["value"] == 0
    assert {row["value"] for row in first["rows"] if row["method"].startswith("millions")} == {
        27.3, 112.9,
    }  # fmt: skip
    assert "11 of 11 figures" in capsys.readouterr().out
    monkeypatch.setattr(parity, "run_checks", lambda *_: pytest.fail("computed again"))
    assert main([*COMMAND, "--vectors", str(VECTORS)]) == 0
    assert json.loads((few / "scores.json").read_text())["bars"] == first["bars"]


def test_results_are_of_the_vectors(few, tmp_path, capsys):
    assert parity.digest_of(VECTORS, "*") != parity.digest_of(VECTORS, "*.npz")
    assert main(COMMAND) == 2
    line = capsys.readouterr().err
    assert "parity needs the folder of the golden vectors: give --vectors" in line
    assert main([*COMMAND, "--vectors", str(tmp_path)]) == 2
    line = capsys.readouterr().err
    assert "lacks encoder_a.npz" in line
    assert line.count("\n") == 1


def test_a_figure_that_is_off_is_a_bar_that_is_missed():
    check = {"value": 2e-6, "n": 4, "at": "loss"}
    rows, bars = parity.scored(
        {"golden vectors": {"X-LoRA": check, "fused modules of FLUX.1-dev": check | {"value": 303}}}
    )
    assert [bar.met for bar in bars] == [False, False]
    assert bars[1].value == 1
    assert rows[0].n == 4
