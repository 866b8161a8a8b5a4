"""Rows that are made: each is solved from its context, has the length, and is the same again."""

import json
import re
import runpy
from pathlib import Path

import pytest

from core_gates.errors import GatesError
from language.scbench.row import TASKS
from language.scbench.row_files import write_rows
from language.scbench.tasks import generate
from language.scbench.tasks.words import KEYS

SOLVERS = runpy.run_path(str(Path(__file__).parent / "solver.py"))
MADE = [name for name, task in TASKS.items() if task.generated]
WRITTEN = [name for name, task in TASKS.items() if not task.generated]
LENGTH = 5_000  # bytes
EVERYWHERE = {"mf", "many_shot"}  # what is asked for has no depth


class Retriever:
    """Reads symbols and commas alone."""

    def get_vocab(self):
        return {**{f"s{number:04}": number for number in range(400)}, ",": 400, "other": 401}

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": re.findall(r"s\d{4}|,", text)}


def solve(rows):
    for row in rows:
        for turn in row.turns:
            assert SOLVERS[row.task](row.context, turn.input, turn.task) == turn.answer


@pytest.mark.parametrize("task", MADE)
def test_a_solver_answers_every_question(task, byte_tokenizer):
    rows = generate(task, 8, LENGTH, 3, byte_tokenizer)
    assert [row.id for row in rows] == list(range(8))
    assert {row.origin for row in rows} == {TASKS[task].generated}
    assert {len(row.turns) for row in rows} == {5}
    assert len({row.context for row in rows}) == 8
    solve(rows)


@pytest.mark.slow
@pytest.mark.parametrize("task", MADE)
def test_a_solver_answers_a_thousand_rows(task, byte_tokenizer):
    solve(generate(task, 1_000, LENGTH, 4, byte_tokenizer))


@pytest.mark.parametrize("task", MADE)
def test_rows_have_the_length_they_should(task, byte_tokenizer, merging_tokenizer):
    for tokenizer, length in ((byte_tokenizer, LENGTH), (merging_tokenizer, 2_500)):
        for row in generate(task, 4, length, 0, tokenizer):
            tokens = tokenizer(row.context, add_special_tokens=False)["input_ids"]
            assert abs(len(tokens) - length) <= 0.02 * length


@pytest.mark.parametrize("task", MADE)
def test_rows_repeat_and_do_not_depend_on_their_number(task, byte_tokenizer, tmp_path):
    few, many = (generate(task, count, LENGTH, 7, byte_tokenizer) for count in (2, 4))
    assert many[:2] == few
    assert generate(task, 2, LENGTH, 8, byte_tokenizer) != few
    paths = [tmp_path / name for name in ("first", "second")]
    for path, rows in zip(paths, (few, many[:2]), strict=True):
        write_rows(path, rows)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def first_words(turn):
    if isinstance(turn.answer, tuple):
        return f"VAR {turn.answer[0]} = "
    if turn.task == "summary":
        return f"Document {turn.input.split()[3]}:"
    if turn.task == "passkey":
        return f"The pass key {turn.input.split()[5][:-1]} is"
    return turn.input.split()[1] if turn.input.startswith("Key") else turn.answer


@pytest.mark.parametrize("task", MADE)
def test_depths_are_where_the_answers_are(task, byte_tokenizer):
    rows = generate(task, 6, 3 * LENGTH, 1, byte_tokenizer)
    depths = [turn.depth for row in rows for turn in row.turns]
    if task in EVERYWHERE:
        assert set(depths) == {None}
        return
    for row in rows:
        for turn in row.turns:
            place = round(turn.depth * len(row.context))
            assert first_words(turn) in row.context[place - 2 :][: len(first_words(turn)) + 4]
        assert len({turn.depth for turn in row.turns}) == 5
    assert min(depths) < 0.15
    assert max(depths) > 0.8
    orders = {tuple(sorted(range(5), key=lambda n: row.turns[n].depth)) for row in rows}
    assert len(orders) > 3  # early turns are not always about early places


def test_words_have_numbers_and_are_asked_for_by_the_beginning_of_a_pair(merging_tokenizer):
    assert len({*KEYS}) == len(KEYS)
    for row in generate("kv", 8, 700, 0, merging_tokenizer, "words"):
        pairs = json.loads(row.context.partition("\n")[2])
        assert {*pairs} <= {*KEYS}
        assert all(value.isdigit() and len(value) == 5 for value in pairs.values())
        assert len(set(pairs.values())) == len(pairs) > 10
        assert (row.origin, [row.limit(turn) for turn in row.turns]) == ("same form", [8] * 5)
        for turn in row.turns:
            assert row.context.count(f"{turn.input.strip()}{turn.answer}") == 1


def test_symbols_occur_once_and_are_a_token_each():
    rows = generate("kv", 8, 400, 0, Retriever(), "symbols")
    solve(rows)
    for row in rows:
        symbols = re.findall(r"s\d{4}", row.context)
        assert len(set(symbols)) == len(symbols)
        assert row.limit(row.turns[0]) == len(row.turns[0].answer.split()) == 3
        assert "," not in row.turns[0].answer


def test_what_cannot_be_made_is_refused(byte_tokenizer, refuses):
    calls = [
        (f"{task} has questions that people wrote.*--data", (task, 1, LENGTH, 0, byte_tokenizer))
        for task in WRITTEN
    ]
    assert len(calls) == 4
    calls += [
        ("task is 'nothing'.*kv, prefix_suffix", ("nothing", 1, LENGTH, 0, byte_tokenizer)),
        ("form is 'x'.*uuid, words", ("kv", 1, LENGTH, 0, byte_tokenizer, "x")),
        ("vt has no form of symbols", ("vt", 1, LENGTH, 0, Retriever(), "symbols")),
        ("the tokenizer has no symbols", ("kv", 1, LENGTH, 0, byte_tokenizer, "symbols")),
        (
            "no context has 640 tokens, the closest has",
            ("kv", 1, 640, 0, Retriever(), "symbols"),
        ),
        ("no context has 90000 tokens", ("kv", 1, 90_000, 0, byte_tokenizer, "words")),
        ("no context has 600 tokens, the closest has 571", ("kv", 1, 600, 0, byte_tokenizer)),
        ("a context of 4 pieces is too short for 5 questions", ("kv", 1, 332, 0, byte_tokenizer)),
        ("fewer than 5 texts of at most 20 tokens", ("repoqa", 1, 200, 0, byte_tokenizer)),
    ]
    refuses(GatesError, *((line, lambda given=given: generate(*given)) for line, given in calls))
