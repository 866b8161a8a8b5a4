"""Files that are written in another format and read again, or refused by the names of layers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from diffusion.evaluation.parity.files.dialects import NAMES, base_of
from diffusion.evaluation.parity.files.factors import kinds_of
from diffusion.evaluation.parity.files.writer import Written, write
from diffusion.evaluation.parity.worst import Check, worst
from diffusion.lora_file import FormatError, LoraBundle, load_lora, save_lora

FORMATS = ("diffusers", "kohya", "bfl", "comfyui", "peft")


def place(folder: Path, format: str) -> Path:
    """Return where a file of a format is written."""
    return folder / ("out" if format == "peft" else "out.safetensors")


def change_error(
    found: LoraBundle, expected: LoraBundle, base: dict[str, Tensor] | None = None
) -> float:
    """Return the largest error of a ΔW by its norm; infinite if layers differ.

    Args:
        found: What was read again.
        expected: What was written.
        base: Weights that DoRA refers to.
    """
    if set(found.modules) != set(expected.modules):
        return math.inf
    errors = []
    for name in expected.modules:
        weight = None if base is None else base[name].float()
        one, two = found.delta_weight(name, weight), expected.delta_weight(name, weight)
        errors.append(float(torch.linalg.matrix_norm(one - two) / torch.linalg.matrix_norm(two)))
    return max(errors)


def round_trip(written: Written, format: str) -> tuple[float | None, str]:
    """Return the error of a file that is written in a format and read again.

    Returns:
        The error, or None and the message where it is refused.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        base = base_of(written.family)
        bundle = load_lora(written.save(folder / "in.safetensors"), base)
        try:
            out = save_lora(bundle, place(folder, format), format)
        except FormatError as refusal:
            return None, str(refusal)
        again = load_lora(out, base)
    error = change_error(again, bundle, written.base)
    return (error if again.family == bundle.family else math.inf), ""


def every_trip() -> Iterator[tuple[str, Written, str]]:
    """Yield all dialects of names and kinds of factors with every format."""
    for names in NAMES:
        for kind in kinds_of(names):
            written = write(names, kind)
            for format in FORMATS:
                yield f"{names} {kind} as {format}", written, format


def check_round_trips(folder: str | Path) -> dict[str, Check]:
    """Write everything in every format; a refusal must name a layer that it is about."""
    del folder
    errors, refused = [], []
    for name, written, format in every_trip():
        error, message = round_trip(written, format)
        if error is None:
            named = any(module in message for module in written.expected)
            refused.append((name, float(not named)))
        else:
            errors.append((name, error))
    silent = sum(count for _, count in refused)
    return {
        "round trips through five formats": worst(errors),
        "refusals that name no layer": Check(silent, len(refused), worst(refused).at),
    }
