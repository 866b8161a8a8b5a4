"""Documents of files, folders and tables: names, splits, duplicates, and what is refused."""

import json
import os
import sysconfig
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core_gates.errors import GatesError
from language.corpus import Corpus, Document, read_corpus


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_a_folder_is_read_in_order_and_what_is_no_text_is_counted(tmp_path):
    files = {"b": "two\r\n", "a__z": "one", "c": "two\r\n", "e": "", "x": b"\xff\xfe", "y": "a\0b"}
    folder = write(tmp_path / "texts", **files)
    write(folder, **{".hidden": "no", ".git__config": "no"})
    (folder / "link").symlink_to(folder / "b")
    (folder / "around").symlink_to(folder)
    os.mkfifo(folder / "pipe")
    corpus = read_corpus([folder])
    assert corpus.documents == [Document("b", "two\r\n"), Document("a/z", "one")]
    assert (corpus.duplicates, corpus.skipped) == (1, {"links": 2, "binary": 2, "empty": 1})


def test_lines_and_rows_are_documents(tmp_path):
    lines = [json.dumps({"text": "é\n", "id": 1}), "", json.dumps({"text": "b"})]
    write(tmp_path, **{"in__a.jsonl": "\n".join(lines), "plain.txt": "c"})
    pq.write_table(pa.table({"text": ["d", "b", "e"]}), tmp_path / "in" / "t.parquet")
    corpus = read_corpus([tmp_path / "in", tmp_path / "plain.txt"])
    names = {"a.jsonl:1": "é\n", "a.jsonl:3": "b", "t.parquet:1": "d", "t.parquet:3": "e"}
    assert (dict(corpus.documents), corpus.duplicates) == (names | {"plain.txt": "c"}, 1)


def test_the_end_of_a_name_decides_how_a_file_is_read(tmp_path, refuses):
    line = json.dumps({"text": "a\n"})
    folder = write(tmp_path / "in", **{"a.JSONL": line, "b.ndjson": line.replace("a", "b")})
    pq.write_table(pa.table({"text": ["c"]}), folder / "c.Parquet")
    write(folder, **{"package.json": line})
    names = {"a.JSONL:1": "a\n", "b.ndjson:1": "b\n", "c.Parquet:1": "c", "package.json": line}
    assert dict(read_corpus([folder]).documents) == names
    for name in ("d.json", "d.JSON"):
        path = write(tmp_path, **{name: f"[{line}]"}) / name
        refuses(GatesError, (f"{name} is JSON as a whole: give", lambda p=path: read_corpus([p])))


def test_a_name_alone_decides_the_split():
    names = [f"folder/{number}.py" for number in range(4000)]
    found = Counter(map(Corpus.split, names))
    assert abs(found["validation"] - 400) < 80 > abs(found["test"] - 400)
    golden = {
        "os.py": "train",
        "csv.py": "validation",
        "socket.py": "validation",
        "a/b.py": "test",
    }
    assert {name: Corpus.split(name) for name in golden} == golden
    corpus = Corpus([Document(name, name) for name in names])
    parts = [corpus.part(split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [found[s] for s in ("train", "validation", "test")]


def test_the_digest_is_that_of_names_and_texts(tmp_path):
    whole = read_corpus([write(tmp_path / "one", a="x", b="y")])
    moved = read_corpus([write(tmp_path / "two", b="y", a="x")])
    assert whole.digest == moved.digest == Corpus(whole.documents[::-1]).digest
    others = [{"a": "y", "b": "x"}, {"a": "x"}, {"a": "x", "c": "y"}, {"ax": "", "b": "y"}]
    digests = {Corpus([Document(*one) for one in other.items()]).digest for other in others}
    assert len(digests | {whole.digest}) == 5


def test_a_second_source_with_the_same_names_keeps_its_texts(tmp_path):
    one, two = write(tmp_path / "one", a="x", b="y"), write(tmp_path / "two", a="z", b="y")
    corpus = read_corpus([one, two])
    assert dict(corpus.documents) == {"a": "x", "b": "y", "two/a": "z"}
    write(one, two__a="w")
    with pytest.raises(GatesError, match="two sources hold two/a: name the folder above"):
        read_corpus([one, two])


def test_the_standard_library_without_tests():
    corpus = read_corpus(["python"])
    names = {one.name for one in corpus.documents}
    assert {"argparse.py", "json/decoder.py", "unittest/mock.py"} <= names
    assert not {"sitecustomize.py", "keyword.py", "encodings/cp1250.py"} & names
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not {"test", "tests", "idle_test"} & folders
    assert not [name for name in names if "-packages/" in name or not name.endswith(".py")]
    assert 4e6 < sum(len(one.text) for one in corpus.documents) < 4e7
    place = Path(sysconfig.get_path("stdlib")) / "argparse.py"
    assert dict(corpus.documents)["argparse.py"] == place.read_bytes().decode()
    assert len({corpus.split(name) for name in names}) == 3


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"txt": "a"}', "has no field 'text'"),
        ('["text"]', "has no field 'text'"),
        ('{"text": 3}', "text is int, expected str"),
        ('{"text": null}', "text is NoneType, expected str"),
        ('{"text": "a"', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (b'{"text": "\xff"}', "is not JSON"),
        (r'{"text": "\ud800"}', "half a character"),
    ],
)
def test_a_line_without_text_is_named(tmp_path, line, words):
    line = line if isinstance(line, bytes) else line.encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(GatesError, match=rf"^[^\n]*a.jsonl, line 2:? [^\n]*{words}[^\n]*$"):
        read_corpus([path])


def test_tables_without_text_are_refused(tmp_path, refuses):
    def table(name, **columns):
        pq.write_table(pa.table(columns), tmp_path / name)
        return lambda: read_corpus([tmp_path / name])

    def read(name):
        return lambda: read_corpus([tmp_path / name])

    whole = table("whole.parquet", text=["a" * 1000, "b"])
    content = (tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "half.parquet").write_bytes(content[:-40])
    (tmp_path / "page.parquet").write_bytes(content[:4] + b"\xff" * 30 + content[34:])
    assert len(whole().documents) == 2
    refuses(
        GatesError,
        ("has no column 'text' but words, n: rename", table("a.parquet", words=["a"], n=[1])),
        ("b.parquet, row 2: text is NoneType", table("b.parquet", text=["a", None])),
        ("c.parquet, row 1: text is int", table("c.parquet", text=[1])),
        (
            "half.parquet cannot be read as Parquet",
            read("half.parquet"),
        ),
        (
            "page.parquet cannot be read as Parquet",
            read("page.parquet"),
        ),
    )


def test_what_holds_no_text_is_refused(tmp_path, refuses, monkeypatch):
    write(tmp_path, **{"none": "", "image": b"\x89PNG\0", "folder__a": b"\xff", "folder__b": ""})
    (tmp_path / "bare").mkdir()
    names = ("none", "image", "folder", "bare", "no")
    read = {n: lambda n=n: read_corpus([tmp_path / n]) for n in names}
    refuses(
        GatesError,
        (r"none holds no text \(1 empty\): name files", read["none"]),
        ("image is binary, not text in UTF-8", read["image"]),
        (r"folder holds no text \(1 binary, 1 empty\)", read["folder"]),
        ("bare holds no text: name files", read["bare"]),
        ("no does not exist: name files, folders or 'python'", read["no"]),
        ("the corpus  holds no text", lambda: read_corpus([])),
    )

    def deny(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path / "bare"))

    monkeypatch.setattr(Path, "read_bytes", deny)
    refuses(GatesError, ("a cannot be read: Permission denied; check", read["folder"]))
    monkeypatch.setattr(os, "scandir", deny)
    refuses(GatesError, ("bare cannot be read: Permission denied; check", read["bare"]))
