"""Triton kernels of ``gated_lora``; same functions and arguments as ``reference.py``.

A program holds a tile of tokens times features and walks over the adapters, so that the full-size
output of an adapter exists in registers only. The backward pass recomputes it three times: for the
gradient of the hidden activations (sums over the features), of the base output, and of what the
tokens share. Ranks are padded with zeros to a power of two of at least 16.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from core_gates.ops.gated_lora import reference

TOKENS, FEATURES = 32, 64  # of a tile
TOKENS_OF_A_PARTIAL_SUM = 512


@triton.jit
def _base_statistics_kernel(
    base, mean, rstd, num_tokens, dim, eps, TOKENS: tl.constexpr, FEATURES: tl.constexpr
):
    """Write mean and inverse standard deviation of every row of ``base``."""
    rows = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS,), tl.float32)
    for start in range(0, dim, FEATURES):
        cols = start + tl.arange(0, FEATURES)
        inside = (rows[:, None] < num_tokens) & (cols[None, :] < dim)
        value = tl.load(base + rows[:, None] * dim + cols[None, :], inside, 0.0).to(tl.float32)
        total += tl.sum(value, 1)
    average = total / dim
    squares = tl.zeros((TOKENS,), tl.float32)
    for start in range(0, dim, FEATURES):
        cols = start + tl.arange(0, FEATURES)
        inside = (rows[:, None] < num_tokens) & (cols[None, :] < dim)
        value = tl.load(base + rows[:, None] * dim + cols[None, :], inside, 0.0).to(tl.float32)
        centered = tl.where(inside, value - average[:, None], 0.0)
        squares += tl.sum(centered * centered, 1)
    tl.store(mean + rows, average, rows < num_tokens)
    tl.store(rstd + rows, tl.rsqrt(squares / dim + eps), rows < num_tokens)


@triton.jit
def _coefficient(coefficients, row, cols, dim):
    return tl.load(coefficients + row * dim + cols, cols < dim, 0.0).to(tl.float32)[None, :]


@triton.jit
def _base_terms(base, base_mean, base_rstd, coefficients, rows, cols, num_tokens, dim):
    """Return the base output, normalized too, and the two terms of the logits it determines."""
    inside = (rows[:, None] < num_tokens) & (cols[None, :] < dim)
    value = tl.load(base + rows[:, None] * dim + cols[None, :], inside, 0.0).to(tl.float32)
    mean = tl.load(base_mean + rows, rows < num_tokens, 0.0)[:, None]
    rstd = tl.load(base_rstd + rows, rows < num_tokens, 0.0)[:, None]
    normal = (value - mean) * rstd
    shift = _coefficient(coefficients, 0, cols, dim) + normal * _coefficient(
        coefficients, 1, cols, dim
    )
    scale = _coefficient(coefficients, 2, cols, dim) + normal * _coefficient(
        coefficients, 3, cols, dim
    )
    return value, normal, shift, scale


@triton.jit
def _adapter(hidden, up, mean, rstd, k, num_adapters, rows, cols, num_tokens, dim, R: tl.constexpr):
    """Return the factors of adapter ``k``, its output and its normalized output."""
    inner = k * R + tl.arange(0, R)
    width = num_adapters * R
    h = tl.load(hidden + rows[:, None] * width + inner[None, :], rows[:, None] < num_tokens, 0.0)
    u = tl.load(up + inner.to(tl.int64)[:, None] * dim + cols[None, :], cols[None, :] < dim, 0.0)
    center = tl.load(mean + rows * num_adapters + k, rows < num_tokens, 0.0)[:, None]
    inverse = tl.load(rstd + rows * num_adapters + k, rows < num_tokens, 0.0)[:, None]
    y = tl.dot(h, u, input_precision="ieee")
    return h, u, inverse, y, (y - center) * inverse


@triton.jit
def _forward_kernel(
    base, hidden, up, mean, rstd, base_mean, base_rstd, coefficients, out,
    num_tokens, dim, num_adapters, R: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Write a tile of the mixed output."""
    rows = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    cols = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    value, _n, shift, scale = _base_terms(
        base, base_mean, base_rstd, coefficients, rows, cols, num_tokens, dim
    )
    total = tl.zeros((TOKENS, FEATURES), tl.float32)
    for k in range(num_adapters):
        _h, _u, _inverse, y, z = _adapter(
            hidden, up, mean, rstd, k, num_adapters, rows, cols, num_tokens, dim, R
        )
        total += tl.sigmoid(shift + scale * z) * y
    inside = (rows[:, None] < num_tokens) & (cols[None, :] < dim)
    mixed = value + total * _coefficient(coefficients, 4, cols, dim)
    tl.store(out + rows[:, None] * dim + cols[None, :], mixed, inside)


@triton.jit
def _load_grad(grad, rows, cols, num_tokens, dim):
    inside = (rows[:, None] < num_tokens) & (cols[None, :] < dim)
    return tl.load(grad + rows[:, None] * dim + cols[None, :], inside, 0.0).to(tl.float32)


@triton.jit
def _row_sums_kernel(
    grad, base, hidden, up, mean, rstd, base_mean, base_rstd, coefficients, grad_hidden, sums,
    num_tokens, dim, num_adapters, R: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Write, for one adapter, the sums over the features that the gradients of a token need.

    ``grad_hidden`` lacks the terms of the statistics; ``sums`` (4, N, K) holds the gradient of the
    normalized adapter output, alone and times that output, and the same of the base output.
    """
    rows = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    k = tl.program_id(1)
    of_hidden = tl.zeros((TOKENS, R), tl.float32)
    of_z = tl.zeros((TOKENS,), tl.float32)
    of_z_z = tl.zeros((TOKENS,), tl.float32)
    of_n = tl.zeros((TOKENS,), tl.float32)
    of_n_n = tl.zeros((TOKENS,), tl.float32)
    for start in range(0, dim, FEATURES):
        cols = start + tl.arange(0, FEATURES)
        _value, n, shift, scale = _base_terms(
            base, base_mean, base_rstd, coefficients, rows, cols, num_tokens, dim
        )
        _h, u, inverse, y, z = _adapter(
            hidden, up, mean, rstd, k, num_adapters, rows, cols, num_tokens, dim, R
        )
        gate = tl.sigmoid(shift + scale * z)
        direct = _load_grad(grad, rows, cols, num_tokens, dim) * gate
        direct *= _coefficient(coefficients, 4, cols, dim)
        grad_logit = direct * (1 - gate) * y
        grad_z = grad_logit * scale
        of_hidden += tl.dot(
            direct + inverse * grad_z, tl.trans(u).to(tl.float32), input_precision="ieee"
        )
        grad_n = grad_logit * _coefficient(coefficients, 1, cols, dim)
        grad_n += grad_logit * z * _coefficient(coefficients, 3, cols, dim)
        of_z += tl.sum(grad_z, 1)
        of_z_z += tl.sum(grad_z * z, 1)
        of_n += tl.sum(grad_n, 1)
        of_n_n += tl.sum(grad_n * n, 1)
    inner = k * R + tl.arange(0, R)
    target = grad_hidden + rows[:, None] * (num_adapters * R) + inner[None, :]
    tl.store(target, of_hidden, rows[:, None] < num_tokens)
    size = tl.cast(num_tokens, tl.int64) * num_adapters
    place = sums + rows * num_adapters + k
    tl.store(place, of_z, rows < num_tokens)
    tl.store(place + size, of_z_z, rows < num_tokens)
    tl.store(place + 2 * size, of_n, rows < num_tokens)
    tl.store(place + 3 * size, of_n_n, rows < num_tokens)


@triton.jit
def _grad_base_kernel(
    grad, base, hidden, up, mean, rstd, base_mean, base_rstd, coefficients, sums, grad_base,
    num_tokens, dim, num_adapters, R: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Write a tile of the gradient of the base output; ``sums`` (2, N) is over all adapters."""
    rows = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    cols = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    _value, n, shift, scale = _base_terms(
        base, base_mean, base_rstd, coefficients, rows, cols, num_tokens, dim
    )
    outer = _load_grad(grad, rows, cols, num_tokens, dim)
    weighted = outer * _coefficient(coefficients, 4, cols, dim)
    sum_logit = tl.zeros((TOKENS, FEATURES), tl.float32)
    sum_cross = tl.zeros((TOKENS, FEATURES), tl.float32)
    for k in range(num_adapters):
        _h, _u, _inverse, y, z = _adapter(
            hidden, up, mean, rstd, k, num_adapters, rows, cols, num_tokens, dim, R
        )
        gate = tl.sigmoid(shift + scale * z)
        grad_logit = weighted * gate * (1 - gate) * y
        sum_logit += grad_logit
        sum_cross += grad_logit * z
    grad_n = sum_logit * _coefficient(coefficients, 1, cols, dim)
    grad_n += sum_cross * _coefficient(coefficients, 3, cols, dim)
    average = tl.load(sums + rows, rows < num_tokens, 0.0)[:, None] / dim
    slant = tl.load(sums + num_tokens + rows, rows < num_tokens, 0.0)[:, None] / dim
    inverse = tl.load(base_rstd + rows, rows < num_tokens, 0.0)[:, None]
    inside = (rows[:, None] < num_tokens) & (cols[None, :] < dim)
    result = outer + inverse * (grad_n - average - n * slant)
    tl.store(grad_base + rows[:, None] * dim + cols[None, :], result, inside)


@triton.jit
def _shared_grads_kernel(
    grad, base, hidden, up, mean, rstd, base_mean, base_rstd, coefficients, sums, grad_up,
    grad_coefficients, num_tokens, dim, num_adapters, tokens_of_a_sum,
    R: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Write, for one adapter and one stretch of tokens, the gradients of what the tokens share.

    ``grad_up`` (S, K, R, D) and ``grad_coefficients`` (S, K, 5, D) are to be summed over the S
    stretches; ``sums`` is that of `_row_sums_kernel`.
    """
    cols = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    k = tl.program_id(1)
    part = tl.program_id(2).to(tl.int64)
    first = part * tokens_of_a_sum
    size = tl.cast(num_tokens, tl.int64) * num_adapters
    of_up = tl.zeros((R, FEATURES), tl.float32)
    constant = tl.zeros((FEATURES,), tl.float32)
    slope = tl.zeros((FEATURES,), tl.float32)
    lora = tl.zeros((FEATURES,), tl.float32)
    cross = tl.zeros((FEATURES,), tl.float32)
    out = tl.zeros((FEATURES,), tl.float32)
    for start in range(0, tokens_of_a_sum, TOKENS):
        rows = first + start + tl.arange(0, TOKENS)
        _value, n, shift, scale = _base_terms(
            base, base_mean, base_rstd, coefficients, rows, cols, num_tokens, dim
        )
        h, _u, inverse, y, z = _adapter(
            hidden, up, mean, rstd, k, num_adapters, rows, cols, num_tokens, dim, R
        )
        gate = tl.sigmoid(shift + scale * z)
        outer = _load_grad(grad, rows, cols, num_tokens, dim)
        direct = outer * gate * _coefficient(coefficients, 4, cols, dim)
        grad_logit = direct * (1 - gate) * y
        place = sums + rows * num_adapters + k
        average = tl.load(place, rows < num_tokens, 0.0)[:, None] / dim
        slant = tl.load(place + size, rows < num_tokens, 0.0)[:, None] / dim
        grad_y = direct + inverse * (grad_logit * scale - average - z * slant)
        of_up += tl.dot(tl.trans(h).to(tl.float32), grad_y, input_precision="ieee")
        constant += tl.sum(grad_logit, 0)
        slope += tl.sum(grad_logit * n, 0)
        lora += tl.sum(grad_logit * z, 0)
        cross += tl.sum(grad_logit * z * n, 0)
        out += tl.sum(outer * gate * y, 0)
    slot = part * num_adapters + k
    inner = slot * R + tl.arange(0, R)
    tl.store(grad_up + inner[:, None] * dim + cols[None, :], of_up, cols[None, :] < dim)
    target = grad_coefficients + slot * 5 * dim + cols
    tl.store(target, constant, cols < dim)
    tl.store(target + dim, slope, cols < dim)
    tl.store(target + 2 * dim, lora, cols < dim)
    tl.store(target + 3 * dim, cross, cols < dim)
    tl.store(target + 4 * dim, out, cols < dim)


def forward(
    base: Tensor,
    hidden: Tensor,
    up: Tensor,
    coefficients: Tensor,
    ranks: Sequence[int],
    eps: float,
) -> Tensor:
    """Return the mixed output (N, D) in the dtype of ``base``."""
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    if base.numel() == 0:
        return out
    with torch.cuda.device_of(base):
        inputs = _prepare(base, hidden, up, coefficients, ranks, eps)
        grid = (triton.cdiv(base.shape[0], TOKENS), triton.cdiv(base.shape[1], FEATURES))
        _forward_kernel[grid](*inputs, out, *_sizes(base, ranks))
    return out


def backward(
    grad: Tensor,
    base: Tensor,
    hidden: Tensor,
    up: Tensor,
    coefficients: Tensor,
    ranks: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients with respect to the four tensors."""
    if base.numel() == 0:
        return tuple(torch.zeros_like(t) for t in (base, hidden, up, coefficients))
    (tokens, dim), adapters, width = base.shape, len(ranks), _padded_rank(ranks)
    exact = {"device": base.device, "dtype": torch.float32}
    grad = grad.contiguous()
    with torch.cuda.device_of(base):
        inputs = _prepare(base, hidden, up, coefficients, ranks, eps)
        sizes = _sizes(base, ranks)
        rows, columns = triton.cdiv(tokens, TOKENS), triton.cdiv(dim, FEATURES)
        grad_hidden = torch.empty(tokens, adapters * width, **exact)
        sums = torch.empty(4, tokens, adapters, **exact)
        _row_sums_kernel[(rows, adapters)](grad, *inputs, grad_hidden, sums, *sizes)
        grad_base = torch.empty_like(base, memory_format=torch.contiguous_format)
        of_base = sums[2:].sum(-1)
        _grad_base_kernel[(rows, columns)](grad, *inputs, of_base, grad_base, *sizes)
        parts = triton.cdiv(tokens, TOKENS_OF_A_PARTIAL_SUM)
        grad_up = torch.empty(parts, adapters * width, dim, **exact)
        shared = torch.empty(parts * adapters, 5, dim, **exact)
        _shared_grads_kernel[(columns, adapters, parts)](
            grad, *inputs, sums, grad_up, shared, *sizes[:3], TOKENS_OF_A_PARTIAL_SUM, *sizes[3:]
        )
    grad_hidden -= _statistics_grad(inputs[1], inputs[2], inputs[4], sums, width)
    places = _places(ranks)
    return (
        grad_base,
        grad_hidden[:, places].to(hidden.dtype),
        grad_up.sum(0)[places].to(up.dtype),
        shared.sum(0).to(coefficients.dtype),
    )


def _statistics_grad(h: Tensor, up: Tensor, rstd: Tensor, sums: Tensor, width: int) -> Tensor:
    """What mean and variance take from the gradient of the hidden activations."""
    parts = []
    for k, (h_k, u) in enumerate(zip(h.split(width, -1), up.split(width), strict=True)):
        h_k, u, inverse = h_k.float(), u.float(), rstd[:, k : k + 1]
        row_mean = u.mean(-1)
        centered = u - row_mean[:, None]
        gram = centered @ centered.mT / u.shape[-1]
        along = sums[1, :, k : k + 1] * inverse * (h_k @ gram)
        parts.append(inverse * (sums[0, :, k : k + 1] * row_mean + along))
    return torch.cat(parts, -1)


def _prepare(
    base: Tensor,
    hidden: Tensor,
    up: Tensor,
    coefficients: Tensor,
    ranks: Sequence[int],
    eps: float,
) -> tuple[Tensor, ...]:
    """Return contiguous inputs with padded ranks and the statistics, in the kernels' order."""
    base = base.contiguous()
    mean, rstd = reference.statistics(hidden, up, ranks, eps)
    factors = torch.promote_types(hidden.dtype, up.dtype)
    if not base.is_cuda:
        factors = torch.float32  # the interpreter multiplies bfloat16 matrices wrongly
    width, places = _padded_rank(ranks), _places(ranks)
    padded_hidden = torch.zeros(
        len(hidden), len(ranks) * width, dtype=factors, device=base.device
    ).index_copy_(1, places.to(base.device), hidden.to(factors))
    padded_up = torch.zeros(
        len(ranks) * width, base.shape[1], dtype=factors, device=base.device
    ).index_copy_(0, places.to(base.device), up.to(factors))
    base_mean, base_rstd = (
        torch.empty(len(base), dtype=torch.float32, device=base.device) for _ in range(2)
    )
    _base_statistics_kernel[(triton.cdiv(len(base), TOKENS),)](
        base, base_mean, base_rstd, *base.shape, eps, TOKENS=TOKENS, FEATURES=FEATURES
    )
    return (
        base, padded_hidden, padded_up, mean.contiguous(), rstd.contiguous(), base_mean, base_rstd,
        coefficients.contiguous(),
    )  # fmt: skip


def _sizes(base: Tensor, ranks: Sequence[int]) -> tuple[int, ...]:
    return *base.shape, len(ranks), _padded_rank(ranks), TOKENS, FEATURES


def _padded_rank(ranks: Sequence[int]) -> int:
    return max(16, triton.next_power_of_2(max(ranks)))


def _places(ranks: Sequence[int]) -> Tensor:
    """Where the columns of ``hidden`` lie among those with padded ranks."""
    width = _padded_rank(ranks)
    return torch.cat([k * width + torch.arange(rank) for k, rank in enumerate(ranks)])
