"""Math.Find: one number of a list, or one that is computed from all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from random import Random
from statistics import median

from language.scbench.row import Row, Turn
from language.scbench.tasks.fitting import TURNS, Tokens, fit

LARGEST = 9_999  # four digits: an answer has at most 5 tokens
GAP = 20  # between the two largest and the two smallest numbers at most
QUESTION = "You should answer with only one number, no other words. The {} of the list is: "


def mf_row(number: int, draws: Random, length: int, tokens: Tokens) -> Row:
    """Return a row, see `kv_row`; its questions are about the whole list and have no depth.

    The two largest and the two smallest numbers occur once. The bounds are random, so that they
    cannot be guessed, and the length is odd, so that the median is one of the numbers.
    """
    low, high = draws.randint(GAP, 999), draws.randint(2_000, LARGEST - GAP)
    ends = [low - draws.randint(1, GAP), low, high, high + draws.randint(1, GAP)]
    middle = draws.randint(low + 1, high - 1)

    def numbers(pairs: Sequence[tuple[int, int]]) -> list[int]:
        return [*ends, middle, *chain.from_iterable(pairs)]

    pairs = fit(_pairs(draws, low + 1, high - 1), lambda pairs: str(numbers(pairs)), length, tokens)
    found = numbers(pairs)
    draws.shuffle(found)
    ordered = sorted(found)
    answers = {
        "largest number": ordered[-1],
        "second largest number": ordered[-2],
        "smallest number": ordered[0],
        "second smallest number": ordered[1],
        "median": int(median(ordered)),
        "mean, rounded down,": sum(ordered) // len(ordered),
    }
    asked = draws.sample(list(answers), TURNS)
    turns = tuple(Turn(QUESTION.format(name), answers[name]) for name in asked)
    return Row("mf", number, str(found), turns, origin="exact")


def _pairs(draws: Random, low: int, high: int) -> Iterator[tuple[int, int]]:
    while True:
        yield draws.randint(low, high), draws.randint(low, high)
