"""Hashes of values that are the same in every process, on every platform and in every version.

Sixty-four bits, built from the finalizer of SplitMix64 (Steele et al., 2014). Python's ``hash`` is
salted by process and polars' may change with its version, so neither can choose rows of a trained
table.
"""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_HALF = np.uint64(32)


def mix(values: Hashes) -> Hashes:
    """Return the finalizer of SplitMix64 of each value, a bijection of 64-bit integers."""
    mixed = values ^ (values >> np.uint64(30))
    mixed *= _FIRST
    mixed ^= mixed >> np.uint64(27)
    mixed *= _SECOND
    mixed ^= mixed >> np.uint64(31)
    return mixed


def hash_integers(values: NDArray[np.int64], seed: int = 0) -> Hashes:
    """Return a hash of each integer (N,); different integers have different hashes."""
    return mix(values.astype(np.int64).view(np.uint64) + _seeded(seed))


def hash_strings(strings: pl.Series, seed: int = 0) -> Hashes:
    """Return a hash of the UTF-8 bytes of each string (N,); null is read as the empty string.

    Eight bytes at a time, little-endian, the last ones after zeros; the length is mixed in first.
    """
    if strings.null_count():
        strings = strings.fill_null("")
    array = strings.to_arrow().cast("large_string")
    _, offsets_buffer, bytes_buffer = array.buffers()
    ends = np.frombuffer(offsets_buffer, "<i8")[array.offset : array.offset + len(array) + 1]
    first, last = (int(ends[0]), int(ends[-1])) if len(array) else (0, 0)
    words = np.zeros((last - first + 7) // 8 + 2, "<u8")
    if last > first:
        words.view(np.uint8)[: last - first] = np.frombuffer(bytes_buffer, np.uint8)[first:last]
    left, at = np.diff(ends), ends[:-1] - first
    hashes = mix((left.astype(np.uint64) + np.uint64(1)) * _GOLDEN + _seeded(seed))
    rows: NDArray[np.int64] | slice = slice(None)
    while len(left):
        if not (unfinished := left > 0).all():
            rows = np.flatnonzero(unfinished) if isinstance(rows, slice) else rows[unfinished]
            left, at = left[unfinished], at[unfinished]
            if not len(left):
                break
        hashes[rows] = mix(hashes[rows] ^ _eight_bytes(words, at, left))
        left, at = left - 8, at + 8
    return hashes


def combine(first: Hashes, second: Hashes) -> Hashes:
    """Return a hash of each pair (N,); the order of the two matters."""
    return mix(mix(first + _GOLDEN) ^ second)


def bucket(hashes: Hashes, buckets: int) -> NDArray[np.int64]:
    """Return a number below ``buckets`` for each hash (N,): ⌊(upper 32 bits) · buckets / 2^32⌋.

    Args:
        hashes: (N,).
        buckets: 1 to 2^31.
    """
    return (((hashes >> _HALF) * np.uint64(buckets)) >> _HALF).view(np.int64)


def _seeded(seed: int) -> np.uint64:
    return np.uint64((int(_GOLDEN) * (2 * seed + 1)) % 2**64)


def _eight_bytes(words: Hashes, at: NDArray[np.int64], left: NDArray[np.int64]) -> Hashes:
    """Return the bytes from ``at`` on, at most eight of those ``left``, as integers (N,)."""
    index, shift = at >> 3, ((at & 7) << 3).astype(np.uint64)
    found = words.take(index) >> shift
    found |= (words.take(index + 1) << np.uint64(1)) << (np.uint64(63) - shift)
    found <<= (np.maximum(8 - left, 0) << 3).view(np.uint64)
    return found.astype(np.uint64, copy=False)
