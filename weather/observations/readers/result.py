"""What a reader returns."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple, Self

import pandas as pd

from weather.observations.decoded import Decoded


class Found(NamedTuple):
    """The content of one file.

    Attributes:
        frame: A value per row, with columns of `weather.observations.table.COLUMNS`.
        reports: Reports in the file: stations at a time, or levels of soundings.
        rejected: Values that were rejected, by reason.
        note: What else is to be said, empty if nothing.
    """

    frame: pd.DataFrame
    reports: int
    rejected: Counter[str]
    note: str = ""

    @classmethod
    def of(cls, decoded: Decoded, note: str = "") -> Self:
        """Convert reports, all of which count."""
        reports = len(decoded.wide)
        return cls(decoded.canonical(), reports, decoded.rejected, note)


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file, with what is no UTF-8 replaced."""
    return path.read_text(encoding="utf-8", errors="replace").splitlines()
