"""Files of golden vectors."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from core_gates.errors import GatesError

FILES = (
    "encoder_a.npz",
    "gate_a.npz",
    "gate_b.npz",
    "gated_linear_a.npz",
    "peft_weighted_a.npz",
    "xlora_a.npz",
)
SAMPLES = "formats"
"""Folder of sample files of adapters."""


class Vectors(NamedTuple):
    """What a file of golden vectors holds.

    Attributes:
        arrays: Name -> numbers.
        meta: What they were computed with.
    """

    arrays: dict[str, Tensor]
    meta: dict[str, Any]


def read_vectors(folder: str | Path, name: str) -> Vectors:
    """Read one file.

    Args:
        folder: Of the files.
        name: Of :data:`FILES`.

    Raises:
        GatesError: It is missing or damaged.
    """
    path = Path(folder) / name
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
            meta = json.loads(str(found["meta"])) if "meta" in found.files else {}
            arrays = {
                key: torch.from_numpy(np.array(found[key])) for key in found.files if key != "meta"
            }
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise GatesError(
            f"{path} is missing or damaged ({type(error).__name__}): give the folder of the golden"
            " vectors, such as tests/golden/autolora"
        ) from error
    return Vectors(arrays, meta)


def check_vectors(folder: str | Path) -> None:
    """Refuse a folder that lacks files.

    Raises:
        GatesError: Golden vectors or samples are missing.
    """
    folder = Path(folder)
    lacking = [name for name in FILES if not (folder / name).is_file()]
    if not any((folder / SAMPLES).glob("*.safetensors")):
        lacking.append(f"{SAMPLES}/*.safetensors")
    if lacking:
        raise GatesError(
            f"{folder} lacks {', '.join(lacking)}: give the folder of the golden vectors, such as"
            " tests/golden/autolora"
        )
