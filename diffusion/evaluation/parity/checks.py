"""All checks by name, a handful of groups, and the bars of what they find."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from diffusion.evaluation.parity.worst import Check

ROOM = "diffusion.evaluation.parity"
GROUPS: Mapping[str, tuple[str, ...]] = {
    "golden vectors": (
        "golden.encoder:check_encoder",
        "golden.gates:check_gates",
        "golden.k_lora:check_k_lora",
        "golden.merges:check_merges",
        "golden.x_lora:check_x_lora",
    ),
    "files that are read": ("files.reading:check_reading",),
    "files that are written": (
        "files.round_trips:check_round_trips",
        "files.exports:check_exports",
        "files.embeddings:check_embeddings",
    ),
    "adapters on a base": (
        "models.neutral:check_neutral",
        "models.detaching:check_detaching",
        "models.quantized:check_quantized",
        "models.fused:check_fused",
    ),
    "published sizes": ("models.published:check_published",),
    "compiled": ("models.recompiling:check_recompiling",),
}
"""Name of a group -> its checks, as module and function."""


class Bound(NamedTuple):
    """How far a figure may be from what it should be.

    Attributes:
        tolerance: Largest distance.
        target: What it should be.
    """

    tolerance: float
    target: float = 0.0


BOUNDS: Mapping[str, Bound] = {
    "encoder: values and loss": Bound(1e-6),
    "encoder: gradients": Bound(1e-6),
    "gate: four variants with gradients": Bound(1e-6),
    "gated layer, also without some adapters": Bound(1e-6),
    "K-LoRA: choices": Bound(1e-6),
    "PEFT: merges": Bound(1e-6),
    "X-LoRA": Bound(1e-6),
    "ΔW of sample files": Bound(1e-5),
    "ΔW of the product prefix × names × factors": Bound(1e-5),
    "ΔW of files in half precision and 8 bits": Bound(1e-2),
    "silent no-ops": Bound(0),
    "round trips through five formats": Bound(1e-6),
    "refusals that name no layer": Bound(0),
    "diffusers' own loader on our export": Bound(1e-5),
    "embeddings under gauge, rank, dialect, names and metadata": Bound(1e-5),
    "permuted adapters": Bound(1e-5),
    "neutral gates against PEFT's set_adapters": Bound(1e-5),
    "one adapter against fuse_lora": Bound(1e-5),
    "bits changed after detach": Bound(0),
    "bits changed in a file saved while attached": Bound(0),
    "neutral gates on GGUF Q8_0, int8 and float8 bases": Bound(1e-5),
    "groups of split layers against fused ones": Bound(1e-6),
    "fused modules of FLUX.1-dev": Bound(0, 304),
    "millions of parameters of gates": Bound(0, 27.3),
    "millions of parameters of the encoder": Bound(0, 112.9),
    "parameters of published files that do not fit": Bound(0),
    "recompilations at an exchange": Bound(0),
    "compiled after an exchange against uncompiled": Bound(1e-5),
}
"""Name of a figure -> its bound."""


def run_group(group: str, folder: str | Path) -> dict[str, Check]:
    """Run the checks of a group.

    Args:
        group: Of :data:`GROUPS`.
        folder: Of the golden vectors.

    Returns:
        Name of a figure -> the worst case of all that was checked.

    Raises:
        GatesError: A golden vector is missing.
    """
    found: dict[str, Check] = {}
    for name in GROUPS[group]:
        module, _, function = name.partition(":")
        check: Callable[[str | Path], dict[str, Check]]
        check = getattr(importlib.import_module(f"{ROOM}.{module}"), function)
        found |= check(folder)
    return found
