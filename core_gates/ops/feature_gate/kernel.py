"""Triton kernels of ``feature_gate``; same functions and arguments as ``reference.py``.

Mixtures and low-rank activations are matmuls of PyTorch; everything of the size of the logits stays
in registers.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from core_gates.ops.feature_gate.reference import Gradients

ROWS, COLUMNS = 64, 64  # of the tile of one program
SMALLEST = 16  # side of the smallest matrix that tl.dot takes
NUM_PROGRAMS = 16  # that share the rows of a run where they are summed
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _hidden(hidden, run, map, n, N, L, r, UPCAST: tl.constexpr, RANK: tl.constexpr):
    """Return the low-rank activations (ROWS, RANK) of one map."""
    k = tl.arange(0, RANK)
    place = hidden + ((run * N + n[:, None]) * L + map) * r + k[None, :]
    value = tl.load(place, (n < N)[:, None] & (k < r)[None, :], other=0.0)
    return value.to(tl.float32) if UPCAST else value


@triton.jit
def _factor(up, gate, map, d, D, L, r, UPCAST: tl.constexpr, RANK: tl.constexpr):
    """Return the second factor (RANK, COLUMNS) of one map."""
    k = tl.arange(0, RANK)
    place = up + ((gate * L + map) * r + k[:, None]) * D + d[None, :]
    value = tl.load(place, (k < r)[:, None] & (d < D)[None, :], other=0.0)
    return value.to(tl.float32) if UPCAST else value


@triton.jit
def _forward_kernel(
    v, hidden, mixture, up, inputs, gates, out, N, D, L, r,
    UPCAST: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write one tile of the result of one run."""
    run = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (n < N)[:, None] & (d < D)[None, :]
    gate, read = tl.load(gates + run), tl.load(inputs + run)
    factor = tl.full((ROWS, COLUMNS), 1.0, tl.float32)
    for map in range(L):
        left = _hidden(hidden, run, map, n, N, L, r, UPCAST, RANK)
        right = _factor(up, gate, map, d, D, L, r, UPCAST, RANK)
        z = tl.dot(left, right, input_precision="ieee")
        weight = tl.load(mixture + (run * N + n) * L + map, n < N, other=0.0)
        factor += 2 * weight[:, None] * (tl.sigmoid(z) - 0.5)
    value = tl.load(v + (read * N + n[:, None]) * D + d[None, :], inside, other=0.0)
    tl.store(out + (run * N + n[:, None]) * D + d[None, :], value.to(tl.float32) * factor, inside)


@triton.jit
def _rows_kernel(
    grad, v, hidden, mixture, up, inputs, gates, of_v, of_hidden, of_mixture, N, D, L, r,
    UPCAST: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write what is summed over features: gradients of hidden activations and mixture, one map.

    The program of the first map also writes the part of the input's gradient that does not go
    through the gate.
    """
    run = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    map = tl.program_id(2)
    gate, read = tl.load(gates + run), tl.load(inputs + run)
    left = _hidden(hidden, run, map, n, N, L, r, UPCAST, RANK)
    weight = tl.load(mixture + (run * N + n) * L + map, n < N, other=0.0)
    total = tl.zeros((ROWS, RANK), tl.float32)
    along = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        inside = (n < N)[:, None] & (d < D)[None, :]
        place = (run * N + n[:, None]) * D + d[None, :]
        outer = tl.load(grad + place, inside, other=0.0).to(tl.float32)
        value = tl.load(v + (read * N + n[:, None]) * D + d[None, :], inside, other=0.0)
        right = _factor(up, gate, map, d, D, L, r, UPCAST, RANK)
        s = tl.sigmoid(tl.dot(left, right, input_precision="ieee"))
        of_factor = outer * value.to(tl.float32)
        along += tl.sum(of_factor * (s - 0.5), 1)
        slope = 2 * weight[:, None] * s * (1 - s) * of_factor
        total += tl.dot(slope, tl.trans(right).to(tl.float32), input_precision="ieee")
        if map == 0:
            factor = tl.full((ROWS, COLUMNS), 1.0, tl.float32)
            factor += 2 * weight[:, None] * (s - 0.5)
            for other in range(1, L):
                second = _hidden(hidden, run, other, n, N, L, r, UPCAST, RANK)
                third = _factor(up, gate, other, d, D, L, r, UPCAST, RANK)
                z = tl.dot(second, third, input_precision="ieee")
                share = tl.load(mixture + (run * N + n) * L + other, n < N, other=0.0)
                factor += 2 * share[:, None] * (tl.sigmoid(z) - 0.5)
            tl.store(of_v + place, outer * factor, inside)
    k = tl.arange(0, RANK)
    place = of_hidden + ((run * N + n[:, None]) * L + map) * r + k[None, :]
    tl.store(place, total, (n < N)[:, None] & (k < r)[None, :])
    tl.store(of_mixture + (run * N + n) * L + map, 2 * along, n < N)


@triton.jit
def _up_kernel(
    grad, v, hidden, mixture, up, inputs, gates, sums, N, D, L, r, programs,
    UPCAST: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum the gradient of a second factor over the rows of one program."""
    run = (tl.program_id(0) // L).to(tl.int64)
    map = tl.program_id(0) % L
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    program = tl.program_id(2)
    gate, read = tl.load(gates + run), tl.load(inputs + run)
    right = _factor(up, gate, map, d, D, L, r, UPCAST, RANK)
    total = tl.zeros((RANK, COLUMNS), tl.float32)
    for start in range(program * ROWS, N, programs * ROWS):
        n = start + tl.arange(0, ROWS)
        inside = (n < N)[:, None] & (d < D)[None, :]
        left = _hidden(hidden, run, map, n, N, L, r, UPCAST, RANK)
        s = tl.sigmoid(tl.dot(left, right, input_precision="ieee"))
        place = (run * N + n[:, None]) * D + d[None, :]
        outer = tl.load(grad + place, inside, other=0.0).to(tl.float32)
        value = tl.load(v + (read * N + n[:, None]) * D + d[None, :], inside, other=0.0)
        weight = tl.load(mixture + (run * N + n) * L + map, n < N, other=0.0)
        slope = 2 * weight[:, None] * s * (1 - s) * (outer * value.to(tl.float32))
        total += tl.dot(tl.trans(left).to(tl.float32), slope, input_precision="ieee")
    k = tl.arange(0, RANK)
    place = sums + (((run * L + map) * programs + program) * r + k[:, None]) * D + d[None, :]
    tl.store(place, total, (k < r)[:, None] & (d < D)[None, :])


def forward(
    v: Tensor,
    mixer: Tensor,
    mixer_bias: Tensor,
    down: Tensor,
    up: Tensor,
    inputs: list[int],
    gates: list[int],
) -> Tensor:
    """Return the inputs of all runs times their factors (R, N, D)."""
    v, up = v.contiguous(), up.contiguous().to(v.dtype)
    hidden, mixture = _maps(v, mixer, mixer_bias, down, inputs, gates)
    out = torch.empty(len(inputs), *v.shape[1:], dtype=v.dtype, device=v.device)
    if out.numel():
        tables, sizes, constants = _launch(v, up, inputs, gates)
        grid = len(inputs), triton.cdiv(v.shape[1], ROWS), triton.cdiv(v.shape[2], COLUMNS)
        with torch.cuda.device_of(v):
            _forward_kernel[grid](v, hidden, mixture, up, *tables, out, *sizes, *constants)
    return out


def backward(
    grad: Tensor,
    v: Tensor,
    mixer: Tensor,
    mixer_bias: Tensor,
    down: Tensor,
    up: Tensor,
    inputs: list[int],
    gates: list[int],
) -> Gradients:
    """Return the gradients of v, mixer, mixer_bias, down and up."""
    grad, v, second = grad.contiguous(), v.contiguous(), up.contiguous().to(v.dtype)
    hidden, mixture = _maps(v, mixer, mixer_bias, down, inputs, gates)
    of_runs = torch.zeros(grad.shape, dtype=torch.float32, device=v.device)
    of_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=v.device)
    of_mixture = torch.zeros_like(mixture)
    tables, sizes, constants = _launch(v, second, inputs, gates)
    rows, dim, maps, rank = sizes
    programs = min(NUM_PROGRAMS, max(1, triton.cdiv(rows, ROWS)))
    sums = torch.zeros(len(inputs), maps, programs, rank, dim, dtype=torch.float32, device=v.device)
    if grad.numel():
        saved = grad, v, hidden, mixture, second, *tables
        with torch.cuda.device_of(v):
            grid = len(inputs), triton.cdiv(rows, ROWS), maps
            targets = of_runs, of_hidden, of_mixture
            _rows_kernel[grid](*saved, *targets, *sizes, *constants)
            grid = len(inputs) * maps, triton.cdiv(dim, COLUMNS), programs
            _up_kernel[grid](*saved, sums, *sizes, programs, *constants)
    of_up = torch.zeros(up.shape, dtype=torch.float32, device=v.device)
    of_up.index_add_(0, tables[1], sums.sum(2))
    of_logits = mixture * (of_mixture - (mixture * of_mixture).sum(-1, keepdim=True))
    return *_maps_backward(of_runs, of_hidden, of_logits, v, mixer, mixer_bias, down, tables), (
        of_up.to(up.dtype)
    )


def _launch(
    v: Tensor, up: Tensor, inputs: list[int], gates: list[int]
) -> tuple[tuple[Tensor, Tensor], tuple[int, int, int, int], tuple[bool, int, int, int]]:
    """Return tables of inputs and gates, the sizes N D L r, and the constants of a kernel."""
    tables = torch.tensor(inputs, device=v.device), torch.tensor(gates, device=v.device)
    rank = max(SMALLEST, triton.next_power_of_2(up.shape[2]))
    return tables, (*v.shape[1:], *up.shape[1:3]), (_INTERPRETED, rank, ROWS, COLUMNS)


def _maps(
    v: Tensor, mixer: Tensor, mixer_bias: Tensor, down: Tensor, inputs: list[int], gates: list[int]
) -> tuple[Tensor, Tensor]:
    """Return low-rank activations (R, N, L, r) and mixtures (R, N, L) of all runs."""
    reads = torch.tensor(inputs, device=v.device)
    mine = torch.tensor(gates, device=v.device)
    rows = v if len(inputs) == len(v) and inputs == list(range(len(v))) else v[reads]
    hidden = rows @ down.to(v.dtype)[mine].flatten(1, 2).mT
    logits = rows.float() @ mixer.float()[mine].mT + mixer_bias.float()[mine].unsqueeze(1)
    return hidden.view(*rows.shape[:2], *down.shape[1:3]).contiguous(), logits.softmax(-1)


def _maps_backward(
    of_runs: Tensor,
    of_hidden: Tensor,
    of_logits: Tensor,
    v: Tensor,
    mixer: Tensor,
    mixer_bias: Tensor,
    down: Tensor,
    tables: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of v, mixer, mixer_bias and down, given those of the runs."""
    reads, mine = tables
    rows, flat = v[reads], of_hidden.flatten(2)
    of_runs = of_runs + of_logits @ mixer.float()[mine]
    of_runs = of_runs + (flat.to(v.dtype) @ down.to(v.dtype)[mine].flatten(1, 2)).float()
    of_down = (flat.to(v.dtype).mT @ rows).float().view(-1, *down.shape[1:])
    parts = (
        (v, reads, of_runs),
        (mixer, mine, of_logits.mT @ rows.float()),
        (mixer_bias, mine, of_logits.sum(1)),
        (down, mine, of_down),
    )
    gradients = []
    for like, index, values in parts:
        total = torch.zeros(like.shape, dtype=torch.float32, device=v.device)
        gradients.append(total.index_add_(0, index, values).to(like.dtype))
    of_v, of_mixer, of_bias, of_down = gradients
    return of_v, of_mixer, of_bias, of_down
