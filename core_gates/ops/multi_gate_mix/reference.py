"""Definition of ``multi_gate_mix``: any floating dtype, half precision computed in float32.

B tokens, E experts, D features, S gates; G = 2 with self gates, else 1.
"""

import torch
from torch import Tensor

from core_gates.numerics import accumulation_dtype


def forward(experts: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    """Return the mixtures (B, S, D) of experts (B, E, D) in their dtype.

    Args:
        experts: Outputs of the experts (B, E, D).
        logits: Logits (B, G, S, E): index 0 of G holds the gates, index 1 the self gates.
        mask: True where a gate sees an expert (G, S, E).
    """
    acc = accumulation_dtype(experts, logits)
    weights = normalize(logits.to(acc), mask).sum(1)
    return (weights @ experts.to(acc)).to(experts.dtype)


def backward(grad: Tensor, experts: Tensor, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients with respect to the experts and the logits."""
    acc = accumulation_dtype(experts, logits)
    weights = normalize(logits.to(acc), mask)
    grad = grad.to(acc)
    grad_experts = weights.sum(1).mT @ grad
    grad_weights = (grad @ experts.to(acc).mT).unsqueeze(1)
    grad_logits = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    return grad_experts.to(experts.dtype), grad_logits.to(logits.dtype)


def normalize(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the softmax of every gate over the experts that it sees, zero at the others.

    An empty seat of logit 0 is added to the single expert of a self gate, which turns the
    softmax into the sigmoid, and replaces the experts of a gate that sees none.
    """
    single = torch.arange(len(mask), device=mask.device).view(
        -1, 1, 1
    )  # 0 of gates, 1 of self gates
    seat = mask.sum(-1, keepdim=True) <= single  # an update in place of [1:] breaks Inductor's C++
    hidden = torch.cat([~mask, ~seat], -1)
    seats = logits.new_zeros(*logits.shape[:-1], 1)
    return torch.cat([logits, seats], -1).masked_fill(hidden, -torch.inf).softmax(-1)[..., :-1]
