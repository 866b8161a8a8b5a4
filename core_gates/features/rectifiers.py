"""Rectifiers: from the logit of a feature gate to its score, zero when the gate is closed."""

from typing import Literal

import torch
from torch import Tensor

Rectifier = Literal["sigmoid", "relu", "hard_concrete", "straight_through"]

# Stretched interval and temperature of the hard concrete distribution (Louizos et al., 2018).
GAMMA, ZETA, BETA = -0.1, 1.1, 2 / 3


def rectify(logits: Tensor, rectifier: Rectifier) -> Tensor:
    """Return the deterministic scores of gates, not negative, in the shape of ``logits``."""
    if rectifier == "relu":
        return logits.relu()
    open_ = logits.sigmoid()
    if rectifier == "hard_concrete":
        return (open_ * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
    if rectifier == "straight_through":
        return (open_ > 0.5).to(open_.dtype) + (open_ - open_.detach())
    return open_


def sample_hard_concrete(logits: Tensor, uniform: Tensor) -> Tensor:
    """Return stretched and clipped binary concrete samples (Louizos et al., 2018, equation 11).

    Args:
        logits: log α of each gate.
        uniform: Noise of the same shape, strictly between 0 and 1.
    """
    noise = uniform.log() - (-uniform).log1p()
    concrete = ((noise + logits) / BETA).sigmoid()
    return (concrete * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def open_probability(logits: Tensor) -> Tensor:
    """Return the probability that a hard concrete gate is not exactly zero (equation 12)."""
    shift = torch.tensor(-GAMMA / ZETA, dtype=logits.dtype, device=logits.device).log()
    return (logits - BETA * shift).sigmoid()
