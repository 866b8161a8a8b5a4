"""What an application shows on ``gates tour``."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from core_gates.errors import GatesError
from harness.report.page import Page


class StopSkippedError(GatesError):
    """A stop has nothing to show, for the reason that the message gives."""


class TourRow(NamedTuple):
    """One line of the table.

    Attributes:
        system: What was shown, for example ``Adas (increment)``.
        metric: Which figure, with its unit.
        value: The figure.
        baseline: What it is compared with, with its figure.
        verdict: In words, such as ``better`` or ``within 1.2x``.
        good: Whether it is ahead of every baseline, or a figure as it should be; None where nothing
            is claimed.
    """

    system: str
    metric: str
    value: str
    baseline: str
    verdict: str
    good: bool | None = None


class TourStop(NamedTuple):
    """What an application shows.

    Attributes:
        title: Heading of its part of the page.
        rows: Its lines of the table.
        draw: Adds text, tables and figures to the page, below the heading.
    """

    title: str
    rows: Sequence[TourRow]
    draw: Callable[[Page], None]
