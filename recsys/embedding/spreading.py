"""Embedding tables on several ranks: whole on each, or a part on each."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist

from core_gates.collectives import Group, num_ranks
from core_gates.errors import check_option
from recsys.embedding.bank import EmbeddingBank
from recsys.embedding.row_wise_adagrad import sum_by_row
from recsys.embedding.sharded_tables import ShardedTables, all_gathered

Spread = Literal["replicated", "sharded"]


def spread(module: nn.Module, how: Spread = "replicated", group: Group = None) -> None:
    """Prepare the tables of all banks of a module for several ranks; in place, on every rank.

    Call this after the process group was made and before ``DistributedDataParallel`` wraps the
    module and the optimizer is made. All ranks start with the tables of rank 0. On one process
    nothing is changed.

    - ``replicated``: all tables on each rank; after each backward pass the ranks exchange the rows
      that they touched, and each has the mean of the gradients. ``DistributedDataParallel`` can do
      the same by itself, but with gloo only, which alone reduces sparse gradients.
    - ``sharded``: see :class:`~recsys.embedding.sharded_tables.ShardedTables`.

    Args:
        module: A :class:`~recsys.ranker.Ranker`, or anything that contains banks.
        how: Whether each rank has all tables or a part.
        group: Process group; all ranks if None.

    Raises:
        ValueError: ``how`` is unknown.
    """
    check_option("how", how, ("replicated", "sharded"))
    if num_ranks(group) == 1:
        return
    for bank in _banks(module):
        for name, stack in bank.stacks.items():
            table = cast(nn.Parameter, stack.weight)
            dist.broadcast(table.detach(), dist.get_global_rank(group, 0) if group else 0, group)
            if how == "sharded":
                bank.stacks[name] = ShardedTables.of(table.detach(), group)
            else:
                _exchange_gradients(table, group)
        bank.is_spread = True


def spread_names(module: nn.Module) -> list[str]:
    """Return the parameters that ``DistributedDataParallel`` must leave alone.

    That class reads them from an attribute ``_ddp_params_and_buffers_to_ignore`` of the module that
    it wraps, which may be a property that returns this.
    """
    tables = {id(t) for bank in _banks(module) if bank.is_spread for t in bank.tables()}
    return [name for name, parameter in module.named_parameters() if id(parameter) in tables]


def _banks(module: nn.Module) -> list[EmbeddingBank]:
    return [part for part in module.modules() if isinstance(part, EmbeddingBank)]


def _exchange_gradients(table: nn.Parameter, group: Group) -> None:
    """Average the gradients of a table over the ranks, once per backward pass."""
    ranks = num_ranks(group)

    def exchange(grad: Tensor) -> Tensor:
        if not grad.is_sparse:
            total = grad.clone()
            dist.all_reduce(total, group=group)
            return total / ranks
        rows, values = sum_by_row(grad._indices()[0], grad._values())
        rows, values = all_gathered(rows, group), all_gathered(values / ranks, group)
        return torch.sparse_coo_tensor(
            rows[None], values.to(grad.dtype), grad.shape, check_invariants=False
        )

    table.register_hook(exchange)
