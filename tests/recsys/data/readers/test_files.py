import datetime

import polars as pl
import pytest

from core_gates.errors import GatesError
from recsys.data.readers.files import read_table
from recsys.schema import Dense, FeatureSchema, Sparse, Task

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
    "lists and text": (
        {
            "a_parquet": PARQUET.with_columns(x=pl.lit("a")),
            "b_parquet": PARQUET.with_columns(x=pl.lit([1])),
        },
        r"b\.parquet: column 'x' has type List",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults(case, write):
    files, words = FAULTS[case]
    folder = write(**files)
    with pytest.raises(GatesError, match=words) as caught:
        read_table(folder, schema=SCHEMA)
    assert "\n" not in str(caught.value)


def test_paths_that_are_no_tables(tmp_path):
    with pytest.raises(GatesError, match="does not exist"):
        read_table(tmp_path / "absent.csv")
    (tmp_path / "t.xlsx").write_bytes(b"x")
    with pytest.raises(GatesError, match="is no table that can be read"):
        read_table(tmp_path / "t.xlsx")


def test_a_row_of_missing_values_is_no_fault(write):
    folder = write(t_csv="book,price,bought,w\n,,1,1\n")
    assert read_table(folder, schema=SCHEMA)["book"].to_list() == [None]
