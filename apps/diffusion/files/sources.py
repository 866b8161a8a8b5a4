"""Which files of adapters are meant: files, folders of PEFT, and folders of files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from core_gates.errors import GatesError

SUFFIX = ".safetensors"
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
PEFT = "adapter_model" + SUFFIX


def find_files(paths: Iterable[str]) -> list[Path]:
    """Return the files and folders of PEFT among paths and in the folders among them.

    Args:
        paths: Files, or folders, which are searched with the folders below; links to folders are
            not followed.

    Raises:
        GatesError: A path does not exist, or a folder holds no adapter.
    """
    found: dict[Path, None] = {}
    for name in paths:
        path = Path(name)
        if not path.exists():
            raise GatesError(f"{path} does not exist: name a {SUFFIX} file or a folder of them")
        own = list(_within(path)) if path.is_dir() else [path]
        if not own:
            raise GatesError(f"{path} holds no {SUFFIX} file: name a file, or another folder")
        found |= dict.fromkeys(own)
    return list(found)


def _within(folder: Path) -> Iterator[Path]:
    """Yield what is in a folder, sorted; pickles, too, so that it is told that they are refused."""
    for place, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if PEFT in names:
            yield Path(place)
        for name in sorted(names):
            known = name.endswith(SUFFIX) or name.endswith(PICKLES)
            if known and name != PEFT and not name.startswith("."):
                yield Path(place, name)
