"""Mix.Sum+NIAH: summaries of documents, and numbers that are hidden between them.

The official documents are papers, their summaries by a language model. These are docstrings of
modules and classes of Python's standard library, the summary of each is its first three sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from language.scbench.row import Row, Turn
from language.scbench.tasks.fitting import ASKED, TURNS, Tokens, between, depth_of, fit, short_ones
from language.scbench.tasks.library import Document, library

SUMMARY = 3  # sentences
MOST = 8  # sentences of a document
INTRODUCTION = "Below are documents, with pass keys hidden between them."
PASS_KEY = "The pass key {name} is {key}. Remember it. {key} is the pass key {name}."
PASS_KEY_QUESTION = "What is the pass key {}? The pass key is"
SUMMARY_QUESTION = "Summarize the document {} by its first three sentences:\n"
NAMES = ("amber", "cobalt", "ivory", "scarlet", "violet")


def summary_with_needles_row(number: int, draws: Random, length: int, tokens: Tokens) -> Row:
    """Return a row, see `kv_row`; summaries and pass keys are asked for alternately."""
    documents = library().documents
    drawn = iter(draws.sample(documents, len(documents)))
    most = ASKED * length / TURNS
    asked = short_ones(drawn, TURNS - TURNS // 2, most, lambda text: tokens(_document(text)))
    names = draws.sample(NAMES, TURNS // 2)
    keys = dict(zip(names, map(str, draws.sample(range(10_000, 100_000), len(names))), strict=True))
    hidden = [PASS_KEY.format(name=name, key=key) for name, key in keys.items()]
    needles = [*map(_document, asked), *hidden]
    others = fit(map(_document, drawn), lambda pieces: _text([*needles, *pieces]), length, tokens)
    context = _text(between(draws, needles, others))
    turns = [
        Turn(
            SUMMARY_QUESTION.format(document.name),
            " ".join(document.sentences[:SUMMARY]),
            task="summary",
            depth=depth_of(context, _document(document)),
        )
        for document in asked
    ]
    for place, (text, (name, key)) in enumerate(zip(hidden, keys.items(), strict=True)):
        turn = Turn(
            PASS_KEY_QUESTION.format(name), key, task="passkey", depth=depth_of(context, text)
        )
        turns.insert(2 * place + 1, turn)
    return Row("summary_with_needles", number, context, tuple(turns), origin="same form")


def _document(document: Document) -> str:
    return f"Document {document.name}:\n{' '.join(document.sentences[:MOST])}"


def _text(pieces: Sequence[str]) -> str:
    return "\n\n".join((INTRODUCTION, *pieces))
