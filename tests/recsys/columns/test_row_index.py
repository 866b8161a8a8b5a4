import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.columns.hashing import RowIndex

INTEGERS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-3, 50))


@given(st.lists(INTEGERS, unique=True), st.lists(INTEGERS))
def test_it_finds_what_a_dictionary_finds(keys, sought):
    rows = np.arange(5, 5 + len(keys))
    known = dict(zip(keys, rows.tolist(), strict=True))
    asked = np.array([*keys, *sought], np.int64)
    found = RowIndex(np.array(keys, np.int64), rows).find(asked)
    assert found.tolist() == [known.get(key, 0) for key in asked.tolist()]


@pytest.mark.parametrize("keys", [np.arange(1000), np.arange(1000) * 2**40, -1 - np.arange(1000)])
def test_large_tables(keys):
    index = RowIndex(keys, 2 + np.arange(1000))
    assert index.direct == (keys[-1] == 999)
    assert (index.find(keys) == 2 + np.arange(1000)).all()
    assert (index.find(np.array([1000, 2**40 + 1, 2**63 - 1, -1001, -(2**63)])) == 0).all()


def test_keys_with_one_hash_are_all_found():
    # Multiples of 2^52 have few distinct hashes in a table of 256 slots.
    keys = np.arange(64, dtype=np.int64) << 52
    assert (RowIndex(keys, 1 + np.arange(64)).find(keys) == 1 + np.arange(64)).all()


@pytest.mark.parametrize("keys", [[3, 4, 3], [2**60, 5, 2**60]])
def test_equal_keys_are_refused(keys):
    with pytest.raises(ValueError, match="two keys"):
        RowIndex(np.array(keys), np.array([2, 3, 4]))
