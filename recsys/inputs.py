"""What a ranker trains on, and from encoded rows to the inputs of a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from core_gates.errors import check_at_least
from recsys.embedding.bank import EmbeddingBank
from recsys.embedding.lookup import MISSING
from recsys.schema import FeatureSchema, History, Product, Side, indicator_of
from recsys.sequence import HistoryEncoder, build_encoder


class Batch(NamedTuple):
    """Encoded rows, in the order of the schema.

    Attributes:
        sparse: Rows of the embedding tables (B, F), int64: 0 unknown, 1 missing. Sparse features,
            then crossed ones, then bucketed dense ones.
        dense: Scaled numbers (B, N), float32, then their missing indicators.
        sequences: Rows of the tables (B, L), int64, one tensor per history, 1 where there is no
            event; newest last, padded at the front.
        labels: 0 or 1 (B, T), float32.
        mask: True (B, T) where the task counts.
        weight: Sample weights (B,), float32.
        user: Number of the user of each row (B,), int64, for grouped metrics; below 0 where there
            is none, in each row another.
        numbers: Logarithms (B, R) of regressions, over those of their scales, NaN where they do not
            count; None where nothing is known of any.
    """

    sparse: Tensor
    dense: Tensor
    sequences: tuple[Tensor, ...]
    labels: Tensor
    mask: Tensor
    weight: Tensor
    user: Tensor
    numbers: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.sparse.shape[0]

    def take(self, rows: Tensor | slice) -> Batch:
        """Return some of the rows, by a slice (a view), a mask (B,) or their numbers (M,)."""
        if isinstance(rows, slice) or rows.dtype == torch.bool:
            return self._each(lambda column: column[rows])
        return self._each(lambda column: column.index_select(0, rows))

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device."""
        return self._each(lambda column: column.to(device, non_blocking=True))

    @staticmethod
    def cat(batches: Sequence[Batch]) -> Batch:
        """Return batches as one; each row without a user stays its own."""
        first, *others = batches
        rest = [iter([*b.plain(), *b.sequences]) for b in others]
        made = first._each(lambda column: torch.cat([column, *map(next, rest)]))
        unique_users = -1 - torch.arange(len(made), device=made.user.device)
        return made.replace(user=torch.where(made.user < 0, unique_users, made.user))

    def plain(self) -> list[Tensor]:
        """Return all tensors but the sequences, in order."""
        return [column for column in self if isinstance(column, Tensor)]

    def replace(self, **columns: Any) -> Batch:
        """Return the batch with other columns; ``_replace`` fails, since ``len`` counts rows."""
        columns_of_batch: dict[str, Any] = dict(zip(self._fields, self, strict=True))
        return Batch(**(columns_of_batch | columns))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        sparse, dense, *targets = map(change, self.plain())
        return Batch(sparse, dense, tuple(map(change, self.sequences)), *targets)


class Encoded(Protocol):
    """Encoded rows: `Rows`, or a ``Batch``."""

    @property
    def sparse(self) -> Tensor:
        """Rows of the tables (B, F), int64."""

    @property
    def dense(self) -> Tensor:
        """Scaled numbers and their indicators (B, N)."""

    @property
    def sequences(self) -> tuple[Tensor, ...]:
        """Rows of the tables (B, L) of each history."""


class Rows(NamedTuple):
    """Encoded rows without labels.

    Attributes:
        sparse: Rows of the tables (B, F), int64.
        dense: Scaled numbers and their indicators (B, N).
        sequences: Rows of the tables (B, L) of each history.
    """

    sparse: Tensor
    dense: Tensor
    sequences: tuple[Tensor, ...] = ()


class UserPart(NamedTuple):
    """What is computed once for all candidates of a user.

    Attributes:
        vectors: Embeddings, encoded histories and dense numbers of the user (1, ·).
        sparse: Rows of the tables (1, F).
        states: States (1, L, W) of the histories that wait for a target, by number.
        masks: True (1, L) where they have an event, by number.
    """

    vectors: Tensor
    sparse: Tensor
    states: dict[int, Tensor]
    masks: dict[int, Tensor]


class InputLayer(nn.Module):
    """Embeddings, encoded histories, dense numbers and products of a row, in this order.

    A product is divided by ten standard deviations of the tables at their start, so that it is
    neither lost among the embeddings at first nor far above them later.

    Args:
        schema: Features.
        sizes: Rows by name of the table.
        dense_width: Dense inputs N: scaled numbers, in the order of the schema, then as many
            indicators that they were missing.
        encoders: Further arguments of the encoders, by name of the history.
        device: Device of tables and encoders.
        dtype: Floating dtype of tables and encoders.

    Attributes:
        out_dim: Inputs D of the network.
        slices: Columns of D that each feature takes, by name; the indicator of a dense feature is
            called ``NAME missing``.

    Raises:
        ValueError: A table has no size, a history is unknown or has no such option, or
            ``dense_width`` does not fit the schema.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        sizes: Mapping[str, int],
        dense_width: int,
        *,
        encoders: Mapping[str, Mapping[str, Any]] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dense = dense_inputs(schema)
        if dense_width != len(dense):
            raise ValueError(
                f"dense_width is {dense_width}; the schema has {len(dense)}: a number and an "
                "indicator for each dense feature that is not bucketed"
            )
        options = dict(encoders or {})
        if strangers := sorted(set(options) - {history.name for history in schema.sequences}):
            raise ValueError(f"encoders names {', '.join(strangers)}, no history of the schema")
        self.histories = schema.sequences
        self.bank = EmbeddingBank(schema, sizes, device=device, dtype=dtype)
        self.encoders = nn.ModuleList(
            build_encoder(
                history,
                self.bank.field(history.of).dim,
                options.get(history.name),
                device=device,
                dtype=dtype,
            )
            for history in self.histories
        )
        widths = [(field.name, field.dim, field.side) for field in self.bank.fields]
        widths += [
            (history.name, encoder.out_dim, history.side if not encoder.needs_target else "item")
            for history, encoder in self._pairs()
        ]
        widths += [(name, 1, side) for name, side in dense]
        self._lay_out(widths, device)
        self._lay_out_products(schema.products)
        self._lay_out_dense(dense, device)

    def forward(self, sparse: Tensor, dense: Tensor, sequences: Sequence[Tensor] = ()) -> Tensor:
        """Return the inputs (B, D).

        Args:
            sparse: Rows of the tables (B, F), int64.
            dense: Scaled numbers and indicators (B, N).
            sequences: Rows of the tables (B, L) of each history.

        Raises:
            ValueError: A shape does not fit, or a row lies outside of its table.
        """
        self._check(dense, sequences)
        parts = self.bank.gather(sparse)
        for (history, encoder), rows in zip(self._pairs(), sequences, strict=True):
            target = self._target(history, encoder, sparse)
            parts.append(encoder(self.bank.lookup(history.of, rows), rows != MISSING, target))
        return self._multiplied(self._cat([*parts, dense]))

    def user_part(self, rows: Encoded) -> UserPart:
        """Return what depends on the user alone.

        Args:
            rows: One row; its features of items and context are not read.

        Raises:
            ValueError: There are more rows, or a shape does not fit.
        """
        if len(rows.sparse) != 1:
            raise ValueError(f"expected the one row of a user, got {len(rows.sparse)}")
        self._check(rows.dense, rows.sequences)
        parts = self.bank.gather(rows.sparse, "user")
        part = UserPart(rows.dense, rows.sparse, {}, {})
        for i, (history, encoder) in enumerate(self._pairs()):
            if history.side != "user":
                continue
            mask = rows.sequences[i] != MISSING
            states = encoder.states(self.bank.lookup(history.of, rows.sequences[i]), mask)
            if encoder.needs_target:
                part.states[i], part.masks[i] = states, mask
            else:
                parts.append(encoder.pooled(states, mask, None))
        parts.append(rows.dense.index_select(1, self._numbers("dense_of_user")))
        return part._replace(vectors=self._cat(parts))

    def with_user(self, user: UserPart, rows: Encoded) -> Tensor:
        """Return the inputs (B, D) of B candidates of a user.

        Args:
            user: From `user_part`.
            rows: Candidates; their features of the user are not read.

        Raises:
            ValueError: A shape does not fit, or a row lies outside of its table.
        """
        parts = self.bank.gather(rows.sparse, "rest")
        for i, (history, encoder) in enumerate(self._pairs()):
            if history.side == "user" and not encoder.needs_target:
                continue
            column = self.bank.column(history.of)
            of_user = encoder.needs_target and self.bank.field(history.of).side == "user"
            sparse = user.sparse.expand(len(rows.sparse), -1) if of_user else rows.sparse
            target = (
                self.bank.lookup(history.of, sparse[:, column]) if encoder.needs_target else None
            )
            if history.side == "user":
                parts.append(encoder.pooled(user.states[i], user.masks[i], target))
            else:
                events = self.bank.lookup(history.of, rows.sequences[i])
                parts.append(encoder(events, rows.sequences[i] != MISSING, target))
        parts.append(rows.dense.index_select(1, self._numbers("dense_of_rest")))
        user_vectors = user.vectors.expand(len(rows.sparse), -1)
        v = self._cat([user_vectors, *parts]).index_select(1, self._numbers("places"))
        return self._multiplied(v)

    def columns(self, names: Sequence[str]) -> list[int]:
        """Return the columns of D that some features take, in the order of the names.

        Raises:
            ValueError: A name is unknown.
        """
        if strangers := [name for name in names if name not in self.slices]:
            raise ValueError(
                f"{', '.join(strangers)} are no inputs; known are {', '.join(self.slices)}"
            )
        return [i for n in names for i in range(self.slices[n].start, self.slices[n].stop)]

    def _lay_out(self, widths: Sequence[tuple[str, int, Side]], device: Any) -> None:
        """Note where each input lies, and where among those of the user and the rest."""
        self.slices: dict[str, slice] = {}
        end = 0
        for name, width, _ in widths:
            self.slices[name] = slice(end, end + width)
            end += width
        self.out_dim = end
        check_at_least(1, inputs=end)
        sides = {name: side == "user" for name, _, side in widths}
        split = [n for n in self.slices if sides[n]] + [n for n in self.slices if not sides[n]]
        places = torch.tensor(self.columns(split), dtype=torch.int64).argsort()
        self.register_buffer("places", places.to(device), persistent=False)

    def _lay_out_products(self, products: Sequence[Product]) -> None:
        """Append the columns of the products."""
        self._products: list[list[list[slice]]] = []
        for product in products:
            sides = [[self.slices[name] for name in side] for side in (product.left, product.right)]
            self._products.append(sides)
            self.slices[product.name] = slice(
                self.out_dim, self.out_dim + self.bank.field(product.left[0]).dim
            )
            self.out_dim = self.slices[product.name].stop

    def _multiplied(self, v: Tensor) -> Tensor:
        """Append the products to all other inputs (B, ·)."""
        if not self._products:
            return v
        scale = 0.1 / self.bank.std
        made = [scale * _summed(v, left) * _summed(v, right) for left, right in self._products]
        return torch.cat([v, *made], 1)

    def _lay_out_dense(self, dense: Sequence[tuple[str, Side]], device: Any) -> None:
        for name, of_user in (("dense_of_user", True), ("dense_of_rest", False)):
            chosen = [i for i, (_, side) in enumerate(dense) if (side == "user") == of_user]
            numbers = torch.tensor(chosen, dtype=torch.int64, device=device)
            self.register_buffer(name, numbers, persistent=False)

    def _pairs(self) -> list[tuple[History, HistoryEncoder]]:
        encoders = [cast(HistoryEncoder, encoder) for encoder in self.encoders]
        return list(zip(self.histories, encoders, strict=True))

    def _target(self, history: History, encoder: HistoryEncoder, sparse: Tensor) -> Tensor | None:
        if not encoder.needs_target:
            return None
        return self.bank.lookup(history.of, sparse[:, self.bank.column(history.of)])

    def _numbers(self, name: str) -> Tensor:
        return cast(Tensor, getattr(self, name))

    def _cat(self, parts: Sequence[Tensor]) -> Tensor:
        dtype = next((p.dtype for p in self.parameters()), parts[0].dtype)
        return torch.cat([part.to(dtype) for part in parts], 1)

    def _check(self, dense: Tensor, sequences: Sequence[Tensor]) -> None:
        width = len(self._numbers("dense_of_user")) + len(self._numbers("dense_of_rest"))
        if dense.ndim != 2 or dense.shape[1] != width:
            raise ValueError(f"dense {tuple(dense.shape)} must be (B, {width})")
        if len(sequences) != len(self.histories):
            raise ValueError(f"got {len(sequences)} sequences, expected {len(self.histories)}")


def _summed(v: Tensor, columns: Sequence[slice]) -> Tensor:
    return torch.stack([v[:, places] for places in columns]).sum(0)


def dense_inputs(schema: FeatureSchema) -> list[tuple[str, Side]]:
    """Return name and side of each dense input: numbers, then indicators that they are missing."""
    scaled = [feature for feature in schema.dense if feature.scaling != "buckets"]
    return [
        *((feature.name, feature.side) for feature in scaled),
        *((indicator_of(feature.name), feature.side) for feature in scaled),
    ]
