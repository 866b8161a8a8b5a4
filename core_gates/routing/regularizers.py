"""Sums and means over tokens, for the losses that gates make themselves."""

import math

from torch import Tensor

ENTROPY_EPS = 1e-6


def sum_over_positions(values: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
    """Return the sums (N,) of values (..., N) over the tokens that are not ignored.

    Args:
        values: Values (..., N).
        padding_mask: True (...) at tokens to ignore.
    """
    if padding_mask is not None:
        values = values.masked_fill(padding_mask.unsqueeze(-1), 0)
    return values.reshape(math.prod(values.shape[:-1]), values.shape[-1]).sum(0)


def mean_over_positions(values: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
    """Return the means (N,) of values (..., N) over the tokens that are not ignored.

    Args:
        values: Values (..., N).
        padding_mask: True (...) at tokens to ignore; without any other token the mean is 0.
    """
    total = sum_over_positions(values, padding_mask=padding_mask)
    if padding_mask is None:
        return total / max(1, math.prod(values.shape[:-1]))
    return total / (~padding_mask).sum().clamp(min=1)


def selection_entropy(
    probs: Tensor, *, padding_mask: Tensor | None = None, floor: float = 0.0
) -> Tensor:
    """Return the mean over tokens of ``Σ_j Σ_e -P log(P + 1e-6)``, in nats.

    It is small if every tree or selector j of a token points at one expert.

    Args:
        probs: Probabilities P (..., J, E).
        padding_mask: True (...) at tokens to ignore.
        floor: Smaller probabilities count as this one.
    """
    probs = probs.clamp(min=floor)
    entropy = -(probs * (probs + ENTROPY_EPS).log()).sum((-2, -1))
    return mean_over_positions(entropy.unsqueeze(-1), padding_mask=padding_mask).squeeze(-1)
