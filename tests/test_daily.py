"""Which cases of a parametrized function run daily."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest

import tests.conftest as conftest


@dataclass(eq=False)
class Case:
    path: Path
    callspec: SimpleNamespace
    mark: str = ""

    def get_closest_marker(self, name):
        return self.mark == name


@pytest.mark.parametrize(
    ("folder", "rows", "expected"),
    [
        ("recsys ends", [("a",), ("b",), ("c",)], [("a",), ("c",)]),
        ("e2e", [("a",), ("b",), ("c",)], [("a",), ("c",)]),
        ("recsys", [(c,) for c in "abcdefgh"], [(c,) for c in "abcdefgh"]),
        ("recsys", list(product("ab", "cd")), list(product("ab", "cd"))),
        (
            "recsys",
            list(product("abc", "def")),
            [("a", "d"), ("a", "e"), ("a", "f"), ("b", "d"), ("c", "d"), ("c", "f")],
        ),
    ],
    ids=["marked", "commands", "table", "small product", "product"],
)
def test_of_a_product_every_value_runs_and_of_commands_the_ends(folder, rows, expected):
    folder, _, mark = folder.partition(" ")
    path = Path(conftest.__file__).parent / folder / "test_x.py"
    cases = [Case(path, SimpleNamespace(params=dict(enumerate(row))), mark) for row in rows]
    kept = conftest.daily(cases)
    assert [row for row, case in zip(rows, cases, strict=True) if case in kept] == expected
