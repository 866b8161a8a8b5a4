"""Definition of ``feature_gate``: any floating dtype, half precision computed in float32.

I inputs, N rows, D features, G gates of L maps of rank r, R runs of a gate over an input.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from core_gates.numerics import accumulation_dtype

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def forward(
    v: Tensor,
    hidden: Tensor,
    mixture: Tensor,
    up: Tensor,
    inputs: Sequence[int],
    gates: Sequence[int],
) -> Tensor:
    """Return the inputs of all runs times their factors (R, N, D), in the dtype of ``v``.

    Args:
        v: Inputs (I, N, D).
        hidden: Low-rank activations of the runs (R, N, L, r).
        mixture: Weights of the maps (R, N, L), which sum to one.
        up: Second factors of the maps of all gates (G, L, r, D).
        inputs: Input of every run (R,).
        gates: Gate of every run (R,).
    """
    factor = factors(hidden, mixture, up, gates)
    return (v.to(factor.dtype)[list(inputs)] * factor).to(v.dtype)


def factors(hidden: Tensor, mixture: Tensor, up: Tensor, gates: Sequence[int]) -> Tensor:
    """Return the factors ``1 + Σ_l mixture_l (2σ(hidden_l up_l) - 1)`` (R, N, D), exact at zero."""
    acc = accumulation_dtype(hidden, mixture, up)
    opened = _opened(hidden.to(acc), up.to(acc), gates)
    return 1 + (2 * mixture.to(acc).mT.unsqueeze(-1) * (opened - 0.5)).sum(1)


def backward(
    grad: Tensor,
    v: Tensor,
    hidden: Tensor,
    mixture: Tensor,
    up: Tensor,
    inputs: Sequence[int],
    gates: Sequence[int],
) -> Gradients:
    """Return the gradients of v, hidden, mixture and up."""
    acc = accumulation_dtype(v, hidden, mixture, up)
    h, u, m = hidden.to(acc), up.to(acc), 2 * mixture.to(acc).mT.unsqueeze(-1)
    opened = _opened(h, u, gates)
    factor = 1 + (m * (opened - 0.5)).sum(1)
    of_factor = grad.to(acc) * v.to(acc)[list(inputs)]
    grad_mixture = 2 * ((opened - 0.5) * of_factor.unsqueeze(1)).sum(-1).mT
    slope = m * opened * (1 - opened) * of_factor.unsqueeze(1)  # (R, L, N, D)
    grad_hidden = (slope @ u[list(gates)].mT).transpose(1, 2)
    of_runs = h.permute(0, 2, 3, 1) @ slope  # (R, L, r, D)
    grad_v = torch.zeros_like(v, dtype=acc)
    grad_v = grad_v.index_add(0, _index(inputs, v), grad.to(acc) * factor)
    grad_up = torch.zeros_like(up, dtype=acc).index_add(0, _index(gates, v), of_runs)
    return (
        grad_v.to(v.dtype),
        grad_hidden.to(hidden.dtype),
        grad_mixture.to(mixture.dtype),
        grad_up.to(up.dtype),
    )


def _opened(hidden: Tensor, up: Tensor, gates: Sequence[int]) -> Tensor:
    """Return the sigmoids of the logits of all maps (R, L, N, D)."""
    return (hidden.transpose(1, 2) @ up[list(gates)]).sigmoid()


def _index(numbers: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(list(numbers), device=like.device)
