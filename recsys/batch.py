"""What a ranker trains on: one packed tensor for each kind of column.

B rows, F sparse features, N dense inputs, S sequences of L events, T tasks.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


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
    """

    sparse: Tensor
    dense: Tensor
    sequences: tuple[Tensor, ...]
    labels: Tensor
    mask: Tensor
    weight: Tensor
    user: Tensor

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.sparse.shape[0]

    def take(self, rows: Tensor | slice) -> "Batch":
        """Return some of the rows, by a slice (a view), a mask (B,) or their numbers (M,)."""
        if isinstance(rows, slice) or rows.dtype == torch.bool:
            return self._each(lambda column: column[rows])
        return self._each(lambda column: column.index_select(0, rows))

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on a device."""
        return self._each(lambda column: column.to(device, non_blocking=True))

    @staticmethod
    def cat(batches: Sequence["Batch"]) -> "Batch":
        """Return batches as one; each row without a user stays its own."""
        first, *others = batches
        rest = [iter([*b.plain(), *b.sequences]) for b in others]
        made = first._each(lambda column: torch.cat([column, *map(next, rest)]))
        own = -1 - torch.arange(len(made), device=made.user.device)
        return made.replace(user=torch.where(made.user < 0, own, made.user))

    def plain(self) -> list[Tensor]:
        """Return all tensors but the sequences, in order."""
        return [column for column in self if isinstance(column, Tensor)]

    def replace(self, **columns: Any) -> "Batch":
        """Return the batch with other columns; ``_replace`` fails, since ``len`` counts rows."""
        known: dict[str, Any] = dict(zip(self._fields, self, strict=True))
        return Batch(**(known | columns))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        sparse, dense, labels, mask, weight, user = map(change, self.plain())
        sequences = tuple(map(change, self.sequences))
        return Batch(sparse, dense, sequences, labels, mask, weight, user)
