"""X-LoRA as PEFT computes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from core_gates.adapters import LowRank
from diffusion.evaluation.parity.golden.k_lora import plain_layer
from diffusion.evaluation.parity.golden.vectors import read_vectors
from diffusion.evaluation.parity.worst import Check, relative_error, worst
from diffusion.rivals.scalings import Scalings
from diffusion.rivals.x_lora import TokenWeightedLora

CASES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "topk": {"top_k": 2, "normalize": "kept"},
    "layerwise": {"layerwise": True, "depth": 2, "width": 6, "temperature": 0.7},
}
"""Options of the classifier of each case."""

WEIGHT = 1.3
"""Global weight of all adapters."""


def x_lora_errors(arrays: dict[str, Tensor], case: str) -> Iterator[tuple[str, float]]:
    """Yield the errors of the scalings and of the output of one layer."""
    own = {
        name.partition(".")[2]: value
        for name, value in arrays.items()
        if name.startswith(f"{case}.")
    }
    features, count = own["hidden"].shape[-1], own["scalings"].shape[-1]
    made = Scalings(features, count, 2, dtype=own["hidden"].dtype, **CASES[case])
    made.load_state_dict({k.removeprefix("cls."): v for k, v in own.items() if "cls." in k})
    found, layer = made(own["hidden"]), int(own["layer"])
    if case != "topk":  # there PEFT hands out logits, and selects in every layer
        yield f"{case}: scalings", relative_error(found, own["scalings"])
    base = plain_layer(own["W"], own["b"])[0]
    adapters = [
        LowRank(own[f"A{k}"], own[f"B{k}"], float(own[f"scaling{k}"])) for k in range(count)
    ]
    adapted = TokenWeightedLora(base, adapters, lambda _: WEIGHT * found[:, :, layer])
    yield f"{case}: y", relative_error(adapted(own["x"]), own["y"])


def check_x_lora(folder: str | Path) -> dict[str, Check]:
    """Compare with ``xlora_a.npz``."""
    arrays = read_vectors(folder, "xlora_a.npz").arrays
    errors = [one for case in CASES for one in x_lora_errors(arrays, case)]
    return {"X-LoRA": worst(errors)}
