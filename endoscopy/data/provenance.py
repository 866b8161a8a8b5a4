"""What a network was trained with, so that it is never taken for another one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import pandas as pd

LISTED = 3  # differences that a message names
RENDERED = "SYNTH"


class Provenance(NamedTuple):
    """What decided a training, and which objects it saw.

    Attributes:
        settings: Everything that decides the weights, by name; plain values for JSON.
        objects: Keys of the training objects, see :func:`object_key`.
    """

    settings: Mapping[str, Any]
    objects: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """A short hash of the settings."""
        return fingerprint(self.settings)

    def state(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        objects = list(self.objects)
        return {
            "fingerprint": self.fingerprint,
            "settings": dict(self.settings),
            "objects": objects,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Provenance:
        """Restore what :meth:`state` returned."""
        return cls(dict(state["settings"]), tuple(state["objects"]))


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of settings, whatever their order."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(found: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> str:
    """Say where settings differ, as ``trainer.max_epochs 2, now 9``; empty if nowhere.

    Args:
        found: Those of an earlier training; None where they are not known.
        wanted: Those of now.
    """
    if not found:
        return "its settings are not known"
    names = [n for n in {**wanted, **found} if found.get(n) != wanted.get(n)]
    parts = [f"{n} {_short(found.get(n))}, now {_short(wanted.get(n))}" for n in names[:LISTED]]
    if len(names) > LISTED:
        parts.append(f"{len(names) - LISTED} more")
    return "; ".join(parts)


def object_key(database: str, unique_id: str, size_mm: float) -> str:
    """Return a short hash that tells an object from all others without naming it.

    Names of rendered objects repeat from set to set, so their sizes tell them apart; sizes of real
    ones are left out, since a hash of a whole number of millimeters gives the number away.
    """
    size = f"/{size_mm:.4f}" if database == RENDERED else ""
    return hashlib.sha256(f"{database}/{unique_id}{size}".encode()).hexdigest()[:12]


def object_keys(frames: pd.DataFrame) -> list[str]:
    """Return the keys of the objects of a frame table, sorted; see :func:`object_key`."""
    one = frames.drop_duplicates("unique_id")
    columns = zip(one["database"], one["unique_id"], one["gt"], strict=True)
    return sorted(object_key(*values) for values in columns)


def plain(value: Any) -> Any:
    """Return a value, such as a loss with its arguments, as plain values for JSON."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, Iterable):
        return [plain(item) for item in value]
    return {"class": type(value).__name__} | plain(vars(value))


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
