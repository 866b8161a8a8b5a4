"""Reading polyp sizes as data sets write them: ``6``, ``6mm``, ``15mm-`` (15 mm or more)."""

import math
import re
import statistics
from collections.abc import Sequence
from typing import NamedTuple

LARGEST_MM = 200.0
FEWEST = 5  # objects whose sizes reveal their unit
IMPOSSIBLE = f"size is not between 0 and {LARGEST_MM:g} mm"
MISSING = frozenset({"", "nan", "na", "n/a", "none", "null", "-", "?", "unknown"})
_PATTERN = re.compile(
    r"(?P<above>>=|>|≥)?\s*(?P<number>\d+(?:[.,]\d+)?)\s*(?P<unit>mm|cm)?\s*(?P<open>-|–|\+)?"
)


class Size(NamedTuple):
    """A size, or the reason why there is none.

    Attributes:
        mm: Diameter in millimeters; NaN without one.
        censored: Whether the polyp has this size or a larger one.
        fault: Empty, or why the row has to be excluded.
        has_unit: Whether the unit is stated.
    """

    mm: float
    censored: bool = False
    fault: str = ""
    has_unit: bool = False


def parse_size(value: object) -> Size:
    """Parse a size in millimeters, or in centimeters if that is the unit.

    Args:
        value: A number or text such as ``6``, ``6mm``, ``15mm-``, ``>=15``, ``0.6 cm``.

    Returns:
        The size. A missing value is not a separate class, and never "large".
    """
    text = str(value).strip().lower() if value is not None else ""
    if text in MISSING or text == "<na>":
        return Size(math.nan, fault="size is missing")
    match = _PATTERN.fullmatch(text)
    if match is None and text.startswith("-") and _PATTERN.fullmatch(text[1:]):
        return Size(math.nan, fault=IMPOSSIBLE)
    if match is None:
        return Size(math.nan, fault="size cannot be read")
    mm = float(match["number"].replace(",", ".")) * (10.0 if match["unit"] == "cm" else 1.0)
    if not 0.0 < mm <= LARGEST_MM:
        return Size(math.nan, fault=IMPOSSIBLE)
    open_ended = bool(match["open"] or match["above"])
    return Size(mm, censored=open_ended, has_unit=match["unit"] is not None)


def look_like_centimeters(mm: Sequence[float]) -> bool:
    """Return whether sizes of objects, read as millimeters, would fit polyps in centimeters.

    Half of them at most 1.5 and none above 6: implausible for polyps in millimeters, common in
    centimeters.
    """
    return len(mm) >= FEWEST and max(mm) <= 6.0 and statistics.median(mm) <= 1.5
