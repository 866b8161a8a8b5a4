"""Simple rules that open some of the retrieved adapters, by cosines and likeness alone."""

from collections.abc import Callable

import torch
from torch import Tensor

from core_gates.adapters.relevance import closest_higher


def largest_gap(cosines: Tensor, *, least: int = 1, most: int = 4) -> Tensor:
    """Open those above the largest gap between sorted cosines, ``least`` to ``most`` of them."""
    ordered = cosines.sort(-1, descending=True).values
    gaps = (ordered[..., :-1] - ordered[..., 1:])[..., least - 1 : most]
    count = gaps.argmax(-1, keepdim=True) + least if gaps.shape[-1] else least
    return (ranks(cosines) < count).to(cosines)


def soft_threshold(cosines: Tensor, *, threshold: float, width: float) -> Tensor:
    """Open by ``sigmoid((c - threshold) / width)``."""
    return ((cosines - threshold) / width).sigmoid()


def less_similarity(
    cosines: Tensor, similarities: Tensor, *, less: float, threshold: float, width: float
) -> Tensor:
    """Open softly by the cosine less a part of the similarity to the most alike one above it.

    Args:
        cosines: Of captions and adapters (N, K).
        similarities: Of the adapters to each other (K, K).
        less: The part.
        threshold: Of what is left, where an adapter is half open.
        width: Of the threshold.
    """
    rest = cosines - less * closest_higher(cosines, similarities).clamp_min(0)
    return soft_threshold(rest, threshold=threshold, width=width)


def absolute_threshold(cosines: Tensor, *, threshold: float) -> Tensor:
    """Open those with at least a cosine."""
    return (cosines >= threshold).to(cosines)


def relative_threshold(cosines: Tensor, *, share: float) -> Tensor:
    """Open those with at least a fraction of the best cosine."""
    return (cosines >= share * cosines.amax(-1, keepdim=True)).to(cosines)


def top(cosines: Tensor, *, count: int) -> Tensor:
    """Open so many of the highest cosines."""
    return (ranks(cosines) < count).to(cosines)


def ranks(cosines: Tensor) -> Tensor:
    """Return how many cosines (..., K) are higher than each."""
    return (cosines.unsqueeze(-2) > cosines.unsqueeze(-1)).sum(-1)


RULES: dict[str, Callable[..., Tensor]] = {
    "largest gap": largest_gap,
    "soft threshold": soft_threshold,
    "absolute threshold": absolute_threshold,
    "relative threshold": relative_threshold,
    "top": top,
    "all": torch.ones_like,
    "mean": lambda cosines: torch.full_like(cosines, 1 / cosines.shape[-1]),
}
"""Each takes cosines (N, K) and settings, and returns how far adapters are open (N, K)."""

LESS_SIMILARITY = "cosine less similarity"
"""The rule that takes similarities (K, K), too."""
