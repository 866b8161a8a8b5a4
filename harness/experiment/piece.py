"""A piece of work: who, with which seed, under which settings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from harness.files import short_digest

Setting = Mapping[str, Any]
"""Settings by name: plain values of JSON."""

LISTED = 3  # differences that a message names


class Piece:
    """One unit of work, equal to another if its identity and settings are.

    Args:
        method: What is trained or computed.
        seed: Of everything random; None where nothing is.
        keys: What else tells it from others, such as ``{"n": 50, "fold": 2}``.
        settings: All that decides the result, and nothing else; a setting that is None is as good
            as absent.
    """

    def __init__(
        self,
        method: str,
        seed: int | None = None,
        keys: Mapping[str, str | int | float] | None = None,
        settings: Setting | None = None,
    ) -> None:
        self.method, self.seed, self.keys = method, seed, dict(keys or {})
        found = plain(settings or {})
        self.settings: Setting = {n: found[n] for n in sorted(found) if found[n] is not None}

    @property
    def name(self) -> str:
        """Name of its folder, such as ``dual-n50-f2-s0``."""
        parts = [self.method, *(f"{key}{value}" for key, value in self.keys.items())]
        if self.seed is not None:
            parts.append(f"s{self.seed}")
        return re.sub(r"[^\w.@+=-]", "_", "-".join(parts))

    @property
    def identity(self) -> dict[str, Any]:
        """Method, seed and keys."""
        return {"method": self.method, "seed": self.seed, "keys": self.keys}

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the SHA-256 of identity and settings."""
        return short_digest({**self.identity, "settings": self.settings})

    def __getitem__(self, setting: str) -> Any:
        """Return a setting.

        Raises:
            KeyError: There is no such setting.
        """
        if setting not in self.settings:
            raise KeyError(
                f"{self.name} has no setting {setting!r}, only {', '.join(self.settings)}"
            )
        return self.settings[setting]

    def get(self, setting: str, default: Any = None) -> Any:
        """Return a setting, or ``default`` where it is absent."""
        return self.settings.get(setting, default)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Piece) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"Piece({self.name}, {self.fingerprint})"


def plain(value: Any) -> Any:
    """Return settings as plain values of JSON; an object is its class and its attributes.

    Raises:
        TypeError: A value has no attributes that could tell it from another.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, Iterable):
        return [plain(item) for item in value]
    if not hasattr(value, "__dict__"):
        raise TypeError(f"{value!r} is not a plain value: settings are numbers, words and lists")
    return {"class": type(value).__name__} | plain(vars(value))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under dotted names; ``class_path`` and ``init_args`` stay together."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flatten(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def differences(found: Setting | None, wanted: Setting) -> str:
    """Return where settings differ, as ``trainer.max_epochs 2, now 9``; empty if nowhere.

    Args:
        found: Those of an earlier result; None where they are not known.
        wanted: The current ones.
    """
    if found is None:
        return "its settings are not known"
    names = [n for n in {**wanted, **found} if found.get(n) != wanted.get(n)]
    parts = [f"{n} {_short(found.get(n))}, now {_short(wanted.get(n))}" for n in names[:LISTED]]
    if len(names) > LISTED:
        parts.append(f"{len(names) - LISTED} more")
    return "; ".join(parts)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
