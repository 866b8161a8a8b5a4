"""Hashes of values, equal in every process and version, quantiles of a stream, rows of keys."""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from core_gates.errors import check_at_least

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
    eight_bytes = words.take(index) >> shift
    eight_bytes |= (words.take(index + 1) << np.uint64(1)) << (np.uint64(63) - shift)
    eight_bytes <<= (np.maximum(8 - left, 0) << 3).view(np.uint64)
    return eight_bytes.astype(np.uint64, copy=False)


Integers = NDArray[np.int64]

ROOMY = 4  # slots for each key, so that most are found where their hash points
NEAREST = 2**12  # keys up to here are always looked up directly


class RowIndex:
    """A read-only hash table with linear probing; small non-negative keys are array indices.

    Args:
        keys: (N,) distinct integers.
        rows: (N,) rows of the keys, above 0.

    Raises:
        ValueError: Two keys are equal.
    """

    def __init__(self, keys: Integers, rows: Integers) -> None:
        keys = np.ascontiguousarray(keys, np.int64)
        largest = int(keys.max(initial=0))
        self.direct = int(keys.min(initial=0)) >= 0 and largest < max(ROOMY * len(keys), NEAREST)
        if self.direct:
            self._rows = np.zeros(largest + 2, np.int64)  # the last one stays 0: not found
            self._rows[keys] = rows
            if np.count_nonzero(self._rows) < len(keys):
                raise ValueError("two keys of an index are equal")
            return
        bits = int(ROOMY * len(keys) - 1).bit_length()
        self._shift, self._last = np.uint64(64 - bits), (1 << bits) - 1
        self._rows = np.zeros(1 << bits, np.int64)
        self._keys = np.zeros(1 << bits, np.int64)
        self._insert(keys, rows)

    def find(self, keys: Integers) -> Integers:
        """Return the row of each key (N,), 0 for keys that are not in the index."""
        if self.direct:
            clipped = np.where(keys < 0, len(self._rows) - 1, keys)
            return self._rows.take(clipped, mode="clip")
        slots = self._slots(keys)
        rows = self._rows.take(slots)
        other = np.flatnonzero((self._keys.take(slots) != keys) & (rows != 0))
        slots, sought = slots[other], keys[other]
        while len(other):
            slots = (slots + 1) & self._last
            row = self._rows.take(slots)
            rows[other] = row
            passed = (row != 0) & (self._keys.take(slots) != sought)
            other, slots, sought = other[passed], slots[passed], sought[passed]
        return rows

    def _slots(self, keys: Integers) -> Integers:
        # Fibonacci hashing (Knuth, The Art of Computer Programming 3, 6.4).
        hashes = keys.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return (hashes >> self._shift).view(np.int64)

    def _insert(self, keys: Integers, rows: Integers) -> None:
        """Put each key into the first free slot from that of its hash on."""
        left, slots = np.arange(len(keys)), self._slots(keys)
        while len(left):
            free = self._rows[slots] == 0
            # Of several keys that want one slot, the last is in it after this.
            self._rows[slots[free]] = rows[left[free]]
            self._keys[slots[free]] = keys[left[free]]
            same = self._keys[slots] == keys[left]
            if (same & (self._rows[slots] != rows[left])).any():
                raise ValueError("two keys of an index are equal")
            left, slots = left[~same], (slots[~same] + 1) & self._last


Floats = NDArray[np.float64]


class QuantileSketch:
    """A hierarchy of sorted samples (Manku, Rajagopalan and Lindsay, 1998), deterministic.

    Level h holds values that stand for 2^h each. A full level is sorted and every second value of
    it goes up, the odd and the even ones alternately. Below ``capacity`` values it is exact, for N
    values ranks are off by at most N · log2(2N / capacity) / capacity. Which values arrive together
    changes nothing, only their order does.

    Args:
        capacity: Values of a level, even.
    """

    def __init__(self, capacity: int = 2**16) -> None:
        check_at_least(2, capacity=capacity)
        self.capacity = capacity + capacity % 2
        self._levels: list[Floats] = [np.empty(0)]
        self._odd: list[bool] = [False]

    def add(self, values: Floats) -> None:
        """Add values (N,), none of them NaN."""
        while len(values):
            room = self.capacity - len(self._levels[0])
            self._levels[0] = np.concatenate([self._levels[0], values[:room]])
            values = values[room:]
            self._promote()

    def _promote(self) -> None:
        level = 0
        while len(self._levels[level]) >= self.capacity:
            if level + 1 == len(self._levels):
                self._levels.append(np.empty(0))
                self._odd.append(False)
            upward = np.sort(self._levels[level])[int(self._odd[level]) :: 2]
            self._odd[level] = not self._odd[level]
            self._levels[level] = np.empty(0)
            self._levels[level + 1] = np.concatenate([self._levels[level + 1], upward])
            level += 1

    def quantiles(self, fractions: ArrayLike) -> Floats:
        """Return the smallest value whose rank reaches each fraction (Q,); NaN without values."""
        values = np.concatenate(self._levels)
        if not len(values):
            return np.full(np.shape(fractions), np.nan)
        weights = np.concatenate([np.full(len(v), 2.0**h) for h, v in enumerate(self._levels)])
        order = np.argsort(values, kind="stable")
        ranks = np.cumsum(weights[order])
        at = np.searchsorted(ranks, np.asarray(fractions) * ranks[-1])
        return values[order[np.minimum(at, len(values) - 1)]]
