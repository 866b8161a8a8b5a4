"""Triton kernels of ``multi_gate_mix``; same functions and arguments as ``reference.py``."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_D = 128  # features of a program


@triton.jit
def _weights(logits, mask, position, g, S, E, G, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return the normalized weights (BLOCK_S, BLOCK_E) of one token and one kind of gates."""
    s, e = tl.arange(0, BLOCK_S)[:, None], tl.arange(0, BLOCK_E)[None, :]
    inside = (s < S) & (e < E)
    visible = tl.load(mask + (g * S + s) * E + e, inside, other=0) != 0
    logit = tl.load(logits + ((position * G + g) * S + s) * E + e, inside, other=0.0)
    logit = tl.where(visible, logit.to(tl.float32), -float("inf"))
    num_visible = tl.sum(visible.to(tl.int32), 1)[:, None]
    seat = (num_visible == 0) | ((num_visible == 1) & (g == 1))
    top = tl.maximum(tl.max(logit, 1)[:, None], tl.where(seat, 0.0, -float("inf")))
    share = tl.exp(logit - top)
    return share / (tl.sum(share, 1)[:, None] + tl.where(seat, tl.exp(-top), 0.0))


@triton.jit
def _forward_kernel(
    experts, logits, mask, out, S, E, D, G,
    BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mix one block of features of one token for all gates; every expert is read once."""
    position = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    s, e = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_E)[None, :]
    weights = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    for g in range(G):
        weights += _weights(logits, mask, position, g, S, E, G, BLOCK_S, BLOCK_E)
    mixed = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for i in range(E):
        weight = tl.sum(tl.where(e == i, weights, 0.0), 1)
        value = tl.load(experts + (position * E + i) * D + d, d < D, other=0.0).to(tl.float32)
        mixed += weight[:, None] * value[None, :]
    place = (position * S + s[:, None]) * D + d[None, :]
    tl.store(out + place, mixed, (s[:, None] < S) & (d[None, :] < D))


@triton.jit
def _backward_kernel(
    grad, experts, logits, mask, grad_experts, grad_logits, S, E, D, G,
    BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Recompute the weights of one token and write both of its gradients."""
    position = tl.program_id(0).to(tl.int64)
    s, e = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_E)[None, :]
    weights = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    for g in range(G):
        weights += _weights(logits, mask, position, g, S, E, G, BLOCK_S, BLOCK_E)
    grad_weights = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (s[:, None] < S) & (d[None, :] < D)
        place = (position * S + s[:, None]) * D + d[None, :]
        outer = tl.load(grad + place, inside, other=0.0).to(tl.float32)
        for i in range(E):
            row = (position * E + i) * D + d
            value = tl.load(experts + row, d < D, other=0.0).to(tl.float32)
            product = tl.sum(outer * value[None, :], 1)
            grad_weights += tl.where(e == i, product[:, None], 0.0)
            weight = tl.sum(tl.where(e == i, weights, 0.0), 1)
            tl.store(grad_experts + row, tl.sum(weight[:, None] * outer, 0), d < D)
    for g in range(G):
        share = _weights(logits, mask, position, g, S, E, G, BLOCK_S, BLOCK_E)
        slope = share * (grad_weights - tl.sum(share * grad_weights, 1)[:, None])
        place = ((position * G + g) * S + s[:, None]) * E + e
        tl.store(grad_logits + place, slope, (s[:, None] < S) & (e < E))


def forward(experts: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    """Return the mixtures (B, S, D) of experts (B, E, D)."""
    experts, logits, mask = experts.contiguous(), logits.contiguous(), mask.contiguous()
    num_positions, num_experts, dim = experts.shape
    out = torch.empty(num_positions, mask.shape[1], dim, dtype=experts.dtype, device=experts.device)
    if out.numel():
        grid = num_positions, triton.cdiv(dim, BLOCK_D)
        with torch.cuda.device_of(experts):
            _forward_kernel[grid](
                experts, logits, mask, out, mask.shape[1], num_experts, dim, mask.shape[0],
                **_blocks(mask),
            )  # fmt: skip
    return out


def backward(grad: Tensor, experts: Tensor, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients with respect to the experts and the logits."""
    grad, experts, logits, mask = (t.contiguous() for t in (grad, experts, logits, mask))
    grad_experts, grad_logits = torch.empty_like(experts), torch.empty_like(logits)
    num_positions, num_experts, dim = experts.shape
    if num_positions:
        with torch.cuda.device_of(experts):
            _backward_kernel[(num_positions,)](
                grad, experts, logits, mask, grad_experts, grad_logits,
                mask.shape[1], num_experts, dim, mask.shape[0], **_blocks(mask),
            )  # fmt: skip
    return grad_experts, grad_logits


def _blocks(mask: Tensor) -> dict[str, int]:
    _, num_gates, num_experts = mask.shape
    return {
        "BLOCK_S": triton.next_power_of_2(num_gates),
        "BLOCK_E": triton.next_power_of_2(num_experts),
        "BLOCK_D": BLOCK_D,
    }
