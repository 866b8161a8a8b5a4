"""``record.json``: what a result was made with, so that it is never taken for another one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from core_gates.errors import GatesError
from harness.experiment.piece import Piece, Setting, differences
from harness.files import sha256, write_json

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
        files: SHA-256 of the files of the result, by name; empty in records that are older.
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
    files: Mapping[str, str] = {}

    @classmethod
    def of(cls, piece: Piece, **others: Any) -> Record:
        """Return the record of a piece."""
        return cls(piece.fingerprint, piece.identity, piece.settings, **others)

    def write(self, folder: Path) -> Path:
        """Write ``record.json`` into a folder."""
        return write_json(folder / RECORD, self._asdict())


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a result, by name."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {p.relative_to(folder).as_posix(): sha256(p) for p in found if p.name != RECORD}


def refuse_changed(folder: Path, record: Record) -> None:
    """Refuse a result whose files are not those that were recorded.

    Raises:
        GatesError: A file is missing, was changed, or is of another result.
    """
    for name, digest in record.files.items():
        path = folder / name
        if not path.is_file() or sha256(path) != digest:
            what = "was changed after" if path.is_file() else "is missing that was there when"
            raise GatesError(
                f"{path} {what} {RECORD} was written: delete {folder} to have it made again"
            )


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
