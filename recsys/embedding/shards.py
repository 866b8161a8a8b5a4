"""Rows of a matrix spread over the ranks: row r belongs to rank r mod R."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from core_gates.collectives import Group, num_ranks, rank_in


class Shards(NamedTuple):
    """How rows are spread. Vocabularies are sorted by count, so each rank gets frequent rows.

    Attributes:
        rows: Number of rows of all ranks.
        group: Process group; all ranks if None.
    """

    rows: int
    group: Group = None

    @property
    def ranks(self) -> int:
        """Number R of ranks."""
        return num_ranks(self.group)

    @property
    def own_rows(self) -> int:
        """Number of rows of this rank."""
        return len(range(rank_in(self.group), self.rows, self.ranks))

    def own(self, whole: Tensor) -> Tensor:
        """Return the rows of this rank, as a view."""
        return whole[rank_in(self.group) :: self.ranks]

    def local(self, start: int, stop: int) -> slice:
        """Return which rows of this rank lie between two rows of the whole."""
        rank, ranks = rank_in(self.group), self.ranks
        return slice(-(-(start - rank) // ranks), -(-(stop - rank) // ranks))

    def whole(self, own: Tensor) -> Tensor:
        """Return the rows of all ranks; every rank must call this."""
        own = own.detach()
        most = -(-self.rows // self.ranks)
        padded = own.new_zeros(most, *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in range(self.ranks)]
        dist.all_gather(parts, padded, group=self.group)
        return torch.stack(parts, 1).flatten(0, 1)[: self.rows].contiguous()


def all_gathered(values: Tensor, group: Group = None) -> Tensor:
    """Return the rows of all ranks, which may have different numbers of them, one after the other.

    Args:
        values: Rows (n, ...) of this rank.
        group: Process group.
    """
    count = torch.tensor([len(values)], device=values.device)
    counts = [torch.empty_like(count) for _ in range(num_ranks(group))]
    dist.all_gather(counts, count, group=group)
    numbers = [int(number) for number in counts]
    padded = values.new_zeros(max(numbers), *values.shape[1:])
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in numbers]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:number] for part, number in zip(parts, numbers, strict=True)])
