"""Counts that learn from the text they predict: the strongest simple rival of a small decoder."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from language.corpus import Document
from language.counts import ByteCounts, grams_of, interpolated
from language.scoring import scored_part
from language.tokenizer import Tokenizer

ROUNDS = 30  # of expectation and maximization
ADDED = 64  # times that what was read of the text itself counts; 256 hardly changes the bits
FITTED = 2**18  # scored bytes of the validation documents, at most, that the weights are fitted to


class _Passages(NamedTuple):
    """Passages of a document, one after the other: T bytes.

    Attributes:
        data: (T,) uint8.
        position: (T,) number of each byte in its passage.
        scored: (T,) bool.
    """

    data: np.ndarray
    position: np.ndarray
    scored: np.ndarray

    @classmethod
    def of(cls, tokenizer: Tokenizer, text: str, context: int, *, whole: bool) -> "_Passages":
        """Return the windows of a decoder, or the whole text as one."""
        edges = np.concatenate([[0], tokenizer.byte_counts(text).cumsum()])
        half, last = context // 2, len(edges) - 1
        starts = np.arange(0, 1 if whole else last - half, context - half)
        stops = [last] if whole else np.minimum(starts + context, last)
        begin, first, stop = edges[np.maximum(starts - 1, 0)], edges[starts + half], edges[stops]
        sizes = stop - begin
        position = np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)
        place = position + np.repeat(begin, sizes)
        data = np.frombuffer(text.encode(), dtype=np.uint8)[place]
        return cls(data, position, place >= np.repeat(first, sizes))


class AdaptiveCounts:
    """A mixture of counts of training documents and of what was read of the same text.

    The probability of a byte c after the bytes h is the sum of w_j p_j(c | h) over 2 (order + 1)
    models with weights w that sum to 1, all of the form ::

        p_k(c | h) = (n(h c) + t(h) p_{k-1}(c | h')) / (n(h) + t(h))

    with n and t of `ByteCounts`. In the first half, orders from 0, they are sums of those of
    the training documents and 64 times those of the text itself, before c; in the others, of the
    text alone, with the longest order of the first half below order 0. The text is either that of
    the window that a decoder reads, so that both know the same, or all of the document before c.

    The weights are those that need the fewest bits for the scored bytes of other documents, by
    expectation and maximization (Jelinek and Mercer, 1980).

    Args:
        counts: Of the training documents.
        tokenizer: That of the decoder.
        context: Tokens of its window.
        whole: Whether all of a document before a byte is read, not only its window.

    Attributes:
        weights: (2 (order + 1),) equal before `fit`.
    """

    def __init__(
        self, counts: ByteCounts, tokenizer: Tokenizer, context: int, *, whole: bool
    ) -> None:
        self.counts, self.tokenizer, self.context, self.whole = counts, tokenizer, context, whole
        models = 2 * (counts.order + 1)
        self.weights = np.full(models, 1 / models)

    def fit(self, documents: Sequence[Document]) -> "AdaptiveCounts":
        """Fit the weights to documents that neither train nor test.

        Of more than 262,144 scored bytes, every second, third, ... is used.

        Args:
            documents: Those of the validation split.

        Returns:
            Itself.

        Raises:
            GatesError: No document is longer than half a context.
        """
        scored, starts = scored_part(self.tokenizer, documents, self.context)
        total = sum(len(document.text.encode()) for document in scored) - starts.sum()
        step = -(-total // FITTED)
        models = np.concatenate([self.models(document)[:, ::step] for document in scored], 1)
        for _ in range(ROUNDS):
            shares = self.weights[:, None] * models
            self.weights = (shares / shares.sum(0)).mean(1)
        return self

    def bits(self, documents: Sequence[Document]) -> np.ndarray:
        """Return the bits and bytes (N, 2) of what is scored of N documents.

        Args:
            documents: Held-out documents, each longer than half a context.
        """
        costs = [-np.log2(self.weights @ self.models(document)) for document in documents]
        return np.array([(bits.sum(), len(bits)) for bits in costs])

    def models(self, document: Document) -> np.ndarray:
        """Return the probabilities (2 (order + 1), T) of the scored bytes of a document."""
        text = _Passages.of(self.tokenizer, document.text, self.context, whole=self.whole)
        return self.probabilities(text.data, text.position)[:, text.scored]

    def probabilities(self, data: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Return the probabilities (2 (order + 1), T) of bytes, given those before them.

        Args:
            data: (T,) uint8, of one or several texts, one after the other.
            position: (T,) number of each byte in its text.
        """
        text, contexts = (position == 0).cumsum(), grams_of(data, position, self.counts.order)
        rows, repeats, lower = [], [], np.full(len(data), 1 / 256)
        for table, (place, grams) in zip(self.counts.tables, contexts, strict=True):
            repeats.append((place, _own(grams[place], text[place])))
            both = table.look_up(grams[place]) + ADDED * repeats[-1][1]
            lower[place] = interpolated(both, lower[place])
            rows.append(lower.copy())
        for place, seen in repeats:
            lower[place] = interpolated(seen, lower[place])
            rows.append(lower.copy())
        return np.stack(rows)


def _own(grams: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Return counts, totals and kinds (3, T) of integers in what precedes each in its text."""
    (seen,) = _before(grams, text, np.ones((1, len(grams)), dtype=np.int64))
    either = np.stack([np.ones_like(seen), seen == 0])
    return np.stack([seen, *_before(grams >> np.uint64(8), text, either)])


def _before(keys: np.ndarray, text: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the sums of values (J, T) over earlier places of the same text and key."""
    order = keys.argsort(kind="stable")
    keys, text, values = keys[order], text[order], values[:, order]
    changes = (keys[1:] != keys[:-1]) | (text[1:] != text[:-1])
    first = np.flatnonzero(np.concatenate([[True], changes])[: len(keys)])
    sums = values.cumsum(1) - values
    before = np.empty_like(sums)
    before[:, order] = sums - np.repeat(sums[:, first], np.diff(first, append=len(keys)), axis=1)
    return before
