"""Sums, exchanges and gathering between the ranks of a process group."""

from typing import Any, cast

import torch
from torch import Tensor
from torch import distributed as dist

Group = dist.ProcessGroup | None
"""A process group; None is that of all ranks."""


def num_ranks(group: Group = None) -> int:
    """Return the number of ranks of a group, 1 where nothing is distributed."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def rank_in(group: Group = None) -> int:
    """Return the number of this rank in a group, 0 where nothing is distributed."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def gathered(x: Tensor) -> Tensor:
    """Return all of a tensor that FSDP has spread over the ranks; any other as it is.

    Every rank must call this.
    """
    full_tensor = getattr(x, "full_tensor", None)  # only a DTensor, whose import is slow, has one
    return x if full_tensor is None else cast(Tensor, full_tensor())


def sharded_like(x: Tensor, like: Tensor | None) -> Tensor:
    """Return ``x``, as rank 0 has it, spread over the ranks as FSDP has spread ``like``.

    Every rank must call this. Where ``like`` is not spread, ``x`` is returned as it is.
    """
    mesh = getattr(like, "device_mesh", None)
    if mesh is None:
        return x
    from torch.distributed.tensor import DTensor, distribute_tensor

    return distribute_tensor(x, mesh, cast(DTensor, like).placements)


def all_reduce(x: Tensor, group: Group = None) -> Tensor:
    """Return the sum of ``x`` over the ranks.

    The gradient of each rank's ``x`` is the sum over ranks of the gradients of the result, which
    is right for the sum of the losses of all ranks. Every rank must take part in both passes.
    """
    return cast(Tensor, _AllReduce.apply(x, group))  # type: ignore[no-untyped-call]


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
    return cast(Tensor, _AllToAll.apply(rows, sent, received, group))  # type: ignore[no-untyped-call]


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
