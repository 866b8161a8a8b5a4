"""Differentiable sums and exchanges between the ranks of a process group."""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

Group = dist.ProcessGroup | None
"""A process group; None is that of all ranks."""


def num_ranks(group: Group = None) -> int:
    """Return the number of ranks of a group, 1 where nothing is distributed."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def all_reduce(x: Tensor, group: Group = None) -> Tensor:
    """Return the sum of ``x`` over the ranks.

    The gradient of each rank's ``x`` is the sum over ranks of the gradients of the result, which
    is right for the sum of the losses of all ranks. Every rank must take part in both passes.
    """
    result: Tensor = _AllReduce.apply(x, group)  # type: ignore[no-untyped-call]
    return result


def all_to_all(rows: Tensor, sent: list[int], received: list[int], group: Group = None) -> Tensor:
    """Exchange rows: the first ``sent[0]`` go to rank 0, the next ``sent[1]`` to rank 1, and so on.

    Every rank must take part in both passes.

    Args:
        rows: Rows (Σ sent, ...).
        sent: Number of rows for each rank.
        received: Number of rows from each rank, which that rank sends.
        group: Process group.

    Returns:
        Rows (Σ received, ...) in the order of the ranks they come from.
    """
    result: Tensor = _AllToAll.apply(rows, sent, received, group)  # type: ignore[no-untyped-call]
    return result


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return all_reduce(grad, ctx.group), None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Group
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
        return arrived

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return all_to_all(grad, ctx.received, ctx.sent, ctx.group), None, None, None
