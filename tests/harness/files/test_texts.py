"""CSV files of which a reader would drop cells silently."""

import pytest

from core_gates.errors import GatesError
from harness.files.texts import check_cells

pytestmark = pytest.mark.fault("46 neighbors")
REFUSED = {
    "decimal commas": ("a,b\n1,2\n10,5,3\n", "t.csv, line 3: it has 3 cells, expected 2 as in"),
    "comma at the end": ("a,b\n1,2,\n", "line 2: it has 3 cells, expected 2.*no comma at the end"),
    "lines in a cell": ('a,b\n1,"2\n3"\n1,2,3\n', "line 4: it has 3 cells"),
    "one name twice": ("a,b, a\n1,2,3\n", "line 1: it has two columns named 'a'"),
    "Latin-1": ("a,b\n1,é\n".encode("latin-1"), "line 2: byte 3 is not UTF-8"),
    "a long cell": (f'a,b\n1,"{"x" * 140_000}"\n', "cannot be read as CSV: field larger than"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_cells_that_would_be_lost_are_refused(refuses, fault, tmp_path):
    text, words = REFUSED[fault]
    (tmp_path / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    refuses(GatesError, (words, lambda: check_cells(tmp_path / "t.csv")))


@pytest.mark.parametrize(
    "text", ["", "a;b\n1,5;2\n", "\ufeff,a,\n0,1,\n\n", 'a,b\n"1,5",2\n', "a,b\n1\n"]
)
def test_other_cells_are_left_to_the_readers(text, tmp_path):
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    check_cells(tmp_path / "t.csv")
