import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_gates.errors import GatesError
from recsys.data import table_files
from recsys.data.table_files import line_of, read_csv

PLAIN = {"a": [1, 3], "b": ["x", "y"]}

READ = {
    "plain": (b"a,b\n1,x\n3,y\n", PLAIN),
    "no line end": (b"a,b\n1,x\n3,y", PLAIN),
    "CRLF": (b"a,b\r\n1,x\r\n3,y\r\n", PLAIN),
    "byte order mark": (b"\xef\xbb\xbfa,b\n1,x\n3,y\n", PLAIN),
    "blank lines at the end": (b"a,b\n1,x\n3,y\n\n\r\n\n", PLAIN),
    "quoted commas": (b'a,b\n1,"x,z"\n3,y\n', {"a": [1, 3], "b": ["x,z", "y"]}),
    "quoted ranges": (b'a,"b"\n1,"[0,10)"\n3,"y"\n', {"a": [1, 3], "b": ["[0,10)", "y"]}),
    "quoted line end": (b'a,b\n1,"x\ny"\n3,y\n', {"a": [1, 3], "b": ["x\ny", "y"]}),
    "doubled quotes": (b'a,b\n1,"x ""y"""\n3,y\n', {"a": [1, 3], "b": ['x "y"', "y"]}),
    "tabs": (b"a\tb\n1\tx\n3\ty\n", PLAIN),
    "semicolons": (b"a;b\n1;x,z\n3;y\n", {"a": [1, 3], "b": ["x,z", "y"]}),
    "an index": (b",a,b\n0,1,x\n1,3,y\n", PLAIN),
    "spaces in names": (b"a , b\n1,x\n3,y\n", PLAIN),
    "spaces after commas": (b"a, b\n1, x\n 3 , y \n", PLAIN),
    "spaces alone": (b"a,b\n ,x\n 3, \n", {"a": [None, 3], "b": ["x", None]}),
    "a space and quotes": (b'a,b\n1, "x"\n3, "y"\n', PLAIN),
    "spaces around numbers and truth": (
        b"a, b\n1.5, True\n3, false\n", {"a": [1.5, 3.0], "b": [True, False]},
    ),
    "empty fields": (b'a,b\n,x\n3,""\n', {"a": [None, 3], "b": ["x", None]}),
    "one column": (b"a\n1\n3\n", {"a": [1, 3]}),
    "a late word": (b"a,b\n" + b"1,1\n" * 200 + b"x,2\n", None),
    "only a header": (b"a,b\n", {"a": [], "b": []}),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_what_is_read(case, tmp_path):
    content, expected = READ[case]
    (tmp_path / "t.csv").write_bytes(content)
    table = read_csv(tmp_path / "t.csv")
    if expected is None:
        assert table.schema == {"a": pl.String, "b": pl.Int64}
        assert len(table) == 201
    else:
        assert table.to_dict(as_series=False) == expected


REFUSED = {
    "empty": (b"", r"t\.csv is empty"),
    "a blank line first": (b"\na,b\n1,2\n", "begins with a blank line"),
    "more fields": (b"a,b\n1,x\n3,y,z\n", "line 3: it has 3 fields, the header has 2"),
    "fewer fields": (b"a,b\n1,x\n3\n4,y\n", "line 3: it has 1 fields, the header has 2"),
    "more fields in quotes": (b'a,b\n1,"x"\n3,y,z\n', "line 3: it has 3 fields"),
    "cut off": (b"a,b,c\n1,2,3\n1,2", "line 3: it has 2 fields, the header has 3"),
    "a blank line": (b"a,b\n1,x\n\n3,y\n", "line 3: it is blank"),
    "a blank line in quotes": (b'a,b\n1,"x"\n\n3,y\n', "line 3: it is blank"),
    "an open quote": (b'a,b\n1,"x\n3,y\n', "line 3: unexpected end of data"),
    "a quote in a field": (b'a,b\n1,"x\ny"\n3,5" disc\n4,z\n', "line 4: it has a quote inside"),
    "text after a quote": (b'a,b\n1,"x"y\n', "line 2: ',' expected after"),
    "Latin-1": ("a,b\n1,x\n3,ü\n".encode("latin-1"), "line 3: byte 3 is not UTF-8"),
    "UTF-16": ("a,b\n1,x\n".encode("utf-16"), "line 1: byte 1 is not UTF-8"),
    "a name twice": (b"a,b,a\n1,2,3\n", "line 1: it has two columns named 'a'"),
    "a name missing": (b"a,,c\n1,2,3\n", "line 1: it has columns without a name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, tmp_path):
    content, words = REFUSED[case]
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(GatesError, match=words) as caught:
        read_csv(tmp_path / "t.csv")
    assert "t.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_absent_file_is_refused(tmp_path):
    with pytest.raises(GatesError, match="No such file"):
        read_csv(tmp_path / "t.csv")


def test_words_for_missing(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\nNA,NA\n1,x\n")
    assert read_csv(tmp_path / "t.csv")["a"].to_list() == ["NA", "1"]
    assert read_csv(tmp_path / "t.csv", missing=["NA"])["a"].to_list() == [None, 1]


def test_lists(tmp_path):
    (tmp_path / "t.csv").write_text('a,b\n3|1|NA,1\n,2\n" 4 ",3\n"",NA\n')
    table = read_csv(tmp_path / "t.csv", lists=["a", "absent"], missing=["NA"])
    assert table["a"].to_list() == [["3", "1", None], None, ["4"], None]
    (tmp_path / "t.csv").write_text("a\n3\n4\n")
    assert read_csv(tmp_path / "t.csv", lists=["a"])["a"].to_list() == [["3"], ["4"]]


def test_lines_of_rows(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('a,b\n1,x\n2,"y\nz"\n3,w\n')
    assert [line_of(path, row) for row in range(3)] == [2, 3, 5]


@given(st.lists(st.sampled_from(["1,x", "2,y", "3", "", "4,y,z"]), max_size=12), st.booleans())
def test_small_chunks_judge_like_one(tmp_path_factory, lines, crlf):
    """However the file is cut into chunks, the same lines are refused."""
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    end = "\r\n" if crlf else "\n"
    path.write_bytes("".join(line + end for line in ["a,b", *lines]).encode())

    def judged():
        try:
            return read_csv(path).to_dict(as_series=False)
        except GatesError as error:
            return str(error)

    whole, size = judged(), table_files.CHUNK
    try:
        table_files.CHUNK = 5
        assert judged() == whole
    finally:
        table_files.CHUNK = size
    while lines and not lines[-1]:
        lines.pop()
    good = all(line.count(",") == 1 for line in lines)
    assert isinstance(whole, dict) == good
    if good:
        assert len(whole["a"]) == len(lines)
