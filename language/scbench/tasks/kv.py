"""Retr.KV: the value of a key in an object of JSON.

The official form has UUIDs. Small models fail on these, so keys may also be common words with a
number of five digits as their value, and a question be the beginning of such a pair; or symbols, of
which the vocabulary of the retriever consists.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from uuid import UUID

from core_gates.errors import GatesError
from language.scbench.row import Origin, Row, Turn
from language.scbench.tasks.fitting import Tokens, depth_of, fit, spread
from language.scbench.tasks.words import KEYS

UUIDS, WORDS, SYMBOLS = "uuid", "words", "symbols"
FORMS = (UUIDS, WORDS, SYMBOLS)
NEW_TOKENS: Mapping[str, int | None] = {UUIDS: None, WORDS: 8, SYMBOLS: 3}
PARTS = 3  # of the value of symbols: one token could be decided by the prefill
NUMBERS = range(10_000, 100_000)
SYMBOL = re.compile(r"s\d{4}")
QUESTION = 'Key: "{}"\nThe value associated with the specified key is: '
PAIR = '\n"{}": "'


def kv_row(
    number: int, draws: Random, length: int, tokens: Tokens, form: str, symbols: Sequence[str]
) -> Row:
    """Return a row.

    Args:
        number: Of the row.
        draws: Random numbers.
        length: Tokens of the context.
        tokens: Counts them.
        form: One of `FORMS`.
        symbols: Of the form of that name, no other text occurs in a context, and none twice.

    Raises:
        GatesError: There are too few words or symbols for the length.
    """
    pairs = fit(_pairs(draws, form, symbols), _text, length, tokens)
    context = _text(pairs)
    asked = [pairs[place] for place in spread(draws, len(pairs))]
    question = PAIR if form == WORDS else QUESTION
    turns = (
        Turn(question.format(key), value, depth=depth_of(context, json.dumps(key) + ":"))
        for key, value in asked
    )
    origin: Origin = "exact" if form == UUIDS else "same form"
    return Row("kv", number, context, tuple(turns), origin=origin, new_tokens=NEW_TOKENS[form])


def symbols_of(vocabulary: Mapping[str, int]) -> list[str]:
    """Return the symbols of a vocabulary.

    Raises:
        GatesError: It has none.
    """
    symbols = sorted(token for token in vocabulary if SYMBOL.fullmatch(token))
    if not symbols:
        raise GatesError(
            "the tokenizer has no symbols, s0000 and so on, which are those of the retriever: give"
            f" another form, {UUIDS} or {WORDS}"
        )
    return symbols


def random_uuid(draws: Random) -> str:
    """Return a random UUID."""
    return str(UUID(int=draws.getrandbits(128), version=4))


def _pairs(draws: Random, form: str, symbols: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield keys, each once, with values, of which none occurs twice either."""
    if form == WORDS:
        values = map(str, draws.sample(NUMBERS, len(KEYS)))
        yield from zip(draws.sample(KEYS, len(KEYS)), values, strict=True)
    elif form == SYMBOLS:
        rest = iter(draws.sample(symbols, len(symbols)))
        for key, *value in zip(*[rest] * (1 + PARTS), strict=False):
            yield key, " ".join(value)
    else:
        while True:
            yield random_uuid(draws), random_uuid(draws)


def _text(pairs: Sequence[tuple[str, str]]) -> str:
    return f"JSON data:\n{json.dumps(dict(pairs))}"
