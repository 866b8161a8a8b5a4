"""Triton kernels of ``router``; same functions and arguments as ``reference.py``."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 2048  # logits of one program
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _load_logits(logits, row, column, num_rows, num_experts):
    inside = (row < num_rows)[:, None] & (column < num_experts)[None, :]
    value = tl.load(logits + row[:, None] * num_experts + column[None, :], inside, other=0.0)
    return tl.where((column < num_experts)[None, :], value.to(tl.float32), -float("inf"))


@triton.jit
def _softmax(value):
    """Return the probabilities and the log-partition of every row."""
    top = tl.max(value, 1)
    power = tl.exp(value - top[:, None])
    total = tl.sum(power, 1)
    return power / total[:, None], top + tl.log(total)


@triton.jit
def _forward_kernel(
    logits, weights, indices, probs, counts, z_parts, num_rows, num_experts,
    K: tl.constexpr, RENORMALIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write everything from one read of the logits; K passes choose, ties to the lowest index."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    valid = row < num_rows
    value = _load_logits(logits, row, column, num_rows, num_experts)
    prob, log_partition = _softmax(value)
    stored = valid[:, None] & (column < num_experts)[None, :]
    tl.store(probs + row[:, None] * num_experts + column[None, :], prob, stored)
    tl.store(
        z_parts + tl.program_id(0), tl.sum(tl.where(valid, log_partition * log_partition, 0.0))
    )
    available = tl.where((column < num_experts)[None, :], tl.maximum(value, _LOWEST), -float("inf"))
    remaining = available
    total = tl.zeros((ROWS,), tl.float32)
    for _ in tl.static_range(K):
        hit = column[None, :] == tl.argmax(remaining, 1)[:, None]
        total += tl.sum(tl.where(hit, prob, 0.0), 1)
        remaining = tl.where(hit, -float("inf"), remaining)
    remaining = available
    chosen = tl.zeros((ROWS, COLUMNS), tl.int64)
    for i in tl.static_range(K):
        best = tl.argmax(remaining, 1)
        hit = column[None, :] == best[:, None]
        weight = tl.sum(tl.where(hit, prob, 0.0), 1)
        if RENORMALIZE:
            weight /= total
        tl.store(weights + row * K + i, weight, valid)
        tl.store(indices + row * K + i, best.to(tl.int64), valid)
        chosen += tl.where(hit & valid[:, None], 1, 0)
        remaining = tl.where(hit, -float("inf"), remaining)
    tl.atomic_add(counts + column, tl.sum(chosen, 0), column < num_experts)


@triton.jit
def _backward_kernel(
    grad_weights, grad_probs, grad_z, logits, indices, weights, out, num_rows, num_experts,
    K: tl.constexpr, RENORMALIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Recompute the probabilities and write the gradient of the logits."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    valid = row < num_rows
    stored = valid[:, None] & (column < num_experts)[None, :]
    place = row[:, None] * num_experts + column[None, :]
    value = _load_logits(logits, row, column, num_rows, num_experts)
    prob, log_partition = _softmax(value)
    of_probs = tl.load(grad_probs + place, stored, other=0.0)
    of_chosen = tl.zeros((ROWS, COLUMNS), tl.float32)
    weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in tl.static_range(K):
        hit = column[None, :] == tl.load(indices + row * K + i, valid, other=0)[:, None]
        of_chosen += tl.where(
            hit, tl.load(grad_weights + row * K + i, valid, other=0.0)[:, None], 0
        )
        weight += tl.where(hit, tl.load(weights + row * K + i, valid, other=0.0)[:, None], 0.0)
    out_value = 2 * tl.load(grad_z) / num_rows * log_partition[:, None] * prob
    if RENORMALIZE:
        out_value += weight * (of_chosen - tl.sum(weight * of_chosen, 1)[:, None])
    else:
        of_probs += of_chosen
    out_value += prob * (of_probs - tl.sum(of_probs * prob, 1)[:, None])
    tl.store(out + place, out_value, stored)


def forward(
    logits: Tensor, k: int, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return weights (N, K), indices (N, K), probs (N, E), counts (E,) and the z-loss."""
    logits = logits.contiguous()
    num_rows, num_experts = logits.shape
    new = {"device": logits.device, "dtype": torch.float32}
    weights = torch.empty((num_rows, k), **new)
    indices = torch.empty((num_rows, k), device=logits.device, dtype=torch.int64)
    probs = torch.empty((num_rows, num_experts), **new)
    counts = torch.zeros(num_experts, device=logits.device, dtype=torch.int64)
    rows, columns = _block(num_experts)
    num_programs = triton.cdiv(num_rows, rows)
    z_parts = torch.empty(num_programs, **new)
    if num_programs:
        with torch.cuda.device_of(logits):
            _forward_kernel[(num_programs,)](
                logits, weights, indices, probs, counts, z_parts, num_rows, num_experts,
                K=k, RENORMALIZE=renormalize, ROWS=rows, COLUMNS=columns,
            )  # fmt: skip
    return weights, indices, probs, counts, z_parts.sum() / max(num_rows, 1)


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
    logits = logits.contiguous()
    out = torch.empty_like(logits)
    num_rows, num_experts = logits.shape
    rows, columns = _block(num_experts)
    if num_rows:
        with torch.cuda.device_of(logits):
            _backward_kernel[(triton.cdiv(num_rows, rows),)](
                grad_weights.contiguous(), grad_probs.contiguous(), grad_z, logits,
                indices.contiguous(), weights.contiguous(), out, num_rows, num_experts,
                K=indices.shape[1], RENORMALIZE=renormalize, ROWS=rows, COLUMNS=columns,
            )  # fmt: skip
    return out


def _block(num_experts: int) -> tuple[int, int]:
    columns = triton.next_power_of_2(num_experts)
    return max(ELEMENTS // columns, 1), columns
