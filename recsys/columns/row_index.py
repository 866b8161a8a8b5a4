"""From 64-bit keys to rows of a table, millions per second."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

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
            found = self._rows.take(slots)
            rows[other] = found
            passed = (found != 0) & (self._keys.take(slots) != sought)
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
