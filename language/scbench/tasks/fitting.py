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
FIRST = 4  # pieces, from which their size is estimated
TRIES = 150  # of another last piece, where it makes the context too long
LAST = 15  # of these with the same pieces before it
Piece = TypeVar("Piece")
Tokens = Callable[[str], int]
"""Returns the number of tokens of a text."""


def fit(
    pieces: Iterator[Piece], text: Callable[[Sequence[Piece]], str], length: int, tokens: Tokens
) -> list[Piece]:
    """Return pieces whose text is as long as asked for, within 2 %.

    Args:
        pieces: What may be taken, in this order.
        text: Returns the text of pieces, with all else of the context.
        length: Tokens of the text.
        tokens: Counts them.

    Raises:
        GatesError: There are too few pieces, or their number never comes that close.
    """
    chosen = list[Piece]()
    empty = closest = count = tokens(text(chosen))
    left = TRIES
    while abs(count - length) > TOLERANCE * length:
        size = max(1.0, (count - empty) / max(1, len(chosen)))
        if count > length:  # try others as the last, now and then with another one less
            left -= 1
            excess = 1 + int((count - length) / size) + (left % LAST == 0)
            del chosen[max(0, len(chosen) - excess) :]
            count = tokens(text(chosen))
        number = 0.9 * (length - count) / size if chosen else FIRST
        more = list(islice(pieces, max(1, int(number))))
        if not more or not left or empty > length:
            raise GatesError(
                f"no context has {length} tokens, the closest has {closest}: it is made of whole"
                " pieces, of which there may be too few; give another length"
            )
        chosen += more
        count = tokens(text(chosen))
        closest = min(closest, count, key=lambda number: abs(number - length))
    return chosen


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
