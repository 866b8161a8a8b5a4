"""Triton kernel of ``compress`` and ``extract``; same functions as ``reference.py``."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 4096  # of the result, in one program
COLUMNS = 256  # at most, of one row


@triton.jit
def _pick_rows_kernel(
    source, rows, out, num_results, num_picked, num_rows, dim,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Copy rows to their places and write zeros where there is none."""
    result = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (result < num_results)[:, None] & (column < dim)[None, :]
    row = tl.load(rows + result, result < num_results, other=-1)
    start = ((result // num_picked) * num_rows + row) * dim
    value = tl.load(
        source + start[:, None] + column[None, :], inside & (row >= 0)[:, None], other=0.0
    )
    tl.store(out + (result * dim)[:, None] + column[None, :], value, inside)


def forward(source: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:  # noqa: ARG001
    """Return row ``rows[b, m]`` of every ``source[b]``, and zeros where it is negative."""
    source, rows = source.contiguous(), rows.contiguous()
    batch, num_rows, dim = source.shape
    num_picked = rows.shape[1]
    out = torch.empty((batch, num_picked, dim), device=source.device, dtype=source.dtype)
    if out.numel() == 0:
        return out
    columns = min(triton.next_power_of_2(dim), COLUMNS)
    block = max(ELEMENTS // columns, 1)
    grid = (triton.cdiv(batch * num_picked, block), triton.cdiv(dim, columns))
    with torch.cuda.device_of(source):
        _pick_rows_kernel[grid](
            source, rows, out, batch * num_picked, num_picked, num_rows, dim,
            ROWS=block, COLUMNS=columns,
        )  # fmt: skip
    return out


def backward(grad: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
    """Return the gradient of the source: what went out comes back by the inverse."""
    return forward(grad, inverse, rows)
