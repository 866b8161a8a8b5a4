"""Contexts of a given length: how many pieces they need, and where what is asked for goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from random import Random
from typing import TypeVar

from core_gates.errors import GatesError

TURNS = 5
TOLERANCE = 0.02
ASKED = 0.5  # of a context at most, where what is asked for differs in length
TRIES = 12  # of other pieces, where the first do not add up to the length
LAST = 24  # pieces that are tried as the last one
Piece = TypeVar("Piece")
Tokens = Callable[[str], int]
"""Returns the number of tokens of a text."""


def fit(
    pieces: Iterator[Piece], text: Callable[[Sequence[Piece]], str], length: int, tokens: Tokens
) -> list[Piece]:
    """Return pieces whose text is as long as asked for, within 2 %.

    Args:
        pieces: All that may be taken, in this order.
        text: Returns the text of pieces, with all else of the context.
        length: Tokens of the text.
        tokens: Counts them.

    Raises:
        GatesError: There are too few pieces, or no number of them comes that close.
    """
    drawn: list[Piece] = []
    closest = 0

    def counted(chosen: Sequence[Piece]) -> int:
        nonlocal closest
        count = tokens(text(chosen))
        if abs(count - length) < abs(closest - length):
            closest = count
        return count

    def first(number: int) -> list[Piece]:
        drawn.extend(islice(pieces, max(0, number - len(drawn))))
        return drawn[:number]

    for _ in range(TRIES):
        chosen = _below(first, counted, length)
        if abs(counted(chosen) - length) <= TOLERANCE * length:
            return chosen
        for last in first(len(chosen) + LAST)[len(chosen) :]:
            if abs(counted([*chosen, last]) - length) <= TOLERANCE * length:
                return [*chosen, last]
        del drawn[: max(1, len(chosen))]
    raise GatesError(
        f"no context has {length} tokens, the closest has {closest}: it is made of whole pieces, of"
        " which there may be too few; give another length"
    )


def _below(
    first: Callable[[int], list[Piece]], counted: Callable[[Sequence[Piece]], int], length: int
) -> list[Piece]:
    """Return as many pieces as possible whose text is not too long; it grows about evenly."""
    low, high = 0, 8  # the first is not too long, the second is not known not to be
    low_count, high_count = counted([]), 0
    while True:
        chosen = first(high)
        high_count = counted(chosen)
        if high_count > length:
            break
        low, low_count = len(chosen), high_count
        if len(chosen) < high:
            return chosen
        high = max(high + 1, round(1.02 * high * length / max(1, high_count)))
    while high - low > 1:
        share = (length - low_count) / max(1, high_count - low_count)
        middle = min(high - 1, max(low + 1, low + int(share * (high - low))))
        count = counted(first(middle))
        if count > length:
            high, high_count = middle, count
        else:
            low, low_count = middle, count
    return first(low)


def short_ones(
    pieces: Iterator[Piece], number: int, most: float, size: Callable[[Piece], int]
) -> list[Piece]:
    """Return the first pieces whose size is not above ``most``.

    Raises:
        GatesError: There are too few of them.
    """
    chosen = list(islice((piece for piece in pieces if size(piece) <= most), number))
    if len(chosen) < number:
        raise GatesError(
            f"fewer than {number} texts of at most {most:.0f} tokens to ask for, which leave place"
            " for others: give a greater length"
        )
    return chosen


def spread(draws: Random, places: int, number: int = TURNS) -> list[int]:
    """Return different places, one in each part of all, in random order.

    Raises:
        GatesError: There are fewer places.
    """
    if places < number:
        raise GatesError(
            f"a context of {places} pieces is too short for {number} questions: give a longer one"
        )
    parts = [range(n * places // number, (n + 1) * places // number) for n in range(number)]
    chosen = [draws.choice(part) for part in parts]
    draws.shuffle(chosen)
    return chosen


def between(draws: Random, needles: Sequence[Piece], others: Sequence[Piece]) -> list[Piece]:
    """Return others with needles between them, each in another part."""
    slots = spread(draws, max(len(others) + 1, len(needles)), len(needles))
    before = dict(zip(slots, needles, strict=True))
    placed = list[Piece]()
    for slot in range(max(len(others), *slots) + 1):
        placed += [before[slot]] if slot in before else []
        placed += others[slot : slot + 1]
    return placed


def depth_of(context: str, needle: str) -> float:
    """Return where a text begins that occurs once, as a fraction of the characters."""
    return round(context.index(needle) / len(context), 6)
