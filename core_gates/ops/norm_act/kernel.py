"""Triton kernels of ``norm_act``; same functions and arguments as ``reference.py``."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from core_gates.ops.norm_act.reference import per_expert

ROWS, CHANNELS = 32, 64  # of the tile of one program
NUM_PROGRAMS = 32  # that share the rows of an output where they are summed


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        z = tl.maximum(z, 0.0)
    elif ACTIVATION == "silu":
        z = z * tl.sigmoid(z)
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        z = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    return z


@triton.jit
def _slope(z, ACTIVATION: tl.constexpr):
    """Return the derivative of the activation."""
    slope = tl.full(z.shape, 1.0, tl.float32)
    if ACTIVATION == "relu":
        slope = tl.where(z > 0, 1.0, 0.0)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(z)
        slope = s * (1 + z * (1 - s))
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        slope = 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * density
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        inner = 1.5957691216057308 * (1 + 0.134145 * z * z)
        slope = s + z * s * (1 - s) * inner
    return slope


@triton.jit
def _moments_kernel(x, sums, N, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Sum the rows of one program, and their squares, about the first row of the output."""
    output = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    program, programs = tl.program_id(2), tl.num_programs(2)
    inside = c < C
    base = x + output * N * C
    origin = tl.load(base + c, inside, other=0.0).to(tl.float32)
    total = tl.zeros((CHANNELS,), tl.float32)
    squares = tl.zeros((CHANNELS,), tl.float32)
    for start in range(program * ROWS, N, programs * ROWS):
        n = start + tl.arange(0, ROWS)
        mask = (n < N)[:, None] & inside[None, :]
        value = tl.load(base + n[:, None] * C + c[None, :], mask, other=0.0).to(tl.float32)
        deviation = tl.where(mask, value - origin[None, :], 0.0)
        total += tl.sum(deviation, 0)
        squares += tl.sum(deviation * deviation, 0)
    place = sums + ((output * programs + program) * 2) * C + c
    tl.store(place, total, inside)
    tl.store(place + C, squares, inside)


@triton.jit
def _apply_kernel(
    x, scale, shift, out, N, C,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write one tile; scale and shift are those of every output (O, C)."""
    output = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    mask = (n < N)[:, None] & (c < C)[None, :]
    place = (output * N + n[:, None]) * C + c[None, :]
    factor = tl.load(scale + output * C + c, c < C, other=0.0)[None, :]
    summand = tl.load(shift + output * C + c, c < C, other=0.0)[None, :]
    value = tl.load(x + place, mask, other=0.0).to(tl.float32)
    tl.store(out + place, _activate(value * factor + summand, ACTIVATION), mask)


@triton.jit
def _sums_kernel(
    grad, x, affine, sums, N, C,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sum the gradients before the normalization, plain and times the normalized values.

    ``affine`` holds mean, reciprocal deviation, weight and bias of every output (O, 4, C).
    """
    output = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    program, programs = tl.program_id(2), tl.num_programs(2)
    inside = c < C
    mine = affine + output * 4 * C + c
    mean, rstd = tl.load(mine, inside, other=0.0), tl.load(mine + C, inside, other=0.0)
    weight = tl.load(mine + 2 * C, inside, other=0.0)
    bias = tl.load(mine + 3 * C, inside, other=0.0)
    total = tl.zeros((CHANNELS,), tl.float32)
    along = tl.zeros((CHANNELS,), tl.float32)
    for start in range(program * ROWS, N, programs * ROWS):
        n = start + tl.arange(0, ROWS)
        mask = (n < N)[:, None] & inside[None, :]
        place = (output * N + n[:, None]) * C + c[None, :]
        value = tl.load(x + place, mask, other=0.0).to(tl.float32)
        outer = tl.load(grad + place, mask, other=0.0).to(tl.float32)
        unit = (value - mean[None, :]) * rstd[None, :]
        slope = outer * _slope(unit * weight[None, :] + bias[None, :], ACTIVATION)
        total += tl.sum(slope, 0)
        along += tl.sum(slope * unit, 0)
    place = sums + ((output * programs + program) * 2) * C + c
    tl.store(place, total, inside)
    tl.store(place + C, along, inside)


@triton.jit
def _gradient_kernel(
    grad, x, affine, factors, out, N, C,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write one tile of the gradient: ``scale (slope - level - unit * slant)``.

    ``factors`` holds these three of every output (O, 3, C).
    """
    output = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < C
    mask = (n < N)[:, None] & inside[None, :]
    place = (output * N + n[:, None]) * C + c[None, :]
    mine = affine + output * 4 * C + c
    mean, rstd = tl.load(mine, inside, other=0.0), tl.load(mine + C, inside, other=0.0)
    weight = tl.load(mine + 2 * C, inside, other=0.0)
    bias = tl.load(mine + 3 * C, inside, other=0.0)
    mine = factors + output * 3 * C + c
    scale, level = tl.load(mine, inside, other=0.0), tl.load(mine + C, inside, other=0.0)
    slant = tl.load(mine + 2 * C, inside, other=0.0)
    value = tl.load(x + place, mask, other=0.0).to(tl.float32)
    outer = tl.load(grad + place, mask, other=0.0).to(tl.float32)
    unit = (value - mean[None, :]) * rstd[None, :]
    slope = outer * _slope(unit * weight[None, :] + bias[None, :], ACTIVATION)
    gradient = scale[None, :] * (slope - level[None, :] - unit * slant[None, :])
    tl.store(out + place, gradient, mask)


def forward(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    experts: list[int],
    activation: str,
    eps: float,
    by_batch: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the activations (O, N, C), and mean and variance (E, C) in float32."""
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    number, rows, channels = x.shape
    offset = offset.float()
    if by_batch:
        shift, variance = _statistics(x, experts, len(offset))
        mean = shift + offset
    else:
        mean, variance = mean.float().clone(), variance.float().clone()
        shift = mean - offset
    scale = weight.float() * (variance + eps).rsqrt()
    tables = [_per_output(t, experts) for t in (scale, bias.float() - shift * scale)]
    if x.numel():
        grid = number, triton.cdiv(rows, ROWS), triton.cdiv(channels, CHANNELS)
        with torch.cuda.device_of(x):
            _apply_kernel[grid](x, *tables, out, rows, channels, activation, ROWS, CHANNELS)
    return out, mean, variance


def backward(
    grad: Tensor,
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    experts: list[int],
    activation: str,
    eps: float,
    by_batch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, offset, weight, bias, mean and variance."""
    grad, x = grad.contiguous(), x.contiguous()
    number, rows, channels = x.shape
    rstd, exact = (variance + eps).rsqrt(), weight.float()
    parts = mean - offset.float(), rstd, exact, bias.float()
    affine = _per_output(torch.stack(parts, 1), experts)
    programs = min(NUM_PROGRAMS, max(1, triton.cdiv(rows, ROWS)))
    sums = torch.zeros(number, programs, 2, channels, dtype=torch.float32, device=x.device)
    grad_x = torch.empty_like(x)
    options = rows, channels, activation, ROWS, CHANNELS
    if x.numel():
        with torch.cuda.device_of(x):
            grid = number, triton.cdiv(channels, CHANNELS), programs
            _sums_kernel[grid](grad, x, affine, sums, *options)
    total, along = per_expert(sums.sum(1), experts, len(weight)).unbind(1)
    scale, zeros = exact * rstd, torch.zeros_like(rstd)
    if by_batch:
        counts = _counts(experts, len(weight), x) * max(rows, 1)
        factors = torch.stack([scale, total / counts, along / counts], 1)
        of_inputs = [zeros, zeros.clone(), zeros.clone()]
    else:
        factors = torch.stack([scale, zeros, zeros], 1)
        of_inputs = [scale * total, -scale * total, -0.5 * scale * rstd * along]
    if x.numel():
        with torch.cuda.device_of(x):
            grid = number, triton.cdiv(rows, ROWS), triton.cdiv(channels, CHANNELS)
            tables = affine, _per_output(factors, experts)
            _gradient_kernel[grid](grad, x, *tables, grad_x, *options)
    of_offset, of_mean, of_variance = of_inputs
    of_offset = of_offset.to(offset.dtype)
    return grad_x, of_offset, along.to(weight.dtype), total.to(bias.dtype), of_mean, of_variance


def _statistics(x: Tensor, experts: list[int], num_experts: int) -> tuple[Tensor, Tensor]:
    """Return mean and variance (E, C) of the rows of every expert."""
    number, rows, channels = x.shape
    programs = min(NUM_PROGRAMS, max(1, triton.cdiv(rows, ROWS)))
    sums = torch.zeros(number, programs, 2, channels, dtype=torch.float32, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):
            grid = number, triton.cdiv(channels, CHANNELS), programs
            _moments_kernel[grid](x, sums, rows, channels, ROWS, CHANNELS)
    level, squares = (sums.double().sum(1) / max(rows, 1)).unbind(1)
    means = x[:, 0].double() + level
    spread = squares - level.square()
    mean = per_expert(means, experts, num_experts, average=True)
    between = (means - _per_output(mean, experts)).square()
    variance = per_expert(spread + between, experts, num_experts, average=True).clamp(min=0)
    return mean.float(), variance.float()


def _counts(experts: list[int], num_experts: int, like: Tensor) -> Tensor:
    """Return the number of outputs of every expert (E, 1)."""
    counts = [experts.count(e) for e in range(num_experts)]
    return torch.tensor(counts, dtype=torch.float32, device=like.device).unsqueeze(1)


def _per_output(values: Tensor, experts: list[int]) -> Tensor:
    """Return the values (E, ...) of the expert of every output (O, ...)."""
    if len(values) == len(experts):
        return values.contiguous()
    return values[torch.tensor(experts, device=values.device)]
