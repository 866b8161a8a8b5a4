"""Comparisons with golden vectors find what is wrong; that all is well, other tests show."""

import importlib
import math
from pathlib import Path

import pytest
import torch

from core_gates.errors import GatesError
from diffusion.evaluation.parity import COMPARISONS, TOLERANCE, read_vectors, relative_error

VECTORS = Path(__file__).parents[2] / "golden" / "autolora"


def test_errors_are_relative_and_what_is_no_number_is_worst():
    one = torch.tensor([1.0, -4.0])
    assert relative_error(one + torch.tensor([0.0, 0.1]), one) == pytest.approx(0.025)
    assert relative_error(0 * one, 0 * one) == 0
    for found, expected in ((one, one[:1]), (one * math.nan, one), (one, 0 * one), (None, one)):
        assert relative_error(found, expected) == math.inf


@pytest.mark.parametrize(
    ("module", "name", "comparison"),
    [
        ("diffusion.retrieval.retriever", "PublishedLoss.forward", "encoder and loss"),
        ("core_gates.adapters.lora_gate", "LoraGate.gate_values", "gate in four variants"),
        ("core_gates.adapters.lora_gate", "LoraGate.coefficients", "gated layer"),
        ("diffusion.evaluation.parity", "merge", "merges of PEFT"),
        ("diffusion.lora_file.bundle", "LoraBundle.delta_weight", "ΔW of sample files"),
    ],
)
def test_a_small_deviation_is_seen(module, name, comparison, monkeypatch):
    owner = importlib.import_module(module)
    *parents, name = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, name)

    def slightly(*args, **options):
        found = original(*args, **options)
        return found * (1 + 1e-4) if isinstance(found, torch.Tensor) else args[0]["a0"]

    monkeypatch.setattr(owner, name, slightly)
    assert max(dict(COMPARISONS[comparison](VECTORS)).values()) > TOLERANCE


@pytest.mark.parametrize("name", ["missing.npz", "damaged.npz", "text.npz"])
def test_vectors_that_cannot_be_read(name, tmp_path, one_line):
    (tmp_path / "damaged.npz").write_bytes((VECTORS / "gate_a.npz").read_bytes()[:900])
    (tmp_path / "text.npz").write_text("vectors")
    assert "give the folder of the golden" in one_line(GatesError, read_vectors, tmp_path, name)
