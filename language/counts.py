"""Counts of bytes: a language model without training, which every trained one must beat."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from core_gates.errors import GatesError, check_at_least
from language.corpus import Document

ORDER = 5
LARGEST_ORDER = 7  # eight bytes are one integer


class _Table(NamedTuple):
    """What was counted for one order.

    Attributes:
        grams: (U,) contexts with the byte after them, as integers in ascending order.
        counts: (U,) how often each was seen.
        contexts: (V,) contexts, in ascending order.
        totals: (V,) how often each was seen with a byte after it.
        kinds: (V,) number of different bytes after it.
    """

    grams: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    kinds: np.ndarray

    @classmethod
    def of(cls, grams: np.ndarray) -> "_Table":
        """Count integers (N,), which are sorted in place."""
        grams.sort()
        first = _starts(grams)
        counts = np.diff(first, append=len(grams))
        grams = grams[first]
        contexts = grams >> np.uint64(8)
        first = _starts(contexts)
        kinds = np.diff(first, append=len(contexts))
        return cls(grams, counts, contexts[first], np.add.reduceat(counts, first), kinds)

    def look_up(self, grams: np.ndarray) -> np.ndarray:
        """Return counts, totals and kinds (3, T) of integers (T,), 0 where they are not known.

        Values are looked up in ascending order, which keeps the memory that is read in the cache.
        """
        order = grams.argsort()
        ordered, numbers = grams[order], np.empty((3, len(grams)), dtype=np.int64)
        contexts = ordered >> np.uint64(8)
        numbers[0, order] = _look_up(self.grams, ordered, self.counts)
        numbers[1, order] = _look_up(self.contexts, contexts, self.totals)
        numbers[2, order] = _look_up(self.contexts, contexts, self.kinds)
        return numbers


def interpolated(found: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """Return the probabilities (T,) of bytes, from those one order below.

    Args:
        found: How often each was counted after its context, how often the context, and the number
            of different bytes after it (3, T).
        lower: (T,)
    """
    counts, totals, kinds = found
    total = np.maximum(totals + kinds, 1)  # 0 where the context was not seen
    return np.where(totals > 0, (counts + kinds * lower) / total, lower)


def _starts(values: np.ndarray) -> np.ndarray:
    """Return where each value of (N,) sorted ones occurs first."""
    return np.concatenate([[0], np.flatnonzero(values[1:] != values[:-1]) + 1])


def _look_up(keys: np.ndarray, wanted: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the values of wanted integers, 0 for those that are not known."""
    place = np.minimum(keys.searchsorted(wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def grams_of(
    data: np.ndarray, position: np.ndarray, order: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield, for orders from 0, which bytes have that many before them, and both as integers.

    Contexts are ``grams >> 8``.

    Args:
        data: (N,) bytes.
        position: (N,) number of each byte in its document.
        order: The last one.
    """
    grams = data.astype(np.uint64)
    yield np.ones(len(data), dtype=bool), grams
    for length in range(1, order + 1):
        grams = grams.copy()
        grams[length:] |= data[: -length or None].astype(np.uint64) << np.uint64(8 * length)
        yield position >= length, grams


class ByteCounts:
    """The bytes of documents, counted after their contexts.

    The probability of a byte c after the k bytes h is ::

        p_k(c | h) = (n(h c) + t(h) p_{k-1}(c | h')) / (n(h) + t(h))

    with the counts n in the documents, the number t(h) of different bytes after h, and h' without
    the first byte of h (Witten and Bell, 1991, method C, interpolated as in Chen and Goodman, 1998,
    equation 14). Below order 0 all bytes are equally likely. Where h was never seen, p_k is
    p_{k-1}. Contexts do not reach beyond the beginning of a document: its first bytes have shorter
    ones.

    Made by `fit`.

    Attributes:
        order: Bytes in the longest context.
        tables: What was counted, by order from 0.
    """

    def __init__(self, tables: list[_Table]) -> None:
        self.tables = tables
        self.order = len(tables) - 1

    @classmethod
    def fit(cls, documents: Iterable[Document], order: int = ORDER) -> "ByteCounts":
        """Count the bytes of documents.

        Args:
            documents: Text to learn from.
            order: Bytes in the longest context, 0 to 7.

        Raises:
            GatesError: No document is longer than the contexts.
            ValueError: The order is out of range.
        """
        check_at_least(0, order=order)
        if order > LARGEST_ORDER:
            raise ValueError(f"order must be at most {LARGEST_ORDER}, got {order}")
        texts = [document.text.encode() for document in documents]
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        longest = lengths.max(initial=0)
        if longest <= order:
            raise GatesError(
                f"the longest of {len(texts)} documents has {longest} bytes, expected more than the"
                f" {order} of a context; choose a corpus with more text"
            )
        data = np.frombuffer(b"".join(texts), dtype=np.uint8)
        starts = np.repeat(lengths.cumsum() - lengths, lengths)
        position = np.minimum(np.arange(len(data)) - starts, order).astype(np.uint8)
        return cls([_Table.of(grams[place]) for place, grams in grams_of(data, position, order)])

    def bits(self, text: str | bytes) -> np.ndarray:
        """Return the bits of every byte of a text, given all bytes before it.

        Args:
            text: A document, or T bytes.

        Returns:
            Minus the binary logarithm of its probability, (order + 1, T): row k for contexts of up
            to k bytes.
        """
        encoded = text if isinstance(text, bytes) else text.encode()
        data = np.frombuffer(encoded, dtype=np.uint8)
        return -np.log2(self.probabilities(data, np.arange(len(data))))

    def probabilities(self, data: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Return the probabilities (order + 1, T) of bytes, given those before them.

        Args:
            data: (T,) uint8, of one or several texts, one after the other.
            position: (T,) number of each byte in its text.
        """
        rows, lower = [], np.full(len(data), 1 / 256)
        contexts = grams_of(data, position, self.order)
        for table, (place, grams) in zip(self.tables, contexts, strict=True):
            lower[place] = interpolated(table.look_up(grams[place]), lower[place])
            rows.append(lower.copy())
        return np.stack(rows)
