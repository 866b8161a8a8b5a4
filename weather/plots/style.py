"""Colors and words that the figures share; safe for color-blind readers (Okabe and Ito 2008)."""

from collections.abc import Iterable

from weather.variables import unit_of

INK = "#1f2933"
MUTED = "#7b8794"
GRID = "#e4e7eb"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#6F4E9B")
SEQUENTIAL = "viridis"
DIVERGING = "RdBu_r"
DPI = 110
TITLE_SIZE = 10.5
TEXT_SIZE = 9.0

_SUPERSCRIPTS = {"m2": "m²", "s-1": "s⁻¹", "s-2": "s⁻²", "kg-1": "kg⁻¹"}


def method_colors(methods: Iterable[str]) -> dict[str, str]:
    """Give every method a color, free runs and backgrounds the muted one."""
    colors: dict[str, str] = {}
    hues = 0
    for method in methods:
        if any(word in method.lower() for word in ("free run", "background", "climatology")):
            colors[method] = MUTED
        else:
            colors[method] = PALETTE[hues % len(PALETTE)]
            hues += 1
    return colors


def unit_label(variable: str) -> str:
    """Return the unit of a variable for display, such as ``m² s⁻²``."""
    return " ".join(_SUPERSCRIPTS.get(part, part) for part in unit_of(variable).split())


def field_label(variable: str, level: int | None) -> str:
    """Return a name for titles, such as ``geopotential at 500 hPa`` or ``2m temperature``."""
    words = variable.replace("_", " ")
    if level is None:
        return words
    return f"{words} at {level} hPa" if level >= 50 else f"{words}, layer {level}"
