"""Definition of ``router``; float64 stays float64, everything else is computed in float32."""

import torch
from torch import Tensor

from core_gates.numerics import accumulation_dtype, lowest_index_top_k


def forward(
    logits: Tensor, k: int, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return weights (N, K), indices (N, K), probs (N, E), counts (E,) and the z-loss."""
    logits = logits.to(_exact(logits))
    probs = logits.softmax(-1)
    top, indices = lowest_index_top_k(logits, k)
    chosen_probs = probs.gather(-1, indices)
    weights = top.softmax(-1) if renormalize else chosen_probs
    chosen = indices.flatten()
    counts = torch.zeros_like(logits[:0], dtype=torch.int64).sum(0)
    counts = counts.scatter_add(0, chosen, torch.ones_like(chosen))
    # The largest probability is at least 1 / E: its logarithm is exact where others underflow.
    log_partition = top[:, 0] - chosen_probs[:, 0].log()
    z_loss = log_partition.square().sum() / max(logits.shape[0], 1)
    return weights, indices, probs, counts, z_loss


def backward(
    grad_weights: Tensor,
    grad_probs: Tensor,
    grad_z: Tensor,
    logits: Tensor,
    indices: Tensor,
    weights: Tensor,
    renormalize: bool,
) -> Tensor:
    """Return the gradient with respect to the logits."""
    exact = logits.to(_exact(logits))
    probs, log_partition = exact.softmax(-1), exact.logsumexp(-1, keepdim=True)
    grad = torch.zeros_like(exact)
    if renormalize:
        mean = (grad_weights * weights).sum(-1, keepdim=True)
        grad.scatter_(-1, indices, weights * (grad_weights - mean))
    else:
        grad_probs = grad_probs.scatter_add(-1, indices, grad_weights)
    grad += probs * (grad_probs - (grad_probs * probs).sum(-1, keepdim=True))
    grad += 2 * grad_z / max(logits.shape[0], 1) * log_partition * probs
    return grad.to(logits.dtype)


def _exact(logits: Tensor) -> torch.dtype:
    return accumulation_dtype(logits)
