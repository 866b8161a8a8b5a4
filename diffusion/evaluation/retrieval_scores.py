"""How well adapters are found, and rivals without training: BM25, likeness of adapters."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from math import comb
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion.retrieval.encoder import AdapterBatch


def delta_cosine(adapters: AdapterBatch, others: AdapterBatch) -> Tensor:
    """Return the cosines of the changes ΔW of all layers, without forming them.

    Args:
        adapters: n adapters.
        others: m adapters, of the same base.

    Returns:
        (n, m); 0 for an adapter that changes nothing.
    """
    inner = _inner(adapters, others)
    norms = [_inner(batch, batch).diagonal().sqrt() for batch in (adapters, others)]
    tiny = torch.finfo(inner.dtype).tiny
    return inner / (norms[0][:, None] * norms[1]).clamp_min(tiny)


def _inner(adapters: AdapterBatch, others: AdapterBatch) -> Tensor:
    """Return the sums of ⟨ΔW, ΔW'⟩ = ⟨BᵀB', AA'ᵀ⟩ over layers (n, m)."""
    like = next(iter(adapters.down.values()))
    total = like.new_zeros(len(adapters.present), len(others.present), dtype=torch.float64)
    for name in adapters.down.keys() & others.down.keys():
        a, b = adapters.down[name].double(), adapters.up[name].double()
        c, d = others.down[name].double(), others.up[name].double()
        up = torch.einsum("nor,mos->nmrs", b, d)
        total += (up * torch.einsum("nri,msi->nmrs", a, c)).sum((2, 3))
    return total


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
        over the rank of the first right one; ``ndcg``: discounted gain over the ideal one. (Q,)

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
    discounts = _discounts(ranked.shape[1])
    values["ndcg"] = (ranked * discounts).sum(1) / np.cumsum(discounts)[counts - 1]
    return values


def chance(relevant: np.ndarray | Tensor, ks: Sequence[int] = KS) -> dict[str, np.ndarray]:
    """Return the expected measures of a random order, exactly.

    Args:
        relevant: (Q, N) whether an adapter is right.
        ks: Depths of the recall.

    Returns:
        See :func:`search_values`.
    """
    right = np.asarray(relevant, bool)
    total, counts = right.shape[1], right.sum(1)
    first = {  # expected inverse rank of the first of m right ones
        m: sum(comb(total - i, m - 1) / comb(total, m) / i for i in range(1, total - m + 2))
        for m in set(counts.tolist())
    }
    discounts = _discounts(total)
    values = {}
    for k in ks:
        depth = min(k, total)
        values[f"recall@{k}"] = counts * depth / total / np.minimum(depth, counts)
    values["mrr"] = np.array([first[m] for m in counts.tolist()])
    values["ndcg"] = counts / total * discounts.sum() / np.cumsum(discounts)[counts - 1]
    return values


def _discounts(total: int) -> np.ndarray:
    return 1 / np.log2(np.arange(2, total + 2))


class ConceptCosines(NamedTuple):
    """Cosines of adapters of a concept, as in figure 4 of arXiv 2508.02107.

    Attributes:
        concepts: The C concepts that occur in both groups.
        intra: (C,) mean cosine with other adapters of the concept; NaN if there is no other.
        inter: (C,) mean cosine with adapters of other concepts.
    """

    concepts: list[str]
    intra: np.ndarray
    inter: np.ndarray

    @property
    def gap(self) -> np.ndarray:
        """(C,) by how much adapters of one concept are closer."""
        return self.intra - self.inter


def concept_cosines(
    vectors: Tensor,
    concepts: Sequence[str],
    others: Tensor,
    other_concepts: Sequence[str],
) -> ConceptCosines:
    """Return how close adapters of one concept lie, and those of different concepts.

    Args:
        vectors: (n, e) of adapters.
        concepts: Concept of each.
        others: (m, e) of the adapters that they are compared with.
        other_concepts: Concepts of those.
    """
    first = F.normalize(vectors.double(), dim=1)
    second = F.normalize(others.double(), dim=1)
    names = np.array(list(concepts), dtype=object)
    other_names = np.array(list(other_concepts), dtype=object)
    cosines = (first @ second.mT).numpy()
    same = names[:, None] == other_names[None]
    kept = [name for name in dict.fromkeys(concepts) if name in set(other_names)]
    intra, inter = [], []
    for name in kept:
        rows = (names == name)[:, None]
        intra.append(_mean(cosines[rows & same]))
        inter.append(_mean(cosines[rows & ~same]))
    return ConceptCosines(kept, np.array(intra), np.array(inter))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


def by_captions(text: Tensor, captions: Tensor, owners: Tensor, affinity: Tensor) -> Tensor:
    """Score adapters by their likeness to the adapter whose caption is nearest to a query.

    Args:
        text: Queries (Q, e), of unit length.
        captions: Known captions (C, e), of unit length.
        owners: (C,) number of the known adapter of each.
        affinity: (A, N) how alike each known adapter and each searched one are, such as
            :func:`diffusion.evaluation.retrieval_scores.delta_cosine`.

    Returns:
        Scores (Q, N).
    """
    return affinity[owners[torch.argmax(text @ captions.mT, dim=1)]]
