"""``record.json``: what a result was made with, so that it is never taken for another one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from harness.experiment.piece import Piece, Setting, differences
from harness.files import write_json

RECORD = "record.json"
LENGTHENED = "lengthened"  # the setting of a training run that was resumed for longer
Origin = Literal["trained", "migrated"]


class Record(NamedTuple):
    """What decided a result, and what it saw.

    Attributes:
        fingerprint: Of identity and settings.
        identity: Method, seed and keys.
        settings: All that decides the result.
        objects: Short hashes of what was trained on: objects, files or days.
        facts: What else is worth knowing.
        seconds: Time of the work, of a killed and resumed one since it was last resumed.
        revision: Of the source tree.
        origin: ``trained``, or ``migrated`` where settings were written later than the result.
        command: Command line.
        package: Package that it may ship with; empty for none.
        configuration: Name of the configuration.
    """

    fingerprint: str
    identity: Mapping[str, Any]
    settings: Setting
    objects: Sequence[str] = ()
    facts: Mapping[str, Any] = {}
    seconds: float = 0.0
    revision: str | None = None
    origin: Origin = "trained"
    command: str = ""
    package: str = ""
    configuration: str = ""

    @classmethod
    def of(cls, piece: Piece, **others: Any) -> Record:
        """Return the record of a piece."""
        return cls(piece.fingerprint, piece.identity, piece.settings, **others)

    def write(self, folder: Path) -> Path:
        """Write ``record.json`` into a folder."""
        return write_json(folder / RECORD, self._asdict())


def read_record(folder: Path) -> Record | None:
    """Return the record of a result; None where there is none, or it is damaged."""
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        record = Record(**{name: content[name] for name in Record._fields if name in content})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    whole = isinstance(record.settings, dict) and isinstance(record.identity, dict)
    return record if whole else None


def gap(record: Record | None, piece: Piece) -> str:
    """Return where a result differs from a piece in identity or settings; empty if nowhere."""
    if record is None:
        return "its settings are not known"
    if record.fingerprint == piece.fingerprint:
        return ""
    identity, own = dict(record.identity), piece.identity
    found = {**dict(record.settings), **_flat(identity)}
    return differences(found, {**piece.settings, **_flat(own)})


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    keys = identity.get("keys") or {}
    return {"method": identity.get("method"), "seed": identity.get("seed"), **keys}
