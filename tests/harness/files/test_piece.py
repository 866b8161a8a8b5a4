"""Settings of results, compared."""

import pytest

from harness.files.piece import LISTED, differences


@pytest.mark.parametrize(
    ("found", "wanted", "line"),
    [
        ({"a": 1, "b": 2}, {"a": 1, "b": 2}, ""),
        ({"a": 1, "b": 2}, {"a": 1, "b": 9}, "b 2, now 9"),
        ({"a": 1, "b": 2}, {"a": 1}, "b 2, now null"),
        ({"a": 1}, {"a": 1, "b": "two"}, "b null, now two"),
        (None, {"a": 1}, "its settings are not known"),
    ],
    ids=["none", "another value", "no longer set", "newly set", "unknown"],
)
def test_every_setting_that_differs_is_named(found, wanted, line):
    assert differences(found, wanted) == line


def test_of_many_differences_the_others_are_counted():
    found = differences(dict.fromkeys(range(LISTED + 2), 0), dict.fromkeys(range(LISTED + 2), 1))
    assert found.endswith("; 2 more")
