"""What an evaluation keeps so that figures can be drawn from it later."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core_gates.errors import GatesError
from harness.files import replacing


def save_pictures(path: Path, pictures: Mapping[str, Tensor]) -> None:
    """Write tensors by name, atomically."""
    with replacing(path) as partial:
        save_file({name: t.contiguous().clone() for name, t in pictures.items()}, partial)


def load_pictures(path: Path) -> dict[str, Tensor]:
    """Read what :func:`save_pictures` wrote; nothing where there is no file.

    Raises:
        GatesError: The file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise GatesError(
            f"{path} is damaged ({error}): run `gates weather evaluate` again"
        ) from error
