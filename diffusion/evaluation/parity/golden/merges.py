"""Merges of adapters as PEFT computes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from diffusion.evaluation.parity.golden.vectors import Vectors, read_vectors
from diffusion.evaluation.parity.worst import Check, relative_error, worst
from diffusion.lora_file import Factors, LoraBundle
from diffusion.rivals.merging import merge

LAYERS = ("l1", "l2")
CASES = (
    *(("same", m) for m in ("cat", "svd", "linear", "ties", "ties_svd", "magnitude_prune")),
    ("mixed", "cat"),
    ("mixed", "svd"),
)
"""Whether all ranks are the same, and what PEFT merged them by."""


class Merged(NamedTuple):
    """What was merged."""

    adapters: dict[str, LoraBundle]
    weights: dict[str, float]
    density: float


def merged_adapters(vectors: Vectors, tag: str) -> Merged:
    """Return the adapters of ``peft_weighted_a.npz``, of ``same`` or ``mixed`` ranks."""
    arrays, meta = vectors
    ranks = [meta["ranks"][0]] * 3 if tag == "same" else meta["ranks"]
    made = {}
    for k, (rank, alpha) in enumerate(zip(ranks, meta["alphas"], strict=True)):
        modules = {}
        for layer in LAYERS:
            down, up = (arrays[f"{tag}.{layer}.lora_{x}.a{k}.weight"] for x in "AB")
            modules[layer] = Factors(down, up, alpha / rank)
        made[f"a{k}"] = LoraBundle("flux", modules)
    return Merged(made, dict(zip(made, meta["weights"], strict=True)), meta["density"])


def merge_errors(vectors: Vectors, tag: str, method: str) -> Iterator[tuple[str, float]]:
    """Yield the errors of each ΔW and of the outputs of the merged network."""
    arrays, given = vectors.arrays, merged_adapters(vectors, tag)
    made = merge(given.adapters, given.weights, method, density=given.density)
    for layer in LAYERS:
        expected = arrays[f"{tag}.{method}.{layer}.deltaW"]
        yield f"{tag} {method}: {layer}", relative_error(made.delta_weight(layer), expected)
    found = network(arrays, {layer: made.delta_weight(layer) for layer in LAYERS})
    yield f"{tag} {method}: y", relative_error(found, arrays[f"{tag}.{method}.y"])


def network(arrays: dict[str, Tensor], changes: dict[str, Tensor]) -> Tensor:
    """Return the outputs of the network of the vectors with changed weights."""
    first, second = (arrays[f"w.{layer}.weight"] + changes[layer] for layer in LAYERS)
    return F.gelu(arrays["x"] @ first.T) @ second.T + arrays["w.l2.bias"]


def check_merges(folder: str | Path) -> dict[str, Check]:
    """Compare with ``peft_weighted_a.npz``."""
    vectors = read_vectors(folder, "peft_weighted_a.npz")
    errors = [one for case in CASES for one in merge_errors(vectors, *case)]
    return {"PEFT: merges": worst(errors)}
