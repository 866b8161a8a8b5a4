"""Attention within a window of neighbors, over compressed sequences with empty slots."""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from core_gates.errors import check_at_least, check_option
from core_gates.numerics import accumulation_dtype

Weighting = Literal["softmax", "relu2"]


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    causal: bool,
    weighting: Weighting,
    filled: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Let every slot attend to filled slots at most ``window`` away.

    The sequence is cut into blocks of ``window`` queries, and the keys of a block are those of its
    neighborhood: the block before it, itself and, unless ``causal``, the block after it. Time and
    memory are O(N window).

    - ``softmax``: weights ``softmax(q k / √Z + bias)``;
    - ``relu2``: weights ``relu(q k / c + bias)²`` with c the size of the neighborhood on both
      sides, ``window`` if causal, else ``2 window`` (Ma et al., 2022).

    A slot without any filled neighbor gets a finite result.

    Args:
        query: Queries (B, N, Z).
        key: Keys (B, N, Z).
        value: Values (B, N, V).
        window: Farthest neighbor, in slots.
        causal: Whether later slots are hidden.
        weighting: How scores become weights.
        filled: True (B, N) at slots that may be attended to.
        bias: Added to the scores, broadcastable to those of :func:`in_blocks`:
            (B, blocks, window, span).

    Returns:
        Attended values (B, N, V).

    Raises:
        ValueError: ``window`` is below 1 or ``weighting`` is unknown.
    """
    check_attention(window, weighting)
    num_slots, key_dim = query.shape[1:]
    if query.shape[0] * num_slots == 0:
        everything = query.sum() + key.sum() + (0 if bias is None else bias.sum())
        return value * everything  # empty, with a gradient for every input
    scale = score_scale(key_dim, window, causal=causal, weighting=weighting)
    queries = in_blocks(query * scale, window)
    keys = in_neighborhoods(key, window, causal=causal)
    scores = queries @ keys.mT
    if bias is not None:
        scores = scores + bias
    hidden = ~in_neighborhoods(filled.unsqueeze(-1), window, causal=causal).mT
    hidden = hidden | _too_far(window, causal, query.device)
    weights = weigh(scores, hidden, weighting)
    attended = weights.to(value.dtype) @ in_neighborhoods(value, window, causal=causal)
    return attended.flatten(1, 2)[:, :num_slots]


def score_scale(key_dim: int, window: int, *, causal: bool, weighting: Weighting) -> float:
    """Return the factor of the dot product of a query and a key."""
    if weighting == "softmax":
        return float(key_dim**-0.5)
    return 1 / (window if causal else 2 * window)


def weigh(scores: Tensor, hidden: Tensor, weighting: Weighting) -> Tensor:
    """Return the weights of the keys (..., keys), none for those ``hidden`` if any other is seen.

    Softmax is computed in float32 at least. Without any key to see, its weights are equal.
    """
    if weighting == "relu2":
        return scores.masked_fill(hidden, 0).relu().square()
    exact = scores.to(accumulation_dtype(scores))
    return exact.masked_fill(hidden, torch.finfo(exact.dtype).min).softmax(-1)


def in_blocks(slots: Tensor, window: int) -> Tensor:
    """Cut (B, N, D) into (B, blocks, window, D), zeros after the last slot."""
    missing = -slots.shape[1] % window
    batch, num_slots, dim = slots.shape
    num_blocks = (num_slots + missing) // window
    return F.pad(slots, (0, 0, 0, missing)).reshape(batch, num_blocks, window, dim)


def in_neighborhoods(slots: Tensor, window: int, *, causal: bool) -> Tensor:
    """Return the neighborhood (B, blocks, span, D) of every block, zeros beyond both ends.

    The span is 2 or, unless ``causal``, 3 windows; key c of a block is its slot ``c - window``.
    """
    blocks = in_blocks(slots, window)
    before = F.pad(blocks, (0, 0, 0, 0, 1, 0))[:, :-1]
    if causal:
        return torch.cat([before, blocks], 2)
    return torch.cat([before, blocks, F.pad(blocks, (0, 0, 0, 0, 0, 1))[:, 1:]], 2)


def distances(window: int, *, causal: bool, device: torch.device) -> Tensor:
    """Return key minus query (window, span), in slots."""
    span = (2 if causal else 3) * window
    keys = torch.arange(-window, span - window, device=device)
    return keys - torch.arange(window, device=device).unsqueeze(-1)


def check_attention(window: int, weighting: str) -> None:
    """Refuse settings of :func:`local_attention`.

    Raises:
        ValueError: ``window`` is below 1 or ``weighting`` is unknown.
    """
    check_at_least(1, window=window)
    check_option("weighting", weighting, get_args(Weighting))


def _too_far(window: int, causal: bool, device: torch.device) -> Tensor:
    apart = distances(window, causal=causal, device=device)
    return (apart < -window) | (apart > (0 if causal else window))
