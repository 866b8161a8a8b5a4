"""All embedding tables of a schema, on one rank or several, and those of 8-bit integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from core_gates.collectives import Group, num_ranks
from core_gates.errors import GatesError, check_option, check_positive
from recsys.embedding.lookup import Block, Field, Lookup, blocks_of, check_sizes, fields_of, look_up
from recsys.embedding.row_wise_adagrad import RowWiseAdagrad, sum_by_row
from recsys.embedding.sharded_tables import ShardedTables, all_gathered
from recsys.schema import FeatureSchema


class Int8Tables(nn.Module):
    """Rows of 8-bit integers with a scale each: a quarter of the memory of float32.

    Row r is ``scale_r q_r`` with ``scale_r = max |w_r| / 127`` and q rounded to the nearest
    integer, so that no number is off by more than half a scale, max |w_r| / 254.

    Args:
        num_embeddings: Number of rows.
        embedding_dim: Features d of a row.
        dtype: Floating dtype of the vectors.
        device: Device of the rows.

    Shape:
        Row numbers (...) to vectors (..., d).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        rows = torch.zeros(num_embeddings, embedding_dim, dtype=torch.int8, device=device)
        self.register_buffer("rows", rows)
        self.register_buffer("scales", torch.zeros(num_embeddings, dtype=dtype, device=device))
        self.rows: Tensor
        self.scales: Tensor

    @classmethod
    def of(cls, table: Tensor) -> Self:
        """Return a table (rows, d), rounded."""
        made = cls(*table.shape, dtype=table.dtype, device=table.device)
        rows, scales = rounded(table)
        made.rows.copy_(rows)
        made.scales.copy_(scales)
        return made

    @property
    def weight(self) -> Tensor:
        """All rows as floating-point numbers."""
        return restored(self.rows, self.scales)

    def forward(self, rows: Tensor) -> Tensor:
        """Return the vectors (..., d) of rows (...), int64."""
        return F.embedding(rows, self.rows).to(self.scales.dtype) * self.scales[rows][..., None]


def rounded(table: Tensor) -> tuple[Tensor, Tensor]:
    """Return the integers (rows, d) and scales (rows,) of a table."""
    table = table.detach()
    scales = table.abs().amax(1) / 127
    safe = torch.where(scales > 0, scales, 1)
    return (table / safe[:, None]).round().clamp(-127, 127).to(torch.int8), scales


def restored(rows: Tensor, scales: Tensor) -> Tensor:
    """Return the table (rows, d) of integers and scales."""
    return rows.to(scales.dtype) * scales[:, None]


class EmbeddingBank(nn.Module):
    """The embedding tables of a schema, those of one width stacked, one gather per width.

    Gradients are sparse, of the rows that a batch touches, so that with
    `recsys.embedding.row_wise_adagrad.RowWiseAdagrad` the time of a step does not depend on
    the size of the tables. A row that occurs several times in a batch is gathered several times and
    its gradients are summed once, by the optimizer: finding distinct rows first costs more than the
    gather. Vectors of different widths are concatenated as they are.

    Args:
        schema: Features; those that name one table share it.
        sizes: Rows by name of the table, as a fitted transform gives them: 0 unknown, 1 missing.
        std: Standard deviation of the initial values; halves of a quotient-remainder table have its
            square root, their product has it.
        sharded: Whether each rank holds a part of the rows from the start, for tables that no rank
            could hold whole; see `recsys.embedding.sharded_tables.ShardedTables`.
        device: Device of the tables.
        dtype: Floating dtype of the tables.

    Attributes:
        fields: Features with tables, in the order of the columns of ``Batch.sparse``.
        sizes: Rows by name of the table.
        out_dim: Features of all vectors of a row, Σ dims.
        is_spread: Whether the ranks exchange rows or gradients by themselves; see
            `recsys.embedding.bank.spread`.

    Shape:
        ``rows`` (B, F), int64; to (B, out_dim).

    Raises:
        ValueError: A table has no size, or features share a table but not its width.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        sizes: Mapping[str, int],
        *,
        std: float = 1e-2,
        sharded: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(std=std)
        self.fields, self.std = fields_of(schema), std
        self.sizes = check_sizes(self.fields, sizes)
        self.out_dim = sum(field.dim for field in self.fields)
        self._numbers = {field.name: i for i, field in enumerate(self.fields)}
        self._blocks = blocks_of(self.fields, self.sizes)
        rows: dict[int, int] = {}
        for block in self._blocks.values():
            rows[block.dim] = block.start + block.rows
        self.is_spread = sharded
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.stacks = nn.ModuleDict(
            {
                str(dim): ShardedTables(number, dim, **options)
                if sharded
                else nn.Embedding(number, dim, sparse=True, **options)
                for dim, number in rows.items()
            }
        )
        self._make_lookups(device)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all tables from N(0, std²)."""
        for name, block in self._blocks.items():
            stack = self.stacks[str(block.dim)]
            if isinstance(stack, ShardedTables):
                stack.reset_parameters(self._std(name), block.start, block.start + block.rows)
            else:
                rows = cast(Tensor, stack.weight)[block.start : block.start + block.rows]
                nn.init.normal_(rows, std=self._std(name))

    def forward(self, rows: Tensor) -> Tensor:
        """Return the vectors (B, out_dim) of rows (B, F), in the order of the features."""
        parts = self.gather(rows)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def gather(self, rows: Tensor, part: str = "all") -> list[Tensor]:
        """Return the vectors of some features, to be concatenated along dimension 1.

        Args:
            rows: Rows (B, F) of all features.
            part: ``all``, ``user`` or ``rest``: the features of the user, or all others.

        Raises:
            ValueError: The number of columns is another, or a row lies outside of its table.
        """
        if rows.ndim != 2 or rows.shape[1] != len(self.fields):
            raise ValueError(
                f"rows {tuple(rows.shape)} must be (B, {len(self.fields)}), one column for each "
                "feature with a table"
            )
        lookups = cast(nn.ModuleDict, self.lookups[part])
        vectors = {dim: look(rows, self.stacks[dim]) for dim, look in lookups.items()}
        return [
            vectors[dim][:, first:last].flatten(1) if first or last < vectors[dim].shape[1]
            else vectors[dim].flatten(1)
            for dim, first, last in self._runs[part]
        ]  # fmt: skip

    def lookup(self, name: str, rows: Tensor) -> Tensor:
        """Return the vectors (..., d) of rows (...) of the table of a feature, as for a history.

        Args:
            name: Feature whose table is meant.
            rows: Rows of that table.

        Raises:
            ValueError: A row lies outside of the table.
        """
        field = self.field(name)
        tables = self.stacks[str(field.dim)]
        return look_up(field, rows, self._blocks, self.sizes[field.table], tables)

    def field(self, name: str) -> Field:
        """Return a feature by its name."""
        return self.fields[self._numbers[name]]

    def column(self, name: str) -> int:
        """Return the column of a feature among the rows (B, F)."""
        return self._numbers[name]

    def parts(self, part: str) -> tuple[int, ...]:
        """Return the numbers of the features of a part, see `gather`."""
        return tuple(
            i
            for i, field in enumerate(self.fields)
            if part == "all" or (field.side == "user") == (part == "user")
        )

    def tables(self) -> list[nn.Parameter]:
        """Return the stacked tables, for `RowWiseAdagrad`."""
        return list(self.stacks.parameters())

    def named_tables(self) -> dict[str, Tensor]:
        """Return each table (rows, d) by name; a quotient-remainder table has two.

        They are views, unless the tables are sharded: then every rank must call this.
        """
        whole = {
            int(dim): stack.whole() if isinstance(stack, ShardedTables) else stack.weight
            for dim, stack in self.stacks.items()
        }
        return {
            name: cast(Tensor, whole[dim]).detach()[start : start + rows]
            for name, _, dim, start, rows in self._blocks.values()
        }

    @torch.no_grad()
    def load_named_tables(self, tables: Mapping[str, Tensor]) -> None:
        """Take the values of `named_tables`, of all tables and on one process.

        Raises:
            ValueError: A table is absent, or has another shape.
        """
        for name, block in self._blocks.items():
            stack = cast(Tensor, self.stacks[str(block.dim)].weight)
            place = stack[block.start : block.start + block.rows]
            shape = tuple(tables[name].shape) if name in tables else None
            if shape != tuple(place.shape):
                raise ValueError(f"table {name!r} has shape {shape}, expected {tuple(place.shape)}")
            place.copy_(tables[name])

    @torch.no_grad()
    def grow(self, sizes: Mapping[str, int], optimizer: RowWiseAdagrad | None = None) -> None:
        """Append rows to tables; rows that exist, and their accumulators, keep their bits.

        Args:
            sizes: New rows by name of the table; a table not named keeps its size.
            optimizer: Optimizer of the tables; its accumulators of new rows are at their start.

        Raises:
            GatesError: A table would shrink, its size is fixed by the schema, or tables are in a
                form that cannot grow.
        """
        wanted = check_sizes(self.fields, self.sizes | dict(sizes))
        fixed = {field.table for field in self.fields if field.fixed}
        for name, rows in wanted.items():
            if rows < self.sizes[name] or (name in fixed and rows != self.sizes[name]):
                why = "its size is fixed" if name in fixed else "rows are never removed"
                raise GatesError(
                    f"table {name!r} has {self.sizes[name]} rows and cannot have {rows}: {why}; "
                    "fit a new transform and train from scratch"
                )
        old, new = self._blocks, blocks_of(self.fields, wanted)
        for dim, stack in self.stacks.items():
            if not isinstance(stack, nn.Embedding):
                raise GatesError(f"{type(stack).__name__} cannot grow: grow the tables before")
            self._grow_stack(stack, int(dim), old, new, optimizer)
        self.sizes, self._blocks = wanted, new
        self._make_lookups(self.tables()[0].device if self.stacks else None)

    def to_int8(self) -> Self:
        """Replace all tables by 8-bit integers with a scale per row, for serving; in place."""
        for dim, stack in self.stacks.items():
            self.stacks[dim] = Int8Tables.of(cast(Tensor, stack.weight))
        return self

    def _grow_stack(
        self,
        stack: nn.Embedding,
        dim: int,
        old: Mapping[str, Block],
        new: Mapping[str, Block],
        optimizer: RowWiseAdagrad | None,
    ) -> None:
        mine = [block for block in new.values() if block.dim == dim]
        weight = cast(nn.Parameter, stack.weight)
        grown = weight.new_empty(mine[-1].start + mine[-1].rows, dim)
        places = []
        for block in mine:
            kept, place = old[block.name], slice(block.start, block.start + block.rows)
            nn.init.normal_(grown[place], std=self._std(block.name))
            grown[place][: kept.rows] = weight[kept.start : kept.start + kept.rows]
            places.append(torch.arange(block.start, block.start + kept.rows))
        weight.data, weight.grad = grown, None
        stack.num_embeddings = len(grown)
        if optimizer is not None:
            optimizer.grow(weight, torch.cat(places))

    def _make_lookups(self, device: torch.device | str | None) -> None:
        """Make the gathers of all features, and of those of the user and the others."""
        self._runs: dict[str, list[tuple[str, int, int]]] = {}
        self.lookups = nn.ModuleDict()
        for part in ("all", "user", "rest"):
            chosen = self.parts(part)
            lookups = {}
            for dim in dict.fromkeys(self.fields[i].dim for i in chosen):
                mine = [i for i in chosen if self.fields[i].dim == dim]
                lookups[str(dim)] = Lookup(
                    self.fields, mine, self._blocks, self.sizes, device=device
                )
            self.lookups[part] = nn.ModuleDict(lookups)
            self._runs[part] = _runs(self.fields, chosen, lookups)

    def _std(self, name: str) -> float:
        return self.std if name in self.sizes else self.std**0.5

    def extra_repr(self) -> str:
        """Show the sizes in ``print(bank)``."""
        return f"features={len(self.fields)}, tables={len(self.sizes)}, out_dim={self.out_dim}"


def _runs(
    fields: Sequence[Field], chosen: Sequence[int], lookups: Mapping[str, Lookup]
) -> list[tuple[str, int, int]]:
    """Return which vectors of which width follow each other: width, first, last."""
    runs: list[tuple[str, int, int]] = []
    for number in chosen:
        dim = str(fields[number].dim)
        place = lookups[dim].order.index(number)
        if runs and runs[-1][0] == dim and runs[-1][2] == place:
            runs[-1] = (dim, runs[-1][1], place + 1)
        else:
            runs.append((dim, place, place + 1))
    return runs


Spread = Literal["replicated", "sharded"]


def spread(module: nn.Module, how: Spread = "replicated", group: Group = None) -> None:
    """Prepare the tables of all banks of a module for several ranks; in place, on every rank.

    Call this after the process group was made and before ``DistributedDataParallel`` wraps the
    module and the optimizer is made. All ranks start with the tables of rank 0. On one process
    nothing is changed.

    - ``replicated``: all tables on each rank; after each backward pass the ranks exchange the rows
      that they touched, and each has the mean of the gradients. ``DistributedDataParallel`` can do
      the same by itself, but with gloo only, which alone reduces sparse gradients.
    - ``sharded``: see `recsys.embedding.sharded_tables.ShardedTables`.

    Args:
        module: A `recsys.ranker.Ranker`, or anything that contains banks.
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
