import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.columns.hashing import bucket, combine, hash_integers, hash_strings, mix

WORD = 2**64
GOLDEN = 0x9E3779B97F4A7C15


def splitmix(value):
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % WORD
    return value ^ (value >> 31)


def defined(text, seed=0):
    """The hash of a string, by its definition and with Python's integers."""
    content = text.encode()
    found = splitmix(((len(content) + 1) * GOLDEN + GOLDEN * (2 * seed + 1)) % WORD)
    for start in range(0, len(content), 8):
        found = splitmix(
            found ^ int.from_bytes(content[start : start + 8].rjust(8, b"\0"), "little")
        )
    return found


def test_the_finalizer_is_that_of_splitmix():
    # The first numbers of SplitMix64 from state 0, as published with Xoshiro.
    states = np.arange(1, 4, dtype=np.uint64) * np.uint64(GOLDEN)
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert mix(states).tolist() == published


@given(st.lists(st.text(max_size=40), min_size=1), st.integers(0, 5), st.integers(0, 3))
def test_strings_follow_the_definition(texts, seed, skipped):
    column = pl.Series(["left out"] * skipped + texts)[skipped:]
    assert hash_strings(column, seed).tolist() == [defined(text, seed) for text in texts]


def test_hashes_never_change():
    column = pl.Series(["", "a", "12345678", "Straße", "x" * 17])
    assert [f"{value:016x}" for value in hash_strings(column)] == FROZEN_STRINGS
    assert [f"{v:016x}" for v in hash_integers(np.array([0, 1, -1, 2**62]))] == FROZEN_INTEGERS


FROZEN_STRINGS = [
    "6e789e6aa1b965f4",
    "9be8fc30d233f9b6",
    "197bf0c2f17169e1",
    "b3092d1b8fb96bda",
    "7224428bb87e4881",
]
FROZEN_INTEGERS = ["e220a8397b1dcdaf", "910a2dec89025cc1", "e4d971771b652c20", "00aa50ea8e0fa9eb"]


def test_another_process_has_the_same_hashes():
    code = (
        "import polars as pl; from recsys.columns.hashing import hash_strings; "
        "print(hash_strings(pl.Series(['book', 'Über']))[:].tolist())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(hash_strings(pl.Series(["book", "Über"])).tolist())


def test_null_is_hashed_as_the_empty_string():
    assert len(set(hash_strings(pl.Series(["", None, "a"])).tolist())) == 2
    assert hash_strings(pl.Series([], dtype=pl.String)).shape == (0,)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), unique=True))
def test_integers_never_collide(values):
    hashes = hash_integers(np.array(values, np.int64))
    assert len(set(hashes.tolist())) == len(values)


def test_the_order_of_a_pair_matters():
    one, other = hash_integers(np.arange(1000)), hash_integers(np.arange(1000), seed=7)
    assert (combine(one, other) != combine(other, one)).all()
    assert len(np.unique(combine(one, other))) == 1000


@pytest.mark.parametrize("buckets", [1, 7, 1000, 2**31])
def test_buckets_are_filled_evenly(buckets):
    found = bucket(hash_integers(np.arange(100_000)), buckets)
    assert found.min() >= 0
    assert found.max() < buckets
    if buckets <= 1000:
        expected = 100_000 / buckets
        counts = np.bincount(found, minlength=buckets)
        assert np.abs(counts - expected).max() <= 6 * np.sqrt(expected)
