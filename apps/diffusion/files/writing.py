"""How verbs write adapters: the format, the numbers, and what a format cannot hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from core_gates.errors import GatesError
from diffusion.lora_file import LoraBundle, save_lora, shrink_bundle
from diffusion.lora_file.config import CONFIG, WEIGHTS
from diffusion.lora_file.inspection import block_of, relative_errors
from diffusion.lora_file.writers import text_encoders
from harness.files import require_free
from harness.planning.table import readable

Format = Literal["diffusers", "peft", "kohya", "bfl", "comfyui"]
Numbers = Literal["bf16", "fp16", "fp32"]
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
FUSED = ("kohya", "bfl", "comfyui")
"""Formats in which layers are fused that are apart in diffusers."""


def require_place(output: Path, to: Format, *, overwrite: bool) -> None:
    """Refuse a place for an adapter that cannot be written, before anything is read.

    Raises:
        GatesError: It is taken and ``overwrite`` is not asked for, or is a folder with other files
            than those of an adapter, which are never replaced.
    """
    require_free(output, overwrite=overwrite)
    if to != "peft" and output.suffix != ".safetensors":
        raise GatesError(f"{output} must end with .safetensors, as {to} is a single file")
    if not output.is_dir():
        return
    others = sorted(path.name for path in output.iterdir() if path.name not in (CONFIG, WEIGHTS))
    if to != "peft" or others:
        what = f"with {others[0]} in it" if others else f"and {to} is a file"
        raise GatesError(
            f"{output} is a folder {what}, which is not replaced: choose another place"
        )


class Losses:
    """What shrinking has lost.

    Args:
        before: The adapter as it was.
        after: The adapter of lower ranks.
        errors: Relative error of each layer.
    """

    def __init__(self, before: LoraBundle, after: LoraBundle, errors: Mapping[str, float]) -> None:
        self.ranks = before.ranks(), after.ranks()
        self.errors = relative_errors(errors, before.norms())

    def table(self) -> Table:
        """Return the ranks and the error of each block."""
        table = Table("block", "rank", "shrunk to", "‖ΔW − ΔW'‖ / ‖ΔW‖")
        for block, error in self.errors.items():
            old, new = (_range(ranks, block) for ranks in self.ranks)
            table.add_row(block, old, new, f"{error:.2e}" if error else "0")
        return table


def _range(ranks: Mapping[str, int], block: str) -> str:
    own = sorted(rank for name, rank in ranks.items() if block_of(name) == block)
    return str(own[0]) if own[0] == own[-1] else f"{own[0]} to {own[-1]}"


def shrunk(
    bundle: LoraBundle, to: Format, rank: int | None, energy: float | None
) -> tuple[LoraBundle, Losses | None]:
    """Return an adapter of lower ranks and what is lost, or the same one where nothing is asked.

    Raises:
        LoraFileError: ``rank`` or ``energy`` is out of range.
    """
    if rank is None and energy is None:
        return bundle, None
    small, errors = shrink_bundle(bundle, rank, energy, fused=to in FUSED)
    return small, Losses(bundle, small, errors)


def storable(bundle: LoraBundle, to: Format, *, lenient: bool) -> tuple[LoraBundle, dict[str, int]]:
    """Return an adapter without the text encoders that a format cannot hold, and these.

    Returns:
        The adapter, and the number of layers of each text encoder that is left out.

    Raises:
        GatesError: There are some and ``lenient`` is not asked for, or nothing else is left.
    """
    holds = text_encoders(to, bundle.family)
    lost = {name: len(own) for name, own in bundle.text_encoders.items() if name not in holds}
    if not lost:
        return bundle, lost
    named = ", ".join(f"{count} layers of {name}" for name, count in lost.items())
    kept = {name: own for name, own in bundle.text_encoders.items() if name in holds}
    if not bundle.modules and not kept:
        raise GatesError(
            f"{to} cannot hold {named}, and there is nothing else: choose another --to"
        )
    if not lenient:
        raise GatesError(
            f"{to} cannot hold {named}: choose another --to, or add --lenient to leave them out"
        )
    return dataclasses.replace(bundle, text_encoders=kept), lost


def write(
    console: Console, bundle: LoraBundle, output: Path, to: Format, dtype: Numbers | None
) -> None:
    """Write an adapter and print what was written, the path last.

    Raises:
        GatesError: The format cannot hold it, or the place cannot be written.
    """
    save_lora(bundle, output, to, None if dtype is None else DTYPES[dtype])
    files = list(output.iterdir()) if output.is_dir() else [output]
    size = sum(file.stat().st_size for file in files)
    parts = [f"{len(bundle.modules)} layers"]
    parts += [f"{len(own)} of {name}" for name, own in bundle.text_encoders.items()]
    console.print(escape(f"written as {to}: {', '.join(parts)}, {readable(size, 'bytes')}"))
    console.print(escape(str(output)), soft_wrap=True)
