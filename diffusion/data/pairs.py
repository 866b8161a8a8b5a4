"""Pairs of a subject and a style, some of which no gate is ever trained on."""

from typing import NamedTuple

from diffusion.data.concepts import SUBJECTS, caption_of
from diffusion.data.styles import STYLES

PER_SUBJECT = 3
"""Test pairs of each subject; each style is then in two of them."""

SECONDS = (
    "inverted", "swapped", "upside_down", "grey", "framed", "sepia", "tiled", "night", "rainbow",
    "checkered",
)  # fmt: skip
"""Styles that are put on a drawing that is in a style already."""


class Combination(NamedTuple):
    """Adapters that should work together.

    Attributes:
        subject: Its subgroup.
        styles: One style, or two that are applied in order.
    """

    subject: str
    styles: tuple[str, ...]

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters, the subject first."""
        return (self.subject, *self.styles)

    @property
    def name(self) -> str:
        """Name in tables."""
        return " + ".join(self.adapters)

    def caption(self, annotation: str) -> str:
        """Return the caption of a drawing of the subject in these styles."""
        return caption_of(annotation, self.styles)


def held_out_pairs() -> list[Combination]:
    """Return 48 pairs for tests: each subject in three of them, each style in two."""
    names = list(STYLES)
    return [
        Combination(subject, (names[(place * PER_SUBJECT + number) % len(names)],))
        for place, subject in enumerate(SUBJECTS)
        for number in range(PER_SUBJECT)
    ]


def training_pairs() -> list[Combination]:
    """Return the other 336 pairs."""
    tested = set(held_out_pairs())
    every = [Combination(subject, (style,)) for subject in SUBJECTS for style in STYLES]
    return [pair for pair in every if pair not in tested]


def with_second_style(pairs: list[Combination], shift: int = 0) -> list[Combination]:
    """Return each pair with one more style, each of which is about equally frequent.

    Args:
        pairs: Subjects with one style.
        shift: Place in the list of second styles where it begins.
    """
    found = []
    for place, pair in enumerate(pairs):
        second = SECONDS[(place + shift) % len(SECONDS)]
        if second == pair.styles[0]:
            second = SECONDS[(place + shift + 1) % len(SECONDS)]
        found.append(Combination(pair.subject, (*pair.styles, second)))
    return found
