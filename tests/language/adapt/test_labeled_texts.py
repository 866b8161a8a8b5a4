"""Readers of labeled texts: layouts of files, what is held out, and what is refused."""

import csv
import json

import pytest

from core_gates.errors import GatesError
from language.adapt.docstring_sentences import sentences_of
from language.adapt.labeled_texts import Row, labeled, read_folder, read_rows, texts_of_file
from language.corpus import Corpus, Document

TWO = "a b\t1\nc d\t0\n"


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
    return folder


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("sentence\tlabel\nso it is\t1\nno\t0\n", [("so it is",), ("no",)]),
        ("so it is\t1\nno\t0", [("so it is",), ("no",)]),
        ("src\t1\t\tso it is\nsrc\t0\t*\tno\n", [("so it is",), ("no",)]),  # CoLA
        ("index\tquestion\tsentence\tlabel\r\n0\tq\ts\t1\r\n1\tr\tt\t0\r\n",
         [("q", "s"), ("r", "t")]),
        ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t5\t6\tq\ts\n0\t7\t8\tr\tt\n",
         [("q", "s"), ("r", "t")]),  # MRPC
        ("q\ts\t1\nr\tt\t0\n", [("q", "s"), ("r", "t")]),
    ],
)  # fmt: skip
def test_tables(content, texts, tmp_path):
    path = write(tmp_path, x__tsv=b"\xef\xbb\xbf" + content.encode()) / "x.tsv"
    rows = read_rows(path)
    assert ([row.texts for row in rows], [row.label for row in rows]) == (texts, ["1", "0"])
    assert texts_of_file(path) == texts


HEAD = "sentence\tlabel\n"
AWKWARD = [
    'he said "no"', "a\ttab", "two\nlines", "a\n\nblank one", '"', '""', "plain", "é, b", "x\r\ny"
]  # fmt: skip


@pytest.mark.fault("46 S1")
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_quoted_tables_are_read_as_csv_reads_them(quoting, ends, tmp_path):
    path = tmp_path / "x.tsv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=quoting, lineterminator=ends)
        writer.writerow(["sentence", "label"])
        writer.writerows([text, n % 2] for n, text in enumerate(AWKWARD))
    rows = read_rows(path)
    assert [row.texts[0] for row in rows] == AWKWARD
    assert [row.label for row in rows] == [str(n % 2) for n in range(len(AWKWARD))]
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file, delimiter="\t")
        ends_of = [reader.line_num for _ in reader]
    assert [row.place for row in rows] == [f"{path}, line {n}" for n in ends_of[1:]]


@pytest.mark.fault("46 S1")
@pytest.mark.parametrize(
    ("content", "texts", "told"),
    [
        ('say "no"\t1\nso\t0\n', ['say "no"', "so"], ""),
        ('"Come in.\t1\nHe left."\t0\n', ['"Come in.', 'He left."'], ""),  # of one speech
        ('"no" is short\t1\nso\t0\n', ['"no" is short', "so"], ""),
        ('"no" is short\t1\n"So."\t0\n', ['"no" is short', '"So."'],
         r"in quotes \(line 3\) and quotes .* others \(line 2\): all quotes are read as text"),
        ('"a ""b"" c"\t1\nsay "no"\t0\n', ['a "b" c', 'say "no"'],
         r"in quotes \(line 2\) and quotes .* others \(line 3\): it is read as csv reads it"),
    ],
)  # fmt: skip
def test_quotes_of_the_text_stay_and_both_kinds_are_told(content, texts, told, tmp_path, recwarn):
    path = write(tmp_path, x__tsv=HEAD + content) / "x.tsv"
    if told:
        with pytest.warns(UserWarning, match=told):
            rows = read_rows(path)
    else:
        rows = read_rows(path)
    assert ([row.texts[0] for row in rows], [row.label for row in rows]) == (texts, ["1", "0"])
    assert not recwarn


@pytest.mark.fault("46 S2")
def test_files_that_are_not_used_are_named(tmp_path):
    parts = dict.fromkeys(["train__tsv", "dev_matched__tsv", "dev_mismatched__tsv"], TWO)
    hidden = dict.fromkeys(["test_matched__tsv", "test_mismatched__tsv"], "c\t-1\n")
    (tmp_path / "mnli/original").mkdir(parents=True)
    found = read_folder(write(tmp_path / "mnli", **parts, **hidden, __DS_Store="", README="x"))
    assert found.remarks()[:2] == [
        "test_matched.tsv has no labels: others are held out",
        "not used: README, dev_mismatched.tsv, test_mismatched.tsv",
    ]
    found = read_folder(write(tmp_path / "sst", a__train="1 b\n0 c\n", a__dev="0 d", a__test="1 e"))
    assert found.remarks() == ["not used: a.dev"]
    many = {f"{n}__md": "" for n in range(23)}
    found = read_folder(write(tmp_path / "many", train__tsv=TWO, dev__tsv="e\t1\n", **many))
    assert found.remarks()[0].endswith(", 5.md, 6.md and 3 more")


def test_other_layouts(tmp_path):
    folder = write(
        tmp_path / "sst",
        a__train="1 fine film .\n0 dull\xe8\n",
        a__dev="0 dull\n",
        a__test="1 so\n",
        README__md="train",
    )
    found = read_folder(folder)
    assert [row.texts[0] for row in found.train] == ["fine film .", "dull\xe8"]
    assert [row.texts[0] for row in found.held_out] == ["so"]  # the test has labels
    mixed = '{"text": "a", "label": 1}\n{"text": "b", "label": 0.0}\n'
    found = read_folder(write(tmp_path / "mixed", train__jsonl=mixed, dev__tsv="c\t1.0\nd\t0"))
    assert (found.classes, [row.label for row in found.held_out]) == (("0", "1"), ["1", "0"])
    pairs = [{"premise": "a", "hypothesis": "b", "label": label} for label in ("yes", "no")]
    lines = "\n".join(map(json.dumps, pairs))
    hidden = json.dumps({"premise": "c", "hypothesis": "d"})
    found = read_folder(write(tmp_path / "rte", train__jsonl=lines, val__jsonl=lines,
                              test__jsonl=hidden))  # fmt: skip
    assert (found.classes, len(found.held_out)) == (("no", "yes"), 2)
    assert found.targets(found.held_out) == [1.0, 0.0]
    assert found.remarks() == [
        "test.jsonl has no labels: others are held out", "2 held-out rows occur in training"
    ]  # fmt: skip
    hidden = write(tmp_path / "hidden", train__tsv=TWO, dev__tsv="a\t1\n", test__tsv="b\t\n")
    assert [row.texts for row in read_folder(hidden).held_out] == [("a",)]
    for label in ("-1", "-1.0"):  # as GLUE has them
        write(hidden, test__tsv=f"b\t{label}\nc\t{label}\n")
        found = read_folder(hidden)
        assert [row.texts for row in found.held_out] == [("a",)]
        assert found.remarks() == ["test.tsv has no labels: others are held out"]
    write(hidden, train__tsv="a\t1\nb\t-1\n", test__tsv="b\t-1\n")
    assert read_folder(hidden).held_out[0].label == "-1"  # which is a class
    table = "who\twhat\tsize\nx\ta\t1.5\ny\tb\t2\n"
    found = read_folder(write(tmp_path / "n", train__tsv=table, dev_matched__tsv=table,
                              dev_mismatched__tsv="?"), ["what", "SIZE"])  # fmt: skip
    assert (found.classes, found.outputs, found.targets(found.train)) == ((), 1, [1.5, 2.0])
    other = found._replace(train=found.train[::-1])
    assert found.digest != other.digest
    assert texts_of_file(write(tmp_path, t__txt="one text\n\nanother\n") / "t.txt") == [
        ("one text",),
        ("another",),
    ]


def test_what_is_wrong_is_one_line(tmp_path, refuses):
    def reads(columns=(), **files):
        number = len(list(tmp_path.iterdir()))
        folder = write(tmp_path / str(number), **files)
        return lambda: read_folder(folder, columns)

    both = {"train__tsv": TWO, "dev__tsv": TWO}
    names = "index\ttitle\tbody\tsize\trank\n"
    refuses(
        GatesError,
        ("line 2 has 1 columns, expected 2", reads(train__tsv="a\t1\nb\n", dev__tsv=TWO)),
        ("line 1 has the label '7', expected 0, 1$", reads(**both | {"dev__tsv": "a\t7\n"})),
        ("all training rows of .* have the label '1'", reads(train__tsv="a\t1\n", dev__tsv=TWO)),
        ("holds no data", reads(other__tsv=TWO)),
        ("holds train.tsv: give files", reads(train__tsv=TWO)),
        ("are both for train: remove one", reads(train__jsonl="{}", **both)),
        ("no columns body, size, but a b, 1", reads(["body", "size"], **both)),
        ("--columns names body, expected", reads(["body"], **both)),
        ("no names of columns that are known, but index, title", reads(train__tsv=names + "1",
                                                                       dev__tsv=TWO)),
        ("line 1 is not JSON", reads(train__jsonl="{", dev__tsv=TWO)),
        ("names of columns that are known, but size",
         reads(train__jsonl='{"size": 1}', dev__tsv=TWO)),
        ("line 1 has no text in text", reads(train__jsonl='{"text": 1, "label": 1}', dev__tsv=TWO)),
        ("line 1 has 1 columns, expected 2", reads(train__txt="x\n", dev__tsv=TWO)),
        ("columns a, b, but label, text", reads(["a", "b"], train__txt="x y\n", dev__txt="x y\n")),
        ("has no held-out rows", reads(**both | {"dev__tsv": "sentence\nlone\n"})),
        ("has no training rows", reads(**both | {"train__tsv": ""})),
        ("line 1 has no label", reads(train__jsonl='{"text": "a"}', dev__tsv=TWO)),
        ("has 1 texts, .* 2: give", reads(train__tsv="a\tb\t1\nc\td\t0\n", dev__tsv=TWO)),
        ("line 2 has the label 'x', expected a number",
         reads(train__tsv="a\t.5\nb\tx\n", dev__tsv="a\t1\n")),
        ("line 2 has no label: give one", reads(train__tsv="a\t1\nb\tnan\n", dev__tsv=TWO)),
        ("line 2 has no label", reads(train__tsv="a\t1\nb\t\n", dev__tsv=TWO)),
        ("line 1 has a label that no other line has, 'mood'",
         reads(train__tsv="review\tmood\n" + 2 * TWO, dev__tsv=TWO)),
        ("label 'x', expected a number", reads(train__tsv="a\t.5\nb\t1\n", dev__tsv="a\tx\n")),
        ("is not a folder", lambda: read_folder(tmp_path / "none")),
        ("cannot be read: No such file", lambda: texts_of_file(tmp_path / "none.txt")),
        ("holds no text", lambda: texts_of_file(write(tmp_path, e__txt="\n") / "e.txt")),
    )  # fmt: skip
    whole = labeled("x", [Row(("a",), "1", ""), Row(("",), "0", "")], [Row(("b",), "1", "")])
    assert whole.remarks() == ["1 rows have an empty text"]


def test_docstrings_are_labeled_with_their_package(refuses):
    names = [f"{package}/{n}.py" for package in ("json", "email", "rare") for n in range(40)]
    tested = {name for name in names if Corpus.split(name) != "train"}
    documents = [
        Document(name, f'"""The file {name} of\n  its package. More.\n\nRest."""\ndef f():\n'
                 '    """Short."""\nclass C:\n    "All packages have this one."\n')
        for name in names
        if not name.startswith("rare") or name not in tested
    ]  # fmt: skip
    documents += [Document("json/bad.py", "def ("), Document("json/escape.py", '"""a \\d b c."""')]
    documents += [Document("top.py", '"""A file that lies in no package."""')]
    found = sentences_of(documents)
    assert found.classes == ("email", "json")  # of the other one nothing is held out
    assert {row.place for row in found.held_out} == {n for n in tested if n[:4] != "rare"}
    texts = {row.texts[0] for row in found.train}
    assert "The file json/1.py of its package." in texts or "json/1.py" in tested
    assert "All packages have this one." not in texts
    refuses(GatesError, ("0 packages have docstrings", lambda: sentences_of(documents[-1:])))


@pytest.mark.fault("46 S1")
@pytest.mark.parametrize("name", ["x.tsv", "x.txt", "x.jsonl"])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le"])
def test_another_encoding_than_utf_8_is_one_line(refuses, encoding, name, tmp_path):
    (tmp_path / name).write_bytes("1 fine\n0 d\xe8j\xe0 vu\n".encode(encoding))
    place = "line 2: byte 4" if encoding == "latin-1" else "line 1: byte [12]"
    other = "LATIN1" if encoding == "latin-1" else "UTF-16"
    said = f"{name}, {place} is not UTF-8: .* iconv -f {other} -t UTF-8"
    refuses(
        GatesError,
        (said, lambda: texts_of_file(tmp_path / name)),
        (said, lambda: read_rows(tmp_path / name)),
    )


@pytest.mark.fault("46 S1")
@pytest.mark.parametrize(
    ("train", "held_out", "words"),
    [
        ("sentence\tlabel\na\t0,5\nb\t1,5\n", "sentence\tlabel\na\t2\n",
         r"train.tsv, line 2 has the label '0,5', .* a decimal comma: write it with a point"),
        ("sentence\tlabel\na\t0.5\nb\t1\n", "sentence\tlabel\na\t-1,25\n",
         r"dev.tsv, line 2 has the label '-1,25', .* a decimal comma"),
        ("sentence\tSentence\tlabel\na\tb\t1\nc\td\t0\n", "sentence\tlabel\na\t1\n",
         r"train.tsv, line 2 has two columns 'sentence': rename one"),
        ("text\tlabel\tlabel\na\tb\t1\nc\td\t0\n", "text\tlabel\na\t1\n",
         r"train.tsv, line 2 has two columns 'label': rename one"),
    ],
)  # fmt: skip
def test_what_has_two_meanings_is_one_line(train, held_out, words, tmp_path):
    with pytest.raises(GatesError, match=words):
        read_folder(write(tmp_path, train__tsv=train, dev__tsv=held_out))


@pytest.mark.fault("46 S1")
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "a", "text": "b", "label": 1}', "line 1 has two columns 'text': rename one"),
        ('{"text": "a", "label": 1, "LABEL": 0}', "line 1 has two columns 'label': rename one"),
        ('["text", "label"]', "line 1 has no names of columns that are known, but none"),
    ],
)
def test_an_object_with_a_name_twice_is_one_line(refuses, line, words, tmp_path):
    (tmp_path / "x.jsonl").write_text(f"{line}\n")
    refuses(GatesError, (words, lambda: read_rows(tmp_path / "x.jsonl")))


@pytest.mark.fault("46 S1")
def test_columns_that_are_not_read_may_have_one_name(tmp_path):
    text = "id\tid\tsentence\tlabel\n1\t2\tso\tx, y\n1\t2\tno\t0\n"
    rows = read_rows(write(tmp_path, train__tsv=text) / "train.tsv")
    assert [(row.texts, row.label) for row in rows] == [(("so",), "x, y"), (("no",), "0")]
