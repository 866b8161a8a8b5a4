"""Which base gates were trained on: they are of no use in another one with the same layers."""

from __future__ import annotations

from pathlib import Path

from apps.diffusion.works.base import weights_digest
from core_gates.errors import GatesError
from diffusion.models.base import WEIGHTS
from harness.experiment.record import read_record
from harness.files import content_digest

TRANSFORMER = "transformer"
"""Folder of the transformer in that of a pipeline of diffusers."""


def base_digest(base: Path) -> str | None:
    """Return 16 hexadecimal digits that distinguish what gates are trained in.

    Args:
        base: Folder of an embedded base, or of a pipeline, of which the transformer alone counts;
            beyond 1 GB names and sizes of its files are hashed.

    Returns:
        None for other files, such as GGUF, which do not tell what they were made of.
    """
    if (folder := base / TRANSFORMER).is_dir():
        return content_digest(folder).sha256[:16]
    return weights_digest(base) if (base / WEIGHTS).is_file() else None


def refuse_gates_of_another(base: Path, gates: Path) -> None:
    """Refuse gates whose record names another base.

    Args:
        base: Folder of the base, or a GGUF file.
        gates: File of gates, with its record next to it if it has one.

    Raises:
        GatesError: It does.
    """
    record = read_record(gates.parent)
    trained = None if record is None else record.facts.get("base")
    found = base_digest(base)
    if trained is not None and found is not None and trained != found:
        raise GatesError(
            f"{gates} was trained on another base ({trained}), found {found}: give the gates of "
            f"{base}"
        )
