"""What a reader found: every row that was left out or repaired, with the reason and the place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from core_gates.errors import GatesError

Action = Literal["excluded", "repaired", "noted"]
SHOWN = 3
UNREADABLE_LIMIT = 0.01


@dataclass
class ReadReport:
    """Counts and places of everything unusual; nothing is dropped silently.

    Attributes:
        source: What was read.
        found: Rows that the source holds, before any was excluded.
        findings: (action, reason) to the places, one entry for each row: paths, or keys such
            as ``003-001_2 frame 17``.
        unreadable: Files that could not be read; more than 1 % of all is an error.
        files: Files that were looked at.
        base: Folder to which relative paths of the source refer; empty if it has none.
        notes: Lines about the source as a whole.
    """

    source: str
    found: int = 0
    findings: dict[tuple[Action, str], list[str]] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    files: int = 0
    base: str = ""
    notes: list[str] = field(default_factory=list)

    def add(self, action: Action, reason: str, places: Iterable[object]) -> None:
        """Record rows; an excluded row is one that the table does not hold.

        Raises:
            ValueError: The action is unknown.
        """
        if action not in get_args(Action):
            raise ValueError(f"action must be one of {get_args(Action)}, got {action!r}")
        if places := [str(place) for place in places]:
            self.findings.setdefault((action, reason), []).extend(places)

    def skip_unreadable(self, path: object, reason: str, rows: int = 1) -> None:
        """Record a damaged or missing file and the rows that go with it."""
        self.unreadable.append(str(path))
        self.add("excluded", reason, [path] * rows)

    def require_readable(self) -> None:
        """Refuse a source of which more than 1 % cannot be read.

        Raises:
            GatesError: Too many files are unreadable.
        """
        bad = len(self.unreadable)
        if bad > UNREADABLE_LIMIT * max(self.files, 1):
            first = self.unreadable[0]
            why = [reason for (_, reason), places in self.findings.items() if first in places]
            why += [f"relative paths begin in {self.base}"] if self.base else []
            raise GatesError(
                f"{self.source}: {bad} of {self.files} files cannot be read, more than 1 %, the "
                f"first is {first} ({'; '.join(why)}); copy or download them again"
            )

    def count(self, reason: str) -> int:
        """Return how often a reason occurred, under any action."""
        return sum(len(places) for (_, known), places in self.findings.items() if known == reason)

    def total(self, action: Action) -> int:
        """Return how many rows were excluded, repaired or noted."""
        return sum(len(places) for (known, _), places in self.findings.items() if known == action)

    def reasons(self, action: Action) -> list[str]:
        """Return every reason of an action and how often it occurred, such as ``2: no size``."""
        return [
            f"{len(places)}: {reason}"
            for (known, reason), places in self.findings.items()
            if known == action
        ]

    def merge(self, other: ReadReport) -> None:
        """Add another report, for example of a second data set."""
        self.source = f"{self.source}, {other.source}" if self.source else other.source
        self.found += other.found
        self.files += other.files
        self.unreadable += other.unreadable
        self.notes += other.notes
        for (action, reason), places in other.findings.items():
            self.add(action, reason, places)

    def lines(self) -> list[str]:
        """Return one line for each note and each reason, with the first places."""
        summary = f"{self.source}: {self.found} rows, {self.found - self.total('excluded')} kept"
        rows = [
            f"{action} {len(places)}: {reason} ({', '.join(dict.fromkeys(places[:SHOWN]))}"
            f"{', ...' if len(places) > SHOWN else ''})"
            for (action, reason), places in self.findings.items()
        ]
        return [summary, *rows, *self.notes]

    def to_dict(self) -> dict[str, Any]:
        """Return everything, all places included, for a JSON file."""
        return {
            "source": self.source,
            "found": self.found,
            "kept": self.found - self.total("excluded"),
            "files": self.files,
            "unreadable": self.unreadable,
            "findings": [
                {"action": action, "reason": reason, "count": len(places), "places": places}
                for (action, reason), places in self.findings.items()
            ],
            "notes": self.notes,
        }
