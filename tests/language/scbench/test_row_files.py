"""Files of SCBench: the official layouts, what is written, and what is refused with its line."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core_gates.errors import GatesError, MissingExtraError
from language.scbench.row import TASKS, Row, Turn
from language.scbench.row_files import read_rows, write_rows

SCRIPT = r"""
import json, pathlib, sys
import pyarrow as pa, pyarrow.parquet as pq

folder = pathlib.Path(sys.argv[1])
long = "A\u2028book.\r\n" * 3  # a line separator and line ends within a text
uuid = "0f8c-4d"
turns = {
    "kv": [{"input": "Key?", "answer": uuid}, {"input": "Key 2?", "answer": "b"}],
    "prefix_suffix": [{"input": "ab", "answer": "ab..yz"}],
    "vt": [{"input": "12345?", "answer": ["AAAAA", "BBBBB"]}],
    "repoqa": [{"input": "Does it.", "answer": "def f(): pass", "name": "f", "position": 0.5}],
    "qa_eng": [{"input": "Who?", "answer": "Anna"}],
    "qa_chn": [{"input": "谁？", "answer": "李白"}],
    "choice_eng": [{"input": "Who?", "answer": "Bo", "options": ["Al", "Bo", "Cy", "Di"]}],
    "many_shot": [{"input": "Which?", "answer": "(B)"}],
    "summary": [{"input": "Summarize.", "answer": "It is long."}],
    "mf": [{"input": "The largest number of the list is: ", "answer": 9}],
    "summary_with_needles": [
        {"input": "Summarize.", "answer": "It is long.", "task": "scbench_summary"},
        {"input": "Key?", "answer": "71432", "task": "scbench_passkey"},
    ],
    "repoqa_and_kv": [
        {"input": "Does it.", "answer": "def f(): pass", "name": "f", "task": "scbench_repoqa"},
        {"input": "Key?", "answer": uuid, "task": "scbench_kv"},
    ],
}
for task, questions in turns.items():
    rows = []
    for number in range(3):
        row = {"id": number, "multi_turns": questions}
        row["input" if task == "summary" else "context"] = [3, 9, -1] if task == "mf" else long
        if "repoqa" in task:
            row |= {"lang": "python", "repo": "a/b"}
        if task == "many_shot":
            row["task"] = "dates"
        if task == "prefix_suffix":
            del row["id"]
        rows.append(row)
    text = "".join(json.dumps(row, ensure_ascii=number < 1) + "\n" for row in rows)
    for place in ("lines", "lines/data", "tables", "old"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    inside = "lines/data" if task in ("vt", "mf") else "lines"
    (folder / inside / f"scbench_{task}.jsonl").write_bytes(text.encode())
    table = pa.Table.from_pylist(rows)
    for place, config, split in (("tables", "scbench", "test"), ("old", "multi_turn", "train")):
        name = folder / place / f"{config}_{task}"
        name.mkdir()
        if task == "qa_chn":  # in two parts
            pq.write_table(table.slice(0, 2), name / f"{split}-00000-of-00002.parquet")
            pq.write_table(table.slice(2), name / f"{split}-00001-of-00002.parquet")
        else:
            pq.write_table(table, name / f"{split}-00000-of-00001.parquet")
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folders in each layout, written by a script that imports nothing of this project."""
    folder = tmp_path_factory.mktemp("scbench")
    subprocess.run([sys.executable, "-I", "-c", SCRIPT, folder], check=True)
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_every_layout_has_the_same_rows(task, files):
    lines = read_rows(files / "lines", task)
    assert [row.id for row in lines] == [0, 1, 2]
    assert lines == read_rows(files / "tables", task) == read_rows(files / "old", task)
    inside = "data" if task in ("vt", "mf") else "."
    assert read_rows(files / "lines" / inside / f"scbench_{task}.jsonl", task) == lines
    assert {row.origin for row in lines} == {"file"}


def test_fields_are_where_they_belong(files):
    rows = {task: read_rows(files / "tables", task)[1] for task in TASKS}
    assert rows["mf"].context == "[3, 9, -1]"
    assert rows["mf"].turns[0].answer == 9
    assert rows["summary"].context == "A\u2028book.\r\n" * 3
    assert rows["vt"].turns[0].answer == ("AAAAA", "BBBBB")
    assert rows["choice_eng"].turns[0].options == ("Al", "Bo", "Cy", "Di")
    assert rows["many_shot"].extra == {"task": "dates"}
    assert rows["repoqa"].extra == {"lang": "python", "repo": "a/b"}
    assert rows["repoqa"].turns[0].extra == {"name": "f", "position": 0.5}
    mix = rows["summary_with_needles"]
    assert [(turn.task, mix.limit(turn)) for turn in mix.turns] == [
        ("summary", 800),
        ("passkey", 15),
    ]
    assert [turn.depth for row in rows.values() for turn in row.turns] == [None] * 15


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_official_rows_are_written_as_they_are(files, tmp_path, name):
    for task in TASKS:
        rows = read_rows(files / "tables", task)
        write_rows(tmp_path / name, rows)
        assert read_rows(tmp_path / name, task) == rows
    written = read_rows(tmp_path / name, task)
    official = files / "lines" / f"scbench_{task}.jsonl"
    write_rows(tmp_path / "again.jsonl", written)
    both = [
        [json.loads(line) for line in path.read_text().split("\n") if line]
        for path in (official, tmp_path / "again.jsonl")
    ]
    assert both[0] == both[1]


LETTERS = st.characters(exclude_categories=["Cs"])
TEXT = st.text(LETTERS, min_size=1, max_size=30).filter(str.strip)
ANSWERS = {"mf": st.integers(-(2**62), 2**62), "vt": st.lists(TEXT, min_size=1).map(tuple)}


@st.composite
def made_rows(draw):
    task = draw(st.sampled_from(["kv", "vt", "mf", "many_shot", "repoqa_and_kv"]))
    names = st.fixed_dictionaries({"name": TEXT})
    depth = st.one_of(st.none(), st.floats(0, 1))

    def turn():
        part = draw(st.sampled_from(["repoqa", "kv"])) if task == "repoqa_and_kv" else None
        answer = draw(ANSWERS.get(task, TEXT))
        extra = draw(names) if part == "repoqa" else {}
        return Turn(draw(TEXT), answer, task=part, depth=draw(depth), extra=extra)

    def row(number):
        context = st.lists(st.integers(-9, 9), min_size=1).map(str) if task == "mf" else TEXT
        extra = {"lang": "python", "repo": draw(TEXT)} if task == "repoqa_and_kv" else {}
        origin = draw(st.sampled_from(["file", "exact", "same form"]))
        limit = draw(st.one_of(st.none(), st.integers(3, 99)))
        turns = tuple(turn() for _ in range(draw(st.integers(1, 3))))
        return Row(task, number, draw(context), turns, extra, origin, limit)

    ids = draw(st.lists(st.integers(0, 10**9), min_size=1, max_size=3, unique=True))
    return [row(number) for number in ids]


@settings(max_examples=60)
@given(rows=made_rows())
def test_what_is_written_is_read(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for name in ("rows.jsonl", "rows.parquet"):
        write_rows(folder / name, rows)
        assert read_rows(folder / name, rows[0].task) == rows
    assert sorted(path.name for path in folder.iterdir()) == ["rows.jsonl", "rows.parquet"]


GOOD = {"id": 0, "context": "a", "multi_turns": [{"input": "b", "answer": "c"}]}


def row(**changes):
    return {k: v for k, v in {**GOOD, **changes}.items() if v is not None}


def turn(**changes):
    return row(multi_turns=[{**GOOD["multi_turns"][0], **changes}])


FAULTS = [
    ("kv", "it is a list, expected an object", []),
    ("kv", "context is missing, expected text", row(context=None)),
    ("kv", "context is empty, expected text", row(context="")),
    ("kv", "context is a list, expected text", row(context=["a"])),
    ("kv", "context has half a character at 2", row(context="a\ud800")),
    ("mf", "context is text, expected a list of integers", row()),
    ("mf", "context is a list, expected a list of integers", row(context=[1, 2.5])),
    ("mf", "context is a list, expected a list of integers", row(context=[])),
    ("kv", "multi_turns is missing", row(multi_turns=None)),
    ("kv", "multi_turns is empty", row(multi_turns=[])),
    ("kv", "multi_turns is an object", row(multi_turns={"input": ["b"], "answer": ["c"]})),
    ("kv", "turn 1: it is text, expected an object", row(multi_turns=["b"])),
    ("kv", "turn 2: input is missing", row(multi_turns=[*GOOD["multi_turns"], {"answer": "c"}])),
    ("kv", "turn 1: input is a list, expected text", turn(input=["b"])),
    ("kv", "turn 1 has no answer", turn(answer=None)),
    ("kv", "turn 1 has no answer", turn(answer="")),
    ("vt", "turn 1 has no answer", turn(answer=[])),
    ("vt", "turn 1: answer is text, expected a list of names", turn()),
    ("vt", "turn 1: an answer is an integer, expected text", turn(answer=["a", 1])),
    ("kv", "turn 1: answer is an integer, expected text", turn(answer=3)),
    ("mf", "turn 1: answer is text, expected an integer", {**turn(), "context": [1]}),
    ("mf", "turn 1: answer is a number, expected an integer", {**turn(answer=1.5), "context": [1]}),
    ("mf", "turn 1: answer is true or false", {**turn(answer=True), "context": [1]}),
    ("kv", "turn 1: depth is 2, expected a number from 0 to 1", turn(depth=2)),
    ("kv", "turn 1: options is text, expected a list", turn(options="ab")),
    ("choice_eng", "turn 1: 0 options, without the answer, expected 4", turn()),
    ("choice_eng", "turn 1: 4 options, without", turn(options=["e", "f", "g", "h"])),
    ("choice_eng", "turn 1: 3 options, with the answer", turn(options=["c", "f", "g"])),
    ("repoqa", "lang is missing", row()),
    ("repoqa", "turn 1: name is missing", row(lang="python", repo="a/b")),
    ("summary_with_needles", "turn 1: task is missing", row()),
    ("summary_with_needles", "task is 'kv', expected scbench_summary or", turn(task="scbench_kv")),
    ("kv", "id is text, expected an integer", row(id="7")),
    ("kv", "origin is 'x', expected file or exact", row(origin="x")),
    ("kv", "new_tokens is 0, expected an integer from 3", row(new_tokens=0)),
    ("kv", "new_tokens is 2, expected an integer from 3", row(new_tokens=2)),
    ("kv", "turn 1: answer is empty, expected text", turn(answer=" \n")),
    ("vt", "turn 1: an answer is empty, expected text", turn(answer=["a", " "])),
]  # fmt: skip


@pytest.mark.parametrize(("task", "words", "record"), FAULTS)
def test_a_row_that_is_not_whole_is_refused_with_its_line(task, words, record, tmp_path, refused):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"\n{json.dumps(record)}\n")
    assert refused(words, read_rows, path, task).startswith(f"{path}, line 2")


def test_files_that_are_no_rows_are_refused(tmp_path, refused):
    path, good = tmp_path / "rows.jsonl", json.dumps(GOOD)
    for words, content in [
        ("holds no rows", b""),
        ("holds no rows", b"\n \n"),
        ("line 2 is not JSON.*truncated", f"{good}\n{good[:40]}".encode()),
        ("line 1 is not JSON.*NaN is not a number", good.replace('"c"', "NaN").encode()),
        ("line 1 is not JSON.*-Infinity", good.replace('"c"', "-Infinity").encode()),
        ("line 1 is not JSON", b"[" * 200_000),
        ("line 2: byte 1 is not UTF-8", f"{good}\n".encode() + b"\xff\n"),
        ("line 2: id 0 is that of an earlier row", f"{good}\n{good}".encode()),
        (
            "line 2: id 1 is that of",
            (json.dumps(row(id=1)) + "\n" + json.dumps(row(id=None))).encode(),
        ),
    ]:
        path.write_bytes(content)
        assert str(path) in refused(words, read_rows, path, "kv")
    refused("No such file", read_rows, tmp_path / "none.jsonl", "kv")
    refused("No such file", read_rows, tmp_path / "none.parquet", "kv")
    refused("task is 'x'; choose one of kv", read_rows, path, "x")


def test_tables_that_are_damaged_are_refused(tmp_path, refused):
    path = tmp_path / "rows.parquet"
    for words, rows in [
        ("row 2: multi_turns is missing", [GOOD, {"id": 1, "context": "a"}]),
        ("row 1, turn 1: depth is nan", [turn(depth=float("nan"))]),
        ("row 1, turn 1 has no answer", [turn(answer=None), {**GOOD, "id": 1}]),
        ("row 2: id 0 is that of an earlier", [GOOD, GOOD]),
    ]:
        pq.write_table(pa.Table.from_pylist(rows), path)
        refused(words, read_rows, path, "kv")
    pq.write_table(pa.Table.from_pylist([GOOD]).slice(0, 0), path)
    refused("holds no rows", read_rows, path, "kv")
    pq.write_table(pa.Table.from_pylist([row(context="a" * 10_000)]), path)
    path.write_bytes(path.read_bytes()[:-20])
    refused("row 1, cannot be read as Parquet", read_rows, path, "kv")
    answers = [{**GOOD}, {**turn(answer=["a"]), "id": 1}]
    path.with_suffix(".jsonl").write_text("\n".join(map(json.dumps, answers)))
    mixed = read_rows(path.with_suffix(".jsonl"), "kv")
    refused("cannot be written as Parquet", write_rows, path, mixed)


def test_folders_with_no_or_several_files_are_refused(files, tmp_path, refused):
    refused("has neither scbench_kv.jsonl nor", read_rows, tmp_path, "kv")
    folder = tmp_path / "scbench_kv"
    folder.mkdir()
    table = pa.Table.from_pylist([GOOD])
    pq.write_table(table, folder / "test-00000-of-00002.parquet")
    refused("is one of 2 parts, 1 found", read_rows, tmp_path, "kv")
    pq.write_table(table, folder / "train-00000-of-00001.parquet")
    refused("test-00000.* and .*train-00000.* are both of kv", read_rows, tmp_path, "kv")
    (folder / "test-00000-of-00002.parquet").unlink()
    assert len(read_rows(tmp_path, "kv")) == 1
    (tmp_path / "multi_turn_kv.jsonl").write_text(json.dumps(GOOD))
    refused("are both of kv", read_rows, tmp_path, "kv")


def test_without_pyarrow_lines_are_read(files, absent, tmp_path):
    rows = read_rows(files / "lines", "kv")
    absent("pyarrow")
    assert read_rows(files / "lines", "kv") == rows
    with pytest.raises(MissingExtraError, match="pip install 'gatesuite\\[language\\]'"):
        read_rows(files / "tables", "kv")
    with pytest.raises(MissingExtraError, match="needs pyarrow"):
        write_rows(tmp_path / "rows.parquet", rows)


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    rows = [Row("kv", 0, "a", (Turn("b", "c", depth=0.25),), origin="exact")]
    write_rows(path, rows)
    before = path.read_bytes()
    assert json.loads(before) == {
        "id": 0,
        "context": "a",
        "multi_turns": [{"input": "b", "answer": "c", "depth": 0.25}],
        "origin": "exact",
    }
    with pytest.raises(TypeError):
        write_rows(path, [*rows, Row("kv", 1, "a", (Turn("b", "c", extra={"x": {1}}),))])
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before]
    with pytest.raises(GatesError, match="cannot be written"):
        write_rows(path / "below" / "rows.jsonl", rows)
