"""Retr.MultiHop: all variables that have a value, most of which they get from each other.

Text and questions are those of variable tracking in RULER (arXiv 2404.06654), of which the task is
made.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from itertools import chain, cycle, pairwise
from random import Random

from language.scbench.row import Row, Turn
from language.scbench.tasks.fitting import TURNS, Tokens, depth_of, fit, spread

LETTERS = 5  # of a name
LEAST, MOST = 2, 4  # assignments from one variable to another in a chain
NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
INSTRUCTION = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n"
)
QUESTION = (
    "Question: Find all variables that are assigned the value {value} in the text above. Answer:"
    " According to the chain(s) of variable assignment in the text above, {number} variables are"
    " assigned the value {value}, they are: "
)


def vt_row(number: int, draws: Random, length: int, tokens: Tokens) -> Row:
    """Return a row, see `kv_row`; the depth is that of the first assignment of a chain."""
    sizes = [1 + draws.randint(LEAST, MOST) for _ in range(TURNS)]
    names = _names(draws, sum(sizes))
    groups = [tuple(names.pop() for _ in range(size)) for size in sizes]
    values = [str(value) for value in draws.sample(range(10_000, 100_000), TURNS)]
    assigned = [
        [f"VAR {group[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in pairwise(group))]
        for value, group in zip(values, groups, strict=True)
    ]
    flat = list(chain.from_iterable(assigned))
    noise = fit(cycle(NOISE), lambda pieces: _text([*flat, *pieces]), length, tokens)
    context = _text(_scattered(draws, assigned, noise))
    turns = (
        Turn(
            QUESTION.format(value=value, number=len(group)),
            group,
            depth=depth_of(context, f"VAR {group[0]} = "),
        )
        for value, group in zip(values, groups, strict=True)
    )
    return Row("vt", number, context, tuple(turns), origin="exact")


def _names(draws: Random, number: int) -> list[str]:
    """Return different names."""
    names = dict[str, None]()
    while len(names) < number:
        names["".join(draws.choices(string.ascii_uppercase, k=LETTERS))] = None
    return list(names)


def _scattered(draws: Random, assigned: Sequence[Sequence[str]], noise: Sequence[str]) -> list[str]:
    """Return noise with the assignments of each chain in their order, the first in its own part."""
    last = len(noise)
    placed: list[tuple[int, int, str]] = [(slot, -1, line) for slot, line in enumerate(noise)]
    for lines, start in zip(assigned, spread(draws, last, len(assigned)), strict=True):
        slots = sorted(draws.randint(start, last) for _ in lines[1:])
        both = zip((start, *slots), lines, strict=True)
        placed += [(slot, order, line) for order, (slot, line) in enumerate(both)]
    return [line for *_, line in sorted(placed, key=lambda item: item[:2])]


def _text(lines: Sequence[str]) -> str:
    return "\n".join((INSTRUCTION, *lines))
