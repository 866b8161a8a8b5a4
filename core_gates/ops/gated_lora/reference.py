"""Definition of ``gated_lora`` for N tokens, K adapters of ``ranks`` (R in all), D output features.

The output of adapter k is ``y = hidden_k @ up_k``. Its mean and variance over the features follow
from the hidden activations alone: with the row means ``m`` of ``up_k`` and the Gram matrix
``G = C C^T / D`` of the centered rows ``C``, they are ``m·h`` and ``h·G h``. Tokens are independent
of each other, so any block of them can be computed alone.

Any floating dtype; half precision is computed in float32.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from core_gates.numerics import accumulation_dtype


def forward(
    base: Tensor,
    hidden: Tensor,
    up: Tensor,
    coefficients: Tensor,
    ranks: Sequence[int],
    eps: float,
) -> Tensor:
    """Return ``base + c_out Σ_k sigmoid(logits_k) y_k`` (N, D) in the dtype of ``base``."""
    mean, rstd = statistics(hidden, up, ranks, eps)
    return mix(base, hidden, mean, rstd, up, coefficients, ranks, eps)


def backward(
    grad: Tensor,
    base: Tensor,
    hidden: Tensor,
    up: Tensor,
    coefficients: Tensor,
    ranks: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of base, hidden, up and coefficients."""
    mean, rstd = statistics(hidden, up, ranks, eps)
    grads = mix_backward(grad, base, hidden, mean, rstd, up, coefficients, ranks, eps)
    return *grads[:2], grads[2].to(up.dtype), grads[3].to(coefficients.dtype)


def statistics(
    hidden: Tensor, up: Tensor, ranks: Sequence[int], eps: float
) -> tuple[Tensor, Tensor]:
    """Return the mean and the inverse standard deviation (N, K) of every adapter's output."""
    acc = accumulation_dtype(hidden, up)
    if len(set(ranks)) == 1:
        return _statistics_of_one_rank(hidden.to(acc), up.to(acc), ranks[0], eps)
    means, variances = [], []
    for h, u in _adapters(hidden.to(acc), up.to(acc), ranks):
        row_mean, gram = moments(u)
        means.append(h @ row_mean)
        variances.append(((h @ gram) * h).sum(-1, keepdim=True))
    # Rounding can make a variance of nearly zero negative.
    return torch.cat(means, -1), torch.rsqrt(torch.cat(variances, -1).clamp(min=0) + eps)


def _statistics_of_one_rank(
    hidden: Tensor, up: Tensor, rank: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the same for adapters of one rank, all of them together."""
    count = up.shape[0] // rank
    each = hidden.reshape(*hidden.shape[:-1], count, rank).transpose(0, 1)  # (K, N, r)
    row_mean, gram = moments(up.reshape(count, rank, *up.shape[1:]))
    mean = (each @ row_mean).squeeze(-1).mT
    variance = ((each @ gram) * each).sum(-1).mT
    return mean, torch.rsqrt(variance.clamp(min=0) + eps)


def moments(up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means (..., R, 1) and the covariances (..., R, R) of the rows of factors."""
    row_mean = up.mean(-1, keepdim=True)
    centered = up - row_mean
    return row_mean, centered @ centered.mT / up.shape[-1]


def mix(
    base: Tensor,
    hidden: Tensor,
    mean: Tensor,
    rstd: Tensor,
    up: Tensor,
    coefficients: Tensor,
    ranks: Sequence[int],
    eps: float,
) -> Tensor:
    """Return the output for tokens whose adapter statistics are known."""
    acc, features = mean.dtype, base.shape[-1:]
    value = base.to(acc)
    constant, slope, lora, cross, out = coefficients.to(acc).unbind()
    # With the normalized base output n: logits = (constant + slope n) + (lora + cross n) z.
    shift = F.layer_norm(value, features, slope, constant, eps)
    scale = F.layer_norm(value, features, cross, lora, eps)
    total = torch.zeros_like(value)
    for k, (h, u) in enumerate(_adapters(hidden.to(acc), up.to(acc), ranks)):
        _add_gated(total, h @ u, mean[:, k : k + 1], rstd[:, k : k + 1], shift, scale)
    return torch.addcmul(value, total, out).to(base.dtype)


def _add_gated(
    total: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, shift: Tensor, scale: Tensor
) -> None:
    """Add ``sigmoid(shift + scale z) y``; temporaries end here and the next are as warm."""
    z = (y - mean).mul_(rstd)
    total.addcmul_(torch.addcmul(shift, scale, z).sigmoid_(), y)


def mix_backward(
    grad: Tensor,
    base: Tensor,
    hidden: Tensor,
    mean: Tensor,
    rstd: Tensor,
    up: Tensor,
    coefficients: Tensor,
    ranks: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `forward` for a block of tokens, summed over it where shared.

    Those with respect to ``up`` and ``coefficients`` stay in the dtype of the accumulation.
    """
    acc = mean.dtype
    grad = grad.to(acc)
    constant, slope, lora, cross, out = coefficients.to(acc).unbind()
    centered = base.to(acc) - base.to(acc).mean(-1, keepdim=True)
    base_rstd = torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    n = centered * base_rstd
    shift, scale = torch.addcmul(constant, slope, n), torch.addcmul(lora, cross, n)
    weighted = grad * out
    total, sum_logit, sum_cross = (torch.zeros_like(grad) for _ in range(3))
    grads_hidden, grads_up = [], []
    for k, (h, u) in enumerate(_adapters(hidden.to(acc), up.to(acc), ranks)):
        y = h @ u
        z = (y - mean[:, k : k + 1]) * rstd[:, k : k + 1]
        gate = torch.addcmul(shift, scale, z).sigmoid()
        direct = weighted * gate
        grad_logit = direct * (1 - gate) * y
        total = total.addcmul(gate, y)
        sum_logit = sum_logit + grad_logit
        sum_cross = sum_cross.addcmul(grad_logit, z)
        grad_y = direct + _norm_backward(grad_logit * scale, z, rstd[:, k : k + 1])
        grads_hidden.append(grad_y @ u.mT)
        grads_up.append(h.mT @ grad_y)
    grad_base = grad + _norm_backward(slope * sum_logit + cross * sum_cross, n, base_rstd)
    rows = sum_logit, sum_logit * n, sum_cross, sum_cross * n, grad * total
    return (
        grad_base.to(base.dtype),
        torch.cat(grads_hidden, -1).to(hidden.dtype),
        torch.cat(grads_up),
        torch.stack([row.sum(0) for row in rows]),
    )


def _norm_backward(grad: Tensor, normal: Tensor, rstd: Tensor) -> Tensor:
    slanted = normal * (grad * normal).mean(-1, keepdim=True)
    return rstd * (grad - grad.mean(-1, keepdim=True) - slanted)


def _adapters(hidden: Tensor, up: Tensor, ranks: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    sizes = list(ranks)
    return zip(torch.split(hidden, sizes, -1), torch.split(up, sizes), strict=True)
