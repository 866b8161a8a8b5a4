"""Files of tables: chunks, parts and what readers share."""

import dataclasses
import datetime

import polars as pl
import pytest
from polars.testing import assert_frame_equal

import recsys.data.readers.files
from core_gates.errors import GatesError
from recsys.columns.canonical import RowError
from recsys.data.readers.files import Part, find_parts, located_in, read_table
from recsys.data.table_files import WatchedFile, read_csv
from recsys.schema import Dense, FeatureSchema, Sparse, Task

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
        assert (table.schema, len(table)) == ({"a": pl.String, "b": pl.Int64}, 201)
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
        assert_frame_equal(pl.concat(read(path, ["a", "b"], ())), read_csv(path).cast(pl.String))


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


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_one_line_with_the_file(tmp_path, name):
    content, words = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(GatesError) as caught:
        Part(tmp_path / name, name).columns(), read(tmp_path / name, lists=())
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
        (tmp_path / "b.txt", "is no table that can be read, expected .parquet, .pq, .csv, .tsv"),
        (tmp_path, "holds no .parquet, .pq, .csv, .tsv"),
    ):
        with pytest.raises(GatesError, match=words):
            find_parts([source])
    (tmp_path / "x.csv").touch()
    with pytest.raises(GatesError, match="have the same name 'x'"):
        find_parts([tmp_path, tmp_path / "x.csv"])


SCHEMA = FeatureSchema(
    tasks=(Task("bought"),), sparse=(Sparse("book"),), dense=(Dense("price"),), weight="w"
)
GOOD = "book,price,bought,w\n11,9.5,1,1\n12,,0,1\n"


@pytest.fixture
def write(tmp_path):
    """Write files, by name, and return their folder."""

    def made(**files):
        for name, content in files.items():
            path = tmp_path / name.replace("_", ".")
            if isinstance(content, pl.DataFrame):
                content.write_parquet(path)
            else:
                path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path

    return made


def test_files_of_a_folder_join_in_the_order_of_their_names(write):
    folder = write(
        b_csv="price,book,bought,w,extra\n3,13,1,1,x\n",
        a_csv=GOOD,
        c_parquet=pl.DataFrame({"book": [14], "price": [4.0], "bought": [True], "w": [2]}),
    )
    (folder / ".hidden.csv").write_text("x\n")
    (folder / "README.md").write_text("no table")
    table = read_table(folder, schema=SCHEMA)
    assert table.columns == ["book", "price", "bought", "w"]
    assert table["book"].to_list() == [11, 12, 13, 14]
    assert table["price"].to_list() == [9.5, None, 3.0, 4.0]
    assert table["bought"].to_list() == [1, 0, 1, 1]


def test_a_row_of_joined_files_is_told_by_its_file_and_line(write):
    files = sorted(write(a_csv="n\n1\n2\n", b_csv="n\n3\n4\n", c_csv="n\n5\n").iterdir())
    for row, place in ((0, "a.csv, line 2"), (3, "b.csv, line 3"), (4, "c.csv, line 2")):
        assert f"{place}, column 'n'" in str(located_in(files, RowError("n", row, "it is wrong")))


def test_numbers_join_text_as_they_were_written(write):
    folder = write(
        a_csv="n,id\n1,7\n,008\n3,-\n\n", b_csv="id,n\nx9,2.5\n", c_csv=" id ,n\n 7.0,\n,4\n"
    )
    table = read_table(folder, missing=["-"])
    assert table["id"].to_list() == ["7", "008", None, "x9", "7.0", None]
    assert table["n"].to_list() == [1.0, None, 3.0, 2.5, None, 4.0]


def test_only_needed_columns_must_be_everywhere(write):
    folder = write(a_csv="a,b,c\n1,2,3\n", b_csv="c,a\n6,4\n")
    with pytest.raises(GatesError, match=r"b\.csv lacks the column 'b', which a\.csv has"):
        read_table(folder)
    assert read_table(folder, columns=["a"]).to_dict(as_series=False) == {"a": [1, 4], "c": [3, 6]}
    with pytest.raises(GatesError, match=r"b\.csv lacks the column 'b'"):
        read_table(folder, columns=["a", "b"])


PARQUET = pl.DataFrame({"book": [1, 2], "price": [1.0, 2.0], "bought": [0, 1], "w": [1, 1]})


def _bytes(table):
    from io import BytesIO

    file = BytesIO()
    table.write_parquet(file)
    return file.getvalue()


FAULTS = {
    "text for a number": (
        {"t_csv": 'book,price,bought,w\n11,"9,5",1,1\n'},
        r"t\.csv, line 2, column 'price': '9,5' is no number",
    ),
    "a line further down": (
        {"t_csv": 'book,price,bought,w\n"1\n1",9,1,1\n11,dear,1,1\n'},
        r"t\.csv, line 4, column 'price': 'dear' is no number",
    ),
    "a label of 2": (
        {"t_csv": GOOD + "11,1,2,1\n"},
        r"t\.csv, line 4, column 'bought': it is 2, a label or mask must be 0 or 1",
    ),
    "no label": ({"t_csv": GOOD + "11,1,,1\n"}, r"line 4, column 'bought': it is missing"),
    "a negative weight": ({"t_csv": GOOD + "11,1,1,-1\n"}, r"line 4, column 'w': it is -1"),
    "a column is missing": (
        {"t_csv": "book,prize,bought,w\n11,9,1,1\n"},
        r"t\.csv: the table lacks 'price' \(did you mean 'prize'\?\)",
    ),
    "a Parquet row": (
        {"t_parquet": PARQUET.with_columns(bought=pl.Series([0, 3]))},
        r"t\.parquet, row 1, column 'bought': it is 3",
    ),
    "a Parquet type": (
        {"t_parquet": PARQUET.with_columns(book=pl.lit(datetime.date(2022, 4, 8)))},
        r"t\.parquet: column 'book' has type Date",
    ),
    "truncated Parquet": ({"t_parquet": _bytes(PARQUET)[:-20]}, "cannot be read as Parquet"),
    "empty Parquet": (
        {"t_parquet": b""},
        r"t\.parquet cannot be read as Parquet: the file is empt",
    ),
    "text named Parquet": ({"t_parquet": GOOD}, "cannot be read as Parquet"),
    "no rows": ({"t_csv": "book,price,bought,w\n"}, "has no rows"),
    "no tables": ({"t_txt": "x"}, "holds no .parquet, .pq, .csv, .tsv"),
    "dates and numbers": (
        {
            "a_parquet": PARQUET.with_columns(x=pl.lit(3)),
            "b_parquet": PARQUET.with_columns(x=pl.lit(datetime.date(2022, 4, 8))),
        },
        r"b\.parquet: column 'x' has type Date, in an earlier file it has numbers",
    ),
    "times as numbers and as text": (
        {
            "a_parquet": PARQUET.with_columns(at=pl.lit(1_704_073_824)),
            "b_parquet": PARQUET.with_columns(at=pl.lit("2024-01-31")),
        },
        r"a\.parquet has seconds in the column of times 'at', .*b\.parquet has text: write them in",
    ),
    "times as text and as numbers": (
        {
            "a_csv": "book,price,bought,w,at\n7,1,1,1,2024-01-31\n",
            "b_csv": "book,price,bought,w,at\n7,1,1,1,1704073824\n",
        },
        r"a\.csv has text in the column of times 'at', .*b\.csv has seconds: write them in one",
    ),
    "times in seconds and in milliseconds": (
        {
            "a_csv": "book,price,bought,w,at\n7,1,1,1,0\n7,1,1,1,1704073824.5\n",
            "b_csv": "book,price,bought,w,at\n7,1,1,1,\n",
            "c_csv": "book,price,bought,w,at\n7,1,1,1,1704073824000\n",
        },
        r"a\.csv has seconds in the column of times 'at', .*c\.csv has milliseconds: write them in",
    ),
    "times in milliseconds and as days": (
        {
            "a_parquet": PARQUET.with_columns(at=pl.lit(1_704_073_824_000)),
            "b_parquet": PARQUET.with_columns(at=pl.lit(20_240_131)),
        },
        r"a\.parquet has milliseconds in .* 'at', .*b\.parquet has other numbers: write them in",
    ),
    "lists and text": (
        {
            "a_parquet": PARQUET.with_columns(x=pl.lit("a")),
            "b_parquet": PARQUET.with_columns(x=pl.lit([1])),
        },
        r"b\.parquet: column 'x' has type List",
    ),
}


@pytest.mark.fault("46 R5")
@pytest.mark.parametrize("case", FAULTS)
def test_faults(case, write):
    files, words = FAULTS[case]
    folder = write(**files)
    schema = dataclasses.replace(SCHEMA, time="at" if case.startswith("times") else "")
    with pytest.raises(GatesError, match=words) as caught:
        read_table(folder, schema=schema)
    assert "\n" not in str(caught.value)


@pytest.mark.fault("46 neighbors")
def test_a_file_without_times_joins_those_of_any_form(write):
    times = [1_704_073_824_000, 0, None, 1_704_160_224_000]
    files = {
        f"{name}_parquet": PARQUET.head(1).with_columns(at=pl.lit(time))
        for name, time in zip("abcd", times, strict=True)
    }
    table = read_table(write(**files), schema=dataclasses.replace(SCHEMA, time="at"))
    assert table["at"].to_list() == times


def test_a_row_of_missing_values_is_no_fault(write):
    folder = write(t_csv="book,price,bought,w\n,,1,1\n")
    assert read_table(folder, schema=SCHEMA)["book"].to_list() == [None]
