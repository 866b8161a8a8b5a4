"""Embedding tables whose rows are spread over the ranks: row r belongs to rank r mod R."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from core_gates.collectives import Group, all_to_all, num_ranks, rank_in


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


class ShardedTables(nn.Module):
    """Each rank holds every R-th row; row numbers go to their ranks and vectors come back.

    A row that a batch names several times is exchanged once. Each rank may have its own number of
    rows to look up, also none, but all must look up, and run the backward pass, equally often. The
    gradient of a row is the mean over the ranks, as ``DistributedDataParallel`` makes it of all
    other parameters; that class must be told to ignore the tables, see
    `recsys.embedding.bank.spread_names`.

    The state holds whole tables: it is gathered when it is read, which every rank must do, and each
    rank takes its own rows when it is loaded, so that files fit any number of ranks.

    Args:
        num_embeddings: Number of rows of all ranks.
        embedding_dim: Features d of a row.
        group: Process group; all ranks if None.
        device: Device of the rows.
        dtype: Floating dtype of the rows.

    Shape:
        Row numbers (...) to vectors (..., d).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        group: Group = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.shards = Shards(num_embeddings, group)
        own_rows = torch.empty(self.shards.own_rows, embedding_dim, device=device, dtype=dtype)
        self.weight = nn.Parameter(own_rows)
        self.weight.shards = self.shards  # type: ignore[attr-defined]  # for RowWiseAdagrad
        self.reset_parameters()

    @classmethod
    def of(cls, table: Tensor, group: Group = None) -> Self:
        """Return the rows of this rank of a table (rows, d) that all ranks have."""
        made = cls(*table.shape, group=group, device=table.device, dtype=table.dtype)
        with torch.no_grad():
            made.weight.copy_(made.shards.own(table))
        return made

    @torch.no_grad()
    def reset_parameters(self, std: float = 1.0, start: int = 0, stop: int | None = None) -> None:
        """Draw rows from N(0, std²), on each rank others, although all have the same seed.

        Args:
            std: Standard deviation.
            start: First row of all.
            stop: Row after the last one; that of the end if None.
        """
        mine = self.weight[self.shards.local(start, self.num_embeddings if stop is None else stop)]
        if self.weight.is_meta:
            return
        seed = int(torch.randint(2**62, (1,))) + rank_in(self.shards.group)
        mine.normal_(std=std, generator=torch.Generator(mine.device).manual_seed(seed))

    def forward(self, rows: Tensor) -> Tensor:
        """Return the vectors (..., d) of rows (...), int64; every rank must call this."""
        ranks, group = self.shards.ranks, self.shards.group
        distinct, places = rows.unique(return_inverse=True)
        order = (distinct % ranks).argsort(stable=True)
        asked = distinct[order]
        sent = (asked % ranks).bincount(minlength=ranks)
        counts = all_to_all(sent, [1] * ranks, [1] * ranks, group)
        to_ranks, from_ranks = sent.tolist(), counts.tolist()
        wanted = all_to_all(asked // ranks, to_ranks, from_ranks, group)
        own_vectors = F.embedding(wanted, self.weight, sparse=True)
        if own_vectors.requires_grad:
            own_vectors.register_hook(lambda grad: grad / ranks)
        vectors = all_to_all(own_vectors, from_ranks, to_ranks, group)
        return vectors.index_select(0, order.argsort()[places.flatten()]).view(
            *rows.shape, self.embedding_dim
        )

    def whole(self) -> Tensor:
        """Return the rows of all ranks; every rank must call this."""
        return self.shards.whole(self.weight)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:  # noqa: ARG002
        destination[f"{prefix}weight"] = self.whole()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *further: Any) -> None:
        name = f"{prefix}weight"
        whole = state_dict.get(name)
        if whole is not None and len(whole) == self.num_embeddings:
            state_dict = state_dict | {name: self.shards.own(whole)}
        super()._load_from_state_dict(state_dict, prefix, *further)

    def extra_repr(self) -> str:
        """Show the sizes in ``print(tables)``."""
        ranks = num_ranks(self.shards.group)
        return f"{self.num_embeddings}, {self.embedding_dim}, ranks={ranks}"
