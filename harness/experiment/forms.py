"""Forms of results: how they are stored in the folder of their piece."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core_gates.errors import GatesError
from harness.files import write_json

if TYPE_CHECKING:
    import pandas as pd

R = TypeVar("R")


class Form(Protocol[R]):
    """Saves a result into a folder and loads it from there.

    ``load`` raises ``GatesError`` for a file that is missing or damaged.
    """

    def save(self, folder: Path, result: R) -> None:
        """Write a result into an empty folder, where ``record.json`` joins it."""

    def load(self, folder: Path) -> R:
        """Read what :meth:`save` wrote."""


class Figures:
    """Plain values of JSON, such as scores by name; NaN survives, an infinity becomes NaN."""

    FILE = "result.json"

    def save(self, folder: Path, result: Mapping[str, Any]) -> None:
        """Write ``result.json``."""
        write_json(folder / self.FILE, dict(result))

    def load(self, folder: Path) -> dict[str, Any]:
        """Read ``result.json``.

        Raises:
            GatesError: It is missing or damaged.
        """
        path = folder / self.FILE
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise damaged(path, error) from error
        if not isinstance(found, dict):
            raise damaged(path, TypeError(f"it holds {type(found).__name__}, no names"))
        return {name: math.nan if value is None else value for name, value in found.items()}


NORMALIZATION = ("norm", "running_")
"""Parts of names of what belongs to a normalization."""

SCALES = " scales"
"""Suffix of the scales of a matrix that is stored in 8 bits."""


class Arrays:
    """Tensors by name, as safetensors; what :func:`in_8_bits` has rounded is restored."""

    FILE = "result.safetensors"

    def save(self, folder: Path, result: Mapping[str, Tensor]) -> None:
        """Write ``result.safetensors``."""
        tensors = {
            name: value.detach().cpu().clone().contiguous() for name, value in result.items()
        }
        save_file(tensors, folder / self.FILE)

    def load(self, folder: Path) -> dict[str, Tensor]:
        """Read ``result.safetensors``.

        Raises:
            GatesError: It is missing or damaged.
        """
        path = folder / self.FILE
        try:
            found = load_file(path)
        except (OSError, SafetensorError) as error:
            raise damaged(path, error) from error
        return {
            name: value.float() * found[f"{name}{SCALES}"].float().unsqueeze(-1)
            if f"{name}{SCALES}" in found
            else value
            for name, value in found.items()
            if not name.endswith(SCALES)
        }


class Table:
    """A data frame, as Parquet."""

    FILE = "result.parquet"

    def save(self, folder: Path, result: pd.DataFrame) -> None:
        """Write ``result.parquet``."""
        result.to_parquet(folder / self.FILE, index=False)

    def load(self, folder: Path) -> pd.DataFrame:
        """Read ``result.parquet``.

        Raises:
            GatesError: It is missing or damaged.
        """
        import pandas as pd

        path = folder / self.FILE
        try:
            return pd.read_parquet(path)
        except (OSError, ValueError) as error:  # pa.ArrowInvalid is a ValueError
            raise damaged(path, error) from error


def cast(result: Any, dtype: torch.dtype | None) -> Any:
    """Return tensors by name in another floating-point type; any other result as it is."""
    if dtype is None or not isinstance(result, Mapping):
        return result
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in result.items()
    }


def in_8_bits(result: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return arrays with rows of 8-bit integers and a scale per row in place of matrices.

    A value is off by at most 1/254 of the largest of its row. Vectors and integers stay as they
    are, and so do the parameters and statistics of normalizations, where a small variance must not
    become 0; :class:`Arrays` stores all and restores float32.
    """
    made: dict[str, Tensor] = {}
    for name, value in result.items():
        exact = any(word in name for word in NORMALIZATION)
        if value.ndim < 2 or exact or not value.is_floating_point():
            made[name] = value
            continue
        scales = value.float().abs().amax(-1).clamp(min=1e-12) / 127
        scales = scales.bfloat16()
        rows = (value.float() / scales.float().unsqueeze(-1)).round().clamp(-127, 127)
        made |= {name: rows.to(torch.int8), f"{name}{SCALES}": scales}
    return made


def damaged(path: Path, error: Exception) -> GatesError:
    """Return the error that the file of a result cannot be read."""
    return GatesError(
        f"{path} is missing or damaged ({type(error).__name__}): delete {path.parent} to have it "
        "made again"
    )
