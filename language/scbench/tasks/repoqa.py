"""Code.RepoQA: the function that a description is of; also mixed with Retr.KV.

The official functions are of 50 repositories in five languages, their descriptions by a language
model. These are of Python's standard library, the description is the first paragraph of the
docstring, which the function keeps: it can be found by its words.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from random import Random

from language.scbench.row import TASKS, Row, Turn
from language.scbench.tasks.fitting import ASKED, TURNS, Tokens, between, depth_of, fit, short_ones
from language.scbench.tasks.kv import QUESTION, random_uuid
from language.scbench.tasks.library import Function, library

REPOSITORY = {"lang": "python", "repo": "python/cpython"}
DESCRIPTION = "Function Description:\n{}\n\n"


def repoqa_row(number: int, draws: Random, length: int, tokens: Tokens) -> Row:
    """Return a row, see `kv_row`."""
    drawn, asked = _drawn(draws, TURNS, length, tokens)
    context = _context(draws, [*map(_code, asked)], map(_code, drawn), length, tokens)
    turns = tuple(_turn(function, context) for function in asked)
    return Row("repoqa", number, context, turns, REPOSITORY, "same form")


def repoqa_and_kv_row(number: int, draws: Random, length: int, tokens: Tokens) -> Row:
    """Return a row, see `kv_row`; functions with pairs between them, one of them in a line."""
    pairs = {random_uuid(draws): random_uuid(draws) for _ in range(TURNS // 2)}
    drawn, asked = _drawn(draws, TURNS - len(pairs), length, tokens)
    needles = [*map(_code, asked), *(_pair(*pair) for pair in pairs.items())]
    others = chain.from_iterable(
        (_code(function), _pair(random_uuid(draws), random_uuid(draws))) for function in drawn
    )
    context = _context(draws, needles, others, length, tokens)
    of_pairs = [
        Turn(QUESTION.format(key), value, task="kv", depth=depth_of(context, _pair(key, value)))
        for key, value in pairs.items()
    ]
    turns = [_turn(function, context, "repoqa") for function in asked]
    for place, turn in enumerate(of_pairs):
        turns.insert(2 * place + 1, turn)
    return Row("repoqa_and_kv", number, context, tuple(turns), REPOSITORY, "same form")


def _drawn(
    draws: Random, number: int, length: int, tokens: Tokens
) -> tuple[Iterator[Function], list[Function]]:
    """Return functions in random order, and those that are asked for."""
    functions = library().functions
    drawn = iter(draws.sample(functions, len(functions)))
    most = ASKED * length / TURNS
    return drawn, short_ones(drawn, number, most, lambda function: tokens(_code(function)))


def _context(
    draws: Random, needles: Sequence[str], others: Iterator[str], length: int, tokens: Tokens
) -> str:
    """Return pieces of code with needles between them."""
    chosen = fit(others, lambda pieces: _text([*needles, *pieces]), length, tokens)
    return _text(between(draws, needles, chosen))


def _turn(function: Function, context: str, part: str | None = None) -> Turn:
    """Return the question for a function; in a mix with the instruction, which has none else."""
    question = DESCRIPTION.format(function.description)
    if part:
        question = f"{TASKS[part].instruction}\n\n{question}"
    depth = depth_of(context, function.code)
    return Turn(question, function.code, task=part, depth=depth, extra={"name": function.name})


def _code(function: Function) -> str:
    return f"# Path: {function.path}\n{function.code}"


def _pair(key: str, value: str) -> str:
    return json.dumps({key: value})


def _text(pieces: Sequence[str]) -> str:
    return "\n\n".join(pieces)
