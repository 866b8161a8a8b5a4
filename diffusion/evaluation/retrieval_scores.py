"""How well adapters are found, BM25, and how close adapters of one concept lie."""

import math
from collections import Counter
from collections.abc import Sequence
from math import comb

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from diffusion.library.prompts import WORD


class BM25:
    """Scores of texts for a query.

    Args:
        texts: N texts, such as title, tags and trigger words of an adapter; they may be empty.
        k1: How fast repetitions of a word saturate.
        b: How far long texts are discounted.
    """

    def __init__(self, texts: Sequence[str], *, k1: float = 1.2, b: float = 0.75) -> None:
        self._counts = [Counter(WORD.findall(text.casefold())) for text in texts]
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
        totals = np.zeros(len(self._counts))
        for word in WORD.findall(query.casefold()):
            if word in self._weights:
                tf = np.array([counts[word] for counts in self._counts], float)
                totals += self._weights[word] * tf * (self._k1 + 1) / (tf + self._saturation)
        return totals


KS = (1, 3, 5, 10)
SHUFFLES = 32  # random orders of equal scores that values are averaged over


def search_values(
    scores: np.ndarray | Tensor, relevant: np.ndarray | Tensor, ks: Sequence[int] = KS
) -> dict[str, np.ndarray]:
    """Return the measures of every query.

    Equal scores come in random order, so that a method that scores all alike is at chance.

    Args:
        scores: (Q, N) the larger the better.
        relevant: (Q, N) whether an adapter is right; at least one is for each query.
        ks: Depths of the recall.

    Returns:
        ``recall@k``: right ones among the first k, over the most that are possible; ``mrr``: one
        over the rank of the first right one. (Q,)

    Raises:
        ValueError: Shapes differ, a score is NaN, or a query has no right adapter.
    """
    found, right = np.asarray(scores, np.float64), np.asarray(relevant, bool)
    if found.shape != right.shape or found.ndim != 2:
        raise ValueError(f"scores {found.shape} and relevant {right.shape} must be one (Q, N)")
    if np.isnan(found).any() or not right.any(1).all():
        what = "a score is NaN" if np.isnan(found).any() else "a query has no right adapter"
        raise ValueError(f"{what}: leave it out")
    ties = any(len(np.unique(row)) < len(row) for row in found)
    generator = np.random.default_rng(0)
    total: dict[str, np.ndarray] = {}
    shuffles = SHUFFLES if ties else 1
    for _ in range(shuffles):
        shuffled = generator.permuted(np.tile(np.arange(found.shape[1]), (len(found), 1)), axis=1)
        order = np.lexsort((shuffled, -found), axis=1)
        values = _measures(np.take_along_axis(right, order, 1), ks)
        total = {name: total.get(name, 0.0) + value / shuffles for name, value in values.items()}
    return total


def _measures(ranked: np.ndarray, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Return the measures of queries, given whether each place (Q, N) holds a right adapter."""
    counts = ranked.sum(1)
    values = {
        f"recall@{k}": ranked[:, :k].sum(1) / np.minimum(min(k, ranked.shape[1]), counts)
        for k in ks
    }
    values["mrr"] = 1 / (ranked.argmax(1) + 1)
    return values


def chance(relevant: np.ndarray | Tensor, ks: Sequence[int] = KS) -> dict[str, np.ndarray]:
    """Return the expected measures of a random order, exactly.

    Args:
        relevant: (Q, N) whether an adapter is right.
        ks: Depths of the recall.

    Returns:
        See `search_values`.
    """
    right = np.asarray(relevant, bool)
    total, counts = right.shape[1], right.sum(1)
    first = {  # expected inverse rank of the first of m right ones
        m: sum(comb(total - i, m - 1) / comb(total, m) / i for i in range(1, total - m + 2))
        for m in set(counts.tolist())
    }
    values = {}
    for k in ks:
        depth = min(k, total)
        values[f"recall@{k}"] = counts * depth / total / np.minimum(depth, counts)
    values["mrr"] = np.array([first[m] for m in counts.tolist()])
    return values


def closeness(first: Tensor, second: Tensor) -> dict[str, np.ndarray]:
    """Return how close the two adapters of each concept lie, as in figure 4 of arXiv 2508.02107.

    Args:
        first: Vectors (C, e) of adapters of C concepts.
        second: Of other adapters of these concepts, in the same order.

    Returns:
        (C,) ``intra``: cosine of the two; ``inter``: mean cosine of the first of them with the
        second of other concepts; ``gap``: by how much it is smaller.
    """
    cosines = (F.normalize(first.double(), dim=1) @ F.normalize(second.double(), dim=1).mT).numpy()
    intra = cosines.diagonal()
    inter = (cosines.sum(1) - intra) / (len(cosines) - 1)
    return {"intra": intra, "inter": inter, "gap": intra - inter}
