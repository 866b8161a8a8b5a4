"""Words and colors of methods, variables and units in figures."""

from collections.abc import Iterable

from harness.figures.style import colors_of
from weather.state import SHORT_NAMES, ChannelSpec
from weather.variables import unit_of

UNGUIDED = ("free run", "background", "climatology", "persistence")

_SUPERSCRIPTS = {"m2": "m²", "s-1": "s⁻¹", "s-2": "s⁻²", "kg-1": "kg⁻¹"}


def method_colors(methods: Iterable[str]) -> dict[str, str]:
    """Give every method a color, those that see no observations the muted one."""
    names = list(methods)
    muted = [name for name in names if any(w in name.lower().replace("_", " ") for w in UNGUIDED)]
    return colors_of(names, muted=muted)


def unit_label(variable: str) -> str:
    """Return the unit of a variable for display, such as ``m² s⁻²``."""
    return " ".join(_SUPERSCRIPTS.get(part, part) for part in unit_of(variable).split())


def channel_unit(channels: ChannelSpec, label: str) -> str:
    """Return the unit of a channel, by its label such as ``z500``, for display."""
    variable, _ = [*channels][channels.labels.index(label)]
    return unit_label(variable)


def field_label(variable: str, level: int | None) -> str:
    """Return a name for titles, such as ``geopotential at 500 hPa`` or ``2m temperature``."""
    words = variable.replace("_", " ")
    if level is None:
        return words
    return f"{words} at {level} hPa" if level >= 50 else f"{words}, layer {level}"


def units_note(channels: ChannelSpec) -> str:
    """Return a sentence on what the short names of metrics mean, with the unit of each variable."""
    names = dict.fromkeys(name for name, _ in channels)
    short = [f"`{SHORT_NAMES.get(n, n)}` {n.replace('_', ' ')} in {unit_label(n)}" for n in names]
    return f"Fields and the units of their errors: {', '.join(short)}."
