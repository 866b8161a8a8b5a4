"""Rectifiers: from the logit of a feature gate to its score, zero when the gate is closed."""

from typing import Literal

from torch import Tensor

from core_gates.ops.hard_concrete import HardConcrete

Rectifier = Literal["sigmoid", "relu", "hard_concrete", "straight_through"]

HARD_CONCRETE = HardConcrete()


def rectify(logits: Tensor, rectifier: Rectifier) -> Tensor:
    """Return the deterministic scores of gates, not negative, in the shape of ``logits``."""
    if rectifier == "relu":
        return logits.relu()
    if rectifier == "hard_concrete":
        return HARD_CONCRETE.deterministic(logits)
    open_ = logits.sigmoid()
    if rectifier == "straight_through":
        return (open_ > 0.5).to(open_.dtype) + (open_ - open_.detach())
    return open_
