"""A piece of work: its method, seed and settings, and the record of its result."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from core_gates.errors import GatesError
from harness.files import sha256, short_digest, write_json

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
        given = plain(settings or {})
        self.settings: Setting = {n: given[n] for n in sorted(given) if given[n] is not None}

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
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


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
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {p.relative_to(folder).as_posix(): sha256(p) for p in files if p.name != RECORD}


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
    identity, wanted = dict(record.identity), piece.identity
    recorded = {**dict(record.settings), **_flat(identity)}
    return differences(recorded, {**piece.settings, **_flat(wanted)})


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    keys = identity.get("keys") or {}
    return {"method": identity.get("method"), "seed": identity.get("seed"), **keys}
