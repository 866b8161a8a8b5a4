import polars as pl
import pytest
from polars.testing import assert_frame_equal

import recsys.data.readers.files
from core_gates.errors import GatesError
from recsys.data.readers.files import Part, find_parts
from recsys.data.table_files import WatchedFile, read_csv

TABLE = pl.DataFrame({"a": range(10), "b": [[1, 2], [], None, [3]] * 2 + [[4], [5]]})


def read(path, columns=("a", "b"), lists=("b",)):
    return list(Part(path, path.stem).blocks(list(columns), lists))


def test_parquet_comes_block_by_block_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(recsys.data.readers.files, "BLOCK_ROWS", 4)
    TABLE.write_parquet(tmp_path / "t.parquet", row_group_size=7)
    blocks = read(tmp_path / "t.parquet")
    assert max(map(len, blocks)) <= 4
    assert_frame_equal(pl.concat(blocks), TABLE)
    assert Part(tmp_path / "t.parquet", "t").num_rows() == 10
    assert_frame_equal(pl.concat(read(tmp_path / "t.parquet", ["a"])), TABLE.select("a"))


CSV = {
    "plain": b"a,b\n1,1|2\n,\n",
    "CRLF": b"a,b\r\n1,1|2\r\n,\r\n",
    "mark of UTF-8": b"\xef\xbb\xbfa,b\n1,1|2\n,\n",
    "semicolons, mark and CRLF": b"\xef\xbb\xbfa;b\r\n1;1|2\r\n;\r\n",
    "tabs": b"a\tb\n1\t1|2\n\t\n",
    "spaces": b"a , b\n1 , 1|2\n , \n",
    "an index": b",a,b\n0,1,1|2\n1,,\n",
    "quoted": b'"a","b"\n"1","1|2"\n"",""\n',
    "further and shuffled columns": b'c,b,a\n"x, y",1|2,1\n"z\nz",,\n',
}


@pytest.mark.parametrize("kind", CSV)
def test_csv_is_text_with_null_where_a_field_is_empty(tmp_path, kind):
    (tmp_path / "t.csv").write_bytes(CSV[kind])
    (block,) = read(tmp_path / "t.csv")
    assert block.to_dict(as_series=False) == {"a": ["1", None], "b": [["1", "2"], None]}
    assert Part(tmp_path / "t.csv", "t").num_rows() is None


BLANK = {
    "between rows": (b"a,b\n1,2\n\n3,4\n", 3),
    "CRLF": (b"a,b\r\n1,2\r\n\r\n3,4\r\n", 3),
    "after the header": (b"a,b\n\n1,2", 2),
    "two of them": (b"a,b\n1,2\n\n\n3,4\n", 3),
    "after lines in quotes": (b'a,b\n1,"2\n\n2"\n\n3,4\n', 5),
    "at the end": (b"a,b\n1,2\n\n\r\n\n", 0),
    "in quotes": (b'a,b\n1,"2\n\n2"\n3,4\n', 0),
    "in doubled quotes": (b'a,b\n1,"2""\n\n""2"\n3,4\n\n', 0),
}


@pytest.mark.fault("video R10")
@pytest.mark.parametrize("case", BLANK)
def test_blank_lines_are_refused_where_training_refuses_them(tmp_path, case):
    """Pyarrow passes over all of them."""
    content, line = BLANK[case]
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    if line:
        for call in (read_csv, lambda p: read(p, ["a", "b"], ())):
            with pytest.raises(GatesError, match=f"t.csv, line {line}: it is blank"):
                call(path)
    else:
        found = pl.concat(read(path, ["a", "b"], ()))
        assert_frame_equal(found, read_csv(path).cast(pl.String))


@pytest.mark.fault("video R10")
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("case", BLANK)
def test_blank_lines_are_found_however_a_file_is_cut(tmp_path, case, size):
    content, line = BLANK[case]
    (tmp_path / "t.csv").write_bytes(content)
    with WatchedFile(tmp_path / "t.csv") as file:
        assert b"".join(iter(lambda: file.read(size), b"")) == content
        if not line:
            file.check()
            return
        with pytest.raises(GatesError, match=f"t.csv, line {line}: it is blank"):
            file.check()


@pytest.mark.fault("video R10")
def test_a_blank_line_of_a_later_block_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(recsys.data.readers.files, "CSV_BLOCK", 200)
    lines = "".join(f"{n},{n}\n" for n in range(500))
    (tmp_path / "t.csv").write_text(f"a,b\n{lines}\n1,2\n")
    with pytest.raises(GatesError, match="line 502: it is blank"):
        read(tmp_path / "t.csv", ["a"], ())


@pytest.mark.fault("video R10")
@pytest.mark.parametrize("content", [b"a\n1\n\n3\n", b"a\r\n\r\n1\r\n", b"a\nx\n\n\n"])
def test_a_blank_line_of_a_single_column_is_a_missing_value_as_in_training(tmp_path, content):
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    assert_frame_equal(pl.concat(read(path, ["a"], ())), read_csv(path).cast(pl.String))


@pytest.mark.fault("video R11")
def test_lists_in_csv_are_those_of_training(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,1 | NA|x y \n2, 3\n")
    (block,) = Part(path, "t").blocks(["a", "b"], ["b"], ["NA"])
    assert block["b"].to_list() == [["1", None, "x y"], ["3"]]
    assert_frame_equal(read_csv(path, missing=["NA"], lists=["b"]).select("b"), block.select("b"))


def test_a_large_csv_comes_in_several_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(recsys.data.readers.files, "CSV_BLOCK", 200)
    (tmp_path / "t.csv").write_text("a\n" + "".join(f"{n}\n" for n in range(500)))
    blocks = read(tmp_path / "t.csv", ["a"], ())
    assert len(blocks) > 5
    assert pl.concat(blocks)["a"].to_list() == [str(n) for n in range(500)]


def test_a_file_without_rows_gives_one_empty_block(tmp_path):
    TABLE.clear().write_parquet(tmp_path / "t.parquet")
    (tmp_path / "t.csv").write_text("a,b\n")
    assert [block.schema for block in read(tmp_path / "t.parquet")] == [TABLE.schema]
    assert [len(block) for block in read(tmp_path / "t.csv")] == [0]


BROKEN = {
    "empty.csv": (b"", "is empty: a line with the names"),
    "short.csv": (b"a,b\n1,2\n1\n", "Row #3: Expected 2 columns, got 1"),
    "latin.csv": (b"a,b\n\xff,2\n", "line 2: byte 1 is not UTF-8"),
    "twice.csv": (b"a,a\n1,2\n", "line 1: it has two columns named 'a'"),
    "no.parquet": (b"PAR1 but no more", "cannot be read as Parquet"),
}


def columns_and_rows(part):
    return part.columns(), list(part.blocks(["a", "b"]))


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_one_line_with_the_file(tmp_path, name):
    content, words = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(GatesError) as caught:
        columns_and_rows(Part(tmp_path / name, name))
    assert words in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parts_are_found_at_any_depth_but_hidden_ones(tmp_path):
    for name in ("b.csv", "a/x.parquet", "a/.hidden.csv", ".cache/y.csv", "readme.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_parts([tmp_path])
    assert [(part.name, part.is_csv) for part in found] == [("a/x", False), ("b", True)]
    assert [part.name for part in find_parts([tmp_path / "b.csv", tmp_path / "a"])] == ["b", "x"]


def test_sources_that_hold_nothing_are_refused(tmp_path):
    (tmp_path / "b.txt").touch()
    for source, words in (
        (tmp_path / "c.csv", "does not exist"),
        (tmp_path / "b.txt", "is no table, expected .parquet, .pq, .csv, .tsv"),
        (tmp_path, "has no .parquet, .pq, .csv, .tsv file"),
    ):
        with pytest.raises(GatesError, match=words):
            find_parts([source])
    (tmp_path / "x.csv").touch()
    with pytest.raises(GatesError, match="have the same name 'x'"):
        find_parts([tmp_path, tmp_path / "x.csv"])
