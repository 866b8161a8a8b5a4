"""Rows of SCBench that are made: as the official ones, or of the same form with another text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from random import Random
from typing import Any

from core_gates.errors import GatesError, check_option
from language.scbench.row import TASKS, Row
from language.scbench.tasks.fitting import Tokens
from language.scbench.tasks.kv import FORMS, SYMBOLS, UUIDS, kv_row, symbols_of
from language.scbench.tasks.many_shot import many_shot_row
from language.scbench.tasks.mf import mf_row
from language.scbench.tasks.prefix_suffix import prefix_suffix_row
from language.scbench.tasks.repoqa import repoqa_and_kv_row, repoqa_row
from language.scbench.tasks.summary_with_needles import summary_with_needles_row
from language.scbench.tasks.vt import vt_row

GENERATORS: Mapping[str, Callable[[int, Random, int, Tokens], Row]] = {
    "prefix_suffix": prefix_suffix_row,
    "vt": vt_row,
    "mf": mf_row,
    "many_shot": many_shot_row,
    "repoqa": repoqa_row,
    "repoqa_and_kv": repoqa_and_kv_row,
    "summary_with_needles": summary_with_needles_row,
}
"""All but Retr.KV, which has several forms."""


def generate(
    task: str, count: int, length: int, seed: int, tokenizer: Any, form: str = UUIDS
) -> list[Row]:
    """Return rows whose contexts have a length, within 2 %.

    Args:
        task: Short name of the task.
        count: Rows; the first ones are the same for any number of them.
        length: Tokens of a context, without instruction and questions.
        seed: Of the random numbers. Functions and documents also depend on the version of Python.
        tokenizer: Of transformers.
        form: Of Retr.KV: ``uuid`` as published, ``words``, or ``symbols``, which is for the
            retriever alone, as it reads nothing else.

    Raises:
        GatesError: The task is unknown, has questions that people wrote, or has no such form; or
            the length is too short, or too long for the words or symbols.
    """
    check_option("task", task, TASKS, GatesError)
    check_option("form", form, FORMS, GatesError)
    if TASKS[task].generated is None:
        raise GatesError(
            f"{task} has questions that people wrote, rows of it are not made: give the official"
            " files by --data"
        )
    if form == SYMBOLS and task != "kv":
        raise GatesError(f"{task} has no form of symbols, only kv does: choose another form")
    symbols = symbols_of(tokenizer.get_vocab()) if form == SYMBOLS else []

    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    make = GENERATORS.get(task, partial(kv_row, form=form, symbols=symbols))
    name = f"{task} {form}" if task == "kv" else task
    draws = (Random(f"{seed} {name} {number}") for number in range(count))
    return [make(number, of_row, length, tokens) for number, of_row in enumerate(draws)]
