"""Files that are either the old or the new one, never a torn one."""

import json
import math
import os
from pathlib import Path
from typing import Any

from core_gates.errors import GatesError


def require_free(path: Path, *, overwrite: bool) -> None:
    """Refuse a place for an output that cannot be written, before anything expensive is done.

    Raises:
        GatesError: It is taken and ``overwrite`` is not asked for, or lies below a file.
    """
    if path.exists() and not overwrite:
        raise GatesError(f"{path} exists: choose another --output or add --overwrite_output")
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            raise GatesError(
                f"{path} cannot be written, {parent} is a file and no folder: choose another "
                "--output"
            )


def write_text(path: Path, text: str) -> Path:
    """Write a text file atomically: a temporary file beside it, then a rename."""
    return write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a binary file atomically: a temporary file beside it, then a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_json(path: Path, content: Any) -> Path:
    """Write JSON atomically; NaN and infinities become null, since JSON has no such numbers."""
    return write_text(path, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
