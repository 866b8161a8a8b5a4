"""What a network was trained with, so that it is never mistaken for another one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd

from harness.files import short_digest

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
        return short_digest(dict(self.settings))

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


def object_key(database: str, unique_id: str, size_mm: float) -> str:
    """Return a short hash that identifies an object without naming it.

    Names of rendered objects repeat from set to set, so their sizes are hashed too; sizes of real
    ones are left out, since the hash of a whole number of millimeters reveals the number.
    """
    size = f"/{size_mm:.4f}" if database == RENDERED else ""
    return hashlib.sha256(f"{database}/{unique_id}{size}".encode()).hexdigest()[:12]


def object_keys(frames: pd.DataFrame) -> list[str]:
    """Return the keys of the objects of a frame table, sorted; see :func:`object_key`."""
    one = frames.drop_duplicates("unique_id")
    columns = zip(one["database"], one["unique_id"], one["gt"], strict=True)
    return sorted(object_key(*values) for values in columns)
