"""Text of unknown origin, fit for one line of a terminal or a log."""

import re

_BLANKS = re.compile(r"[\t\n\v\f\r\x85\u2028\u2029]+")
_CONTROLS = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def clean(text: str, limit: int | None = None) -> str:
    """Return a text in one line, without control characters, text direction marks and surrogates.

    Args:
        text: Any string.
        limit: Characters that are kept; all of them if None.
    """
    line = _CONTROLS.sub("", _BLANKS.sub(" ", text))
    if limit is not None and len(line) > limit:
        return line[: limit - 1] + "…"
    return line


def listed(names: list[str], shown: int = 3) -> str:
    """Return the first names of a list, with the number of the others."""
    text = ", ".join(clean(name, 120) for name in names[:shown])
    return text if len(names) <= shown else f"{text} and {len(names) - shown} more"
