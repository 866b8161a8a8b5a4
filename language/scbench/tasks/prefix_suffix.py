"""Retr.Prefix-Suffix: the string of a list that begins and ends as asked for.

The official strings are random and of varied length. Of each string that is asked for, others share
the prefix or the suffix, so that neither is enough.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Sequence
from random import Random

from language.scbench.row import Row, Turn
from language.scbench.tasks.fitting import TURNS, Tokens, between, depth_of, fit

LETTERS = string.ascii_letters + string.digits
SHORTEST, LONGEST = 40, 100
ENDS = 6  # letters of a prefix and of a suffix
QUESTION = 'Prefix: "{}"\nSuffix: "{}"\nThe string with this prefix and suffix is: '


def prefix_suffix_row(number: int, draws: Random, length: int, tokens: Tokens) -> Row:
    """Return a row, see `kv_row`."""
    strings = _strings(draws)
    asked = [next(strings) for _ in range(TURNS)]
    same_prefix = [text[:ENDS] + next(strings)[ENDS:] for text in asked]
    same_suffix = [next(strings)[:-ENDS] + text[-ENDS:] for text in asked]
    others = fit(
        strings, lambda pieces: _text([*asked, *same_prefix, *same_suffix, *pieces]), length, tokens
    )
    for more in (same_prefix, same_suffix, asked):
        others = between(draws, more, others)
    context = _text(others)
    turns = (
        Turn(QUESTION.format(text[:ENDS], text[-ENDS:]), text, depth=depth_of(context, text))
        for text in asked
    )
    return Row("prefix_suffix", number, context, tuple(turns), origin="exact")


def _strings(draws: Random) -> Iterator[str]:
    """Yield random strings, no prefix and no suffix of which occurs twice."""
    ends = set[str]()
    while True:
        text = "".join(draws.choices(LETTERS, k=draws.randint(SHORTEST, LONGEST)))
        if not ends & {text[:ENDS], text[-ENDS:]}:
            ends |= {text[:ENDS], text[-ENDS:]}
            yield text


def _text(strings: Sequence[str]) -> str:
    return (
        "Find the string with the given prefix and suffix in the list below.\n\n"
        f"Strings = {json.dumps(strings)}"
    )
