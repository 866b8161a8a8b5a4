"""What is read from files: ΔW of each layer, and whether anything is lost without a word."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion.evaluation.parity.files.dialects import NAMES, PREFIXES, base_of
from diffusion.evaluation.parity.files.factors import kinds_of, product
from diffusion.evaluation.parity.files.writer import Written, write
from diffusion.evaluation.parity.golden.vectors import SAMPLES
from diffusion.evaluation.parity.worst import Check, relative_error, worst
from diffusion.lora_file import LoraBundle, load_lora

LAYERS = 4
"""Layers of a file of the product; every layer is read under every prefix besides."""

COARSE = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
KINDS = ("lora_down", "loha", "lokr ff", "lokr ww", "dora rows", "tucker")
"""Of factors that are stored in few bits."""


def delta_error(
    bundle: LoraBundle,
    expected: Mapping[str, Any],
    base: Mapping[str, Tensor] | None = None,
) -> float:
    """Return the largest relative error of the ΔW of all layers; infinite if layers differ.

    Args:
        bundle: What was read.
        expected: Layer -> ΔW as a numpy array.
        base: Layer -> weight of a base, which DoRA refers to.
    """
    if set(bundle.modules) != set(expected):
        return math.inf
    errors = []
    for name, delta in expected.items():
        weight = None if base is None else base[name]
        found = bundle.delta_weight(name, weight)
        errors.append(relative_error(found, torch.from_numpy(np.asarray(delta))))
    return max(errors)


def lost(bundle: LoraBundle, expected: Mapping[str, Any]) -> int:
    """Return how many layers a file should change but does not, plus tensors without an effect."""
    layers = [n for n in expected if n not in bundle.modules or not bundle.modules[n].norm() > 0]
    fates = bundle.report.fates if bundle.report is not None else ()
    return len(layers) + sum(not fate.modules for fate in fates)


def samples(folder: str | Path) -> Iterator[tuple[str, float, int]]:
    """Yield the name, error and losses of each sample file of the golden vectors."""
    for path in sorted((Path(folder) / SAMPLES).glob("*.safetensors")):
        bundle = load_lora(path)
        with np.load(path.with_name(f"{path.stem}.expected.npz")) as expected:
            deltas = dict(expected)
        yield path.stem, delta_error(bundle, deltas), lost(bundle, deltas)


def written_files() -> Iterator[tuple[str, Written, bool]]:
    """Yield every combination, each with its name and whether a base is given to the reader.

    All of prefix × names × factors with a few layers each, then all layers under each prefix.
    """
    for combination in product():
        yield " ".join(combination), write(*combination, layers=LAYERS), True
    for names in NAMES:
        kind = kinds_of(names)[0]
        for underscored, prefixes in PREFIXES.items():
            if underscored and kind == "_lora":
                continue
            for prefix in prefixes:
                if names.startswith("processors"):
                    continue
                yield f"all of {names} {prefix}", write(names, kind, prefix), False


def coarse_files() -> Iterator[tuple[str, Written, bool]]:
    """Yield files in half precision and in eight bits."""
    for dtype in COARSE:
        for kind in KINDS:
            name = f"{kind} in {dtype}"
            yield name, write("bfl", kind, "lora_unet_", dtype=dtype), True


def read_errors(files: Iterator[tuple[str, Written, bool]]) -> Iterator[tuple[str, float, int]]:
    """Yield the name, error and losses of each file."""
    with TemporaryDirectory() as folder:
        for name, written, with_base in files:
            path = written.save(Path(folder) / "a.safetensors")
            base = base_of(written.family) if with_base else written.family
            bundle = load_lora(path, base)
            error = delta_error(bundle, written.expected, written.base)
            yield name, error, lost(bundle, written.expected)


def check_reading(folder: str | Path) -> dict[str, Check]:
    """Compare ΔW of the samples, of the whole product and of coarse files; count what is lost."""
    found = {
        "ΔW of sample files": list(samples(folder)),
        "ΔW of the product prefix × names × factors": list(read_errors(written_files())),
        "ΔW of files in half precision and 8 bits": list(read_errors(coarse_files())),
    }
    checks = {name: worst((n, error) for n, error, _ in own) for name, own in found.items()}
    losses = [(name, float(count)) for own in found.values() for name, _, count in own]
    total = sum(count for _, count in losses)
    return checks | {"silent no-ops": Check(total, len(losses), worst(losses).at)}
