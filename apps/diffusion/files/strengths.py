"""Names of adapters on the command line, and strengths by these names."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from core_gates.errors import GatesError

_NAME = re.compile(r"[A-Za-z0-9._ +()-]{1,128}")


def named_files(files: Sequence[str]) -> dict[str, Path]:
    """Return the name of each adapter and where it lies.

    Args:
        files: Paths, whose stems are the names, or ``NAME=PATH``.

    Raises:
        GatesError: A file is missing, or two have one name.
    """
    found: dict[str, Path] = {}
    for text in files:
        name, equals, place = text.partition("=")
        path = Path(place) if equals and not Path(text).exists() else Path(text)
        if path == Path(text):
            name = path.name if path.is_dir() else path.stem
        if not path.exists():
            raise GatesError(f"{path} does not exist: name a .safetensors file")
        if not _NAME.fullmatch(name):
            raise GatesError(
                f"{name!r} is no name for an adapter: name it by NAME=PATH, in letters, digits, "
                "dots and dashes"
            )
        if name in found:
            raise GatesError(
                f"{found[name]} and {path} are both called {name!r}: name one by NAME=PATH"
            )
        found[name] = path
    return found


def strengths_of(text: str, names: Sequence[str], option: str = "--weights") -> dict[str, float]:
    """Return the strength of each adapter.

    Args:
        text: Such as ``a:0.8,b``, where b has strength 1, or ``0.8,1``, one number per adapter.
        names: Of the adapters; those that are not named have strength 1.
        option: That the text comes from.

    Raises:
        GatesError: A name is unknown or occurs twice, or a strength is no finite number.
    """
    parts = [part.strip() for part in text.split(",")]
    if not any(":" in part or part in names for part in parts):
        if len(parts) != len(names):
            raise GatesError(f"{option} gives {len(parts)} numbers for {len(names)} adapters")
        return {n: _number(part, n, option) for n, part in zip(names, parts, strict=True)}
    found: dict[str, float] = {}
    for part in parts:
        name, colon, number = part.partition(":")
        if name not in names:
            close = get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
            raise GatesError(f"{option} names {name!r}, which is none of the adapters ({hint})")
        if name in found:
            raise GatesError(f"{option} names {name!r} twice: name it once")
        found[name] = _number(number, name, option) if colon else 1.0
    return {name: found.get(name, 1.0) for name in names}


def _number(text: str, name: str, option: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise GatesError(f"{option} gives {name!r} the strength {text!r}, expected a finite number")
    return value
