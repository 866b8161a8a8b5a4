"""``grouped_linear`` for few rows, where reading the weights is all that costs.

A compiled product-and-sum reads a weight at the bandwidth of the memory, which a matmul of
one to three rows does not. The rows of a group are cut into blocks of two or three; all blocks of
one size are one call, so that a weight is read once for all rows of its block.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from core_gates.activations import activate

SIZES = (2, 3)
"""Rows of a block; a single row fills a block of two by being there twice."""

MEAN_ROWS = 8
"""Above this many rows per used group on average, matmuls are faster."""

Blocks = tuple[list[int], list[list[int]]]


def worthwhile(num_rows: int, num_groups: int) -> bool:
    """Return whether blocks are faster than matmuls; the groups used are estimated."""
    return num_rows <= MEAN_ROWS * num_groups // 2


def forward(
    x: Tensor,
    weight: Tensor,
    counts: Tensor,
    bias: Tensor | None,
    gather: Tensor | None,
    scatter: Tensor | None,
    activation: str,
    gated: bool,
) -> Tensor:
    """Return the result of ``reference.forward``; without gradients."""
    rows = x if gather is None else x.index_select(0, gather)
    z = rows.new_zeros(rows.shape[0], weight.shape[1])
    for groups, numbers in cut(counts.tolist()):
        index = torch.tensor(numbers, device=x.device)
        group = torch.tensor(groups, device=x.device)
        inputs = rows[index]
        for tensor in (group, inputs):
            torch._dynamo.mark_dynamic(tensor, 0)
        z[index] = _compiled()(weight, group, inputs)
    if bias is not None:
        z += bias[_group_of_row(counts, rows.shape[0])]
    out = activate(z, activation, gated)
    out[int(counts.sum()) :] = 0
    return out if scatter is None else torch.empty_like(out).index_copy_(0, scatter, out)


def cut(counts: Sequence[int]) -> list[Blocks]:
    """Return which rows of which group each block holds, by block size.

    Args:
        counts: Rows of each group; they follow each other.

    Returns:
        For every block size in use, the group of each block and the rows of each block.
    """
    blocks: dict[int, Blocks] = {size: ([], []) for size in SIZES}
    start = 0
    for group, count in enumerate(counts):
        end = start + count
        while start < end:
            size = 3 if end - start in (3, 5) or end - start > 6 else 2
            numbers = [min(row, end - 1) for row in range(start, start + size)]
            blocks[size][0].append(group)
            blocks[size][1].append(numbers)
            start += size
        start = end
    for groups, members in blocks.values():
        if len(groups) == 1:  # the compiled function takes any number above one
            groups.append(groups[0])
            members.append(members[0])
    return [block for block in blocks.values() if block[0]]


def _product(weight: Tensor, group: Tensor, rows: Tensor) -> Tensor:
    """Return (B, R, F): ``rows`` (B, R, D) times the weights (F, D) of their groups (B,)."""
    used = weight[group].float()
    sums = [(used * row.float().unsqueeze(1)).sum(-1) for row in rows.unbind(1)]
    return torch.stack(sums, 1).to(rows.dtype)


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    # Sizes other than the number of blocks are constants: loops of unknown length are slower.
    return torch.compile(_product, dynamic=False)


def _group_of_row(counts: Tensor, num_rows: int) -> Tensor:
    ends = counts.cumsum(0)
    row = torch.arange(num_rows, device=counts.device)
    return torch.searchsorted(ends, row, right=True).clamp(max=counts.shape[0] - 1)
