"""Okapi BM25 over a handful of texts (Robertson & Zaragoza, 2009), as a rival of vectors."""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return _WORD.findall(text.casefold())


class BM25:
    """Scores of texts for a query.

    Args:
        texts: N texts, such as title, tags and trigger words of an adapter; they may be empty.
        k1: How fast repetitions of a word saturate.
        b: How far long texts are discounted.
    """

    def __init__(self, texts: Sequence[str], *, k1: float = 1.2, b: float = 0.75) -> None:
        self._counts = [Counter(words(text)) for text in texts]
        lengths = np.array([sum(counts.values()) for counts in self._counts], float)
        mean = lengths.mean() if lengths.any() else 1.0
        self._saturation = k1 * (1 - b + b * lengths / mean)
        self._k1 = k1
        containing = Counter(word for counts in self._counts for word in counts)
        count = len(texts)
        self._weights = {
            word: math.log(1 + (count - n + 0.5) / (n + 0.5)) for word, n in containing.items()
        }

    def scores(self, query: str) -> np.ndarray:
        """Return the score of every text (N,); 0 where no word of the query occurs."""
        found = np.zeros(len(self._counts))
        for word in words(query):
            if word in self._weights:
                tf = np.array([counts[word] for counts in self._counts], float)
                found += self._weights[word] * tf * (self._k1 + 1) / (tf + self._saturation)
        return found
