"""Adagrad with one accumulator per row of an embedding table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from core_gates.errors import GatesError, check_at_least, check_positive


class RowWiseAdagrad(Optimizer):
    """Adagrad that keeps one number per row and changes only rows that have a gradient.

    ``a_r ← a_r + mean_d g_rd²`` and ``w_r ← w_r − lr g_r / (√a_r + ε)``. The accumulator needs
    1 / d of the memory of Adagrad's, and with sparse gradients a step costs what the rows of the
    batch cost, whatever the size of the table.

    Args:
        params: Tables (rows, d), or groups of them.
        lr: Learning rate; 0.02 to 0.05 is usual.
        eps: Added to the root.
        l2: Weight of the squared norm of the rows that have a gradient.
        initial_accumulator_value: Of every row.

    Raises:
        ValueError: A number is out of range, or a parameter is not a matrix.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.03,
        *,
        eps: float = 1e-8,
        l2: float = 0.0,
        initial_accumulator_value: float = 0.0,
    ) -> None:
        check_positive(lr=lr, eps=eps)
        check_at_least(0, l2=l2, initial_accumulator_value=initial_accumulator_value)
        start = initial_accumulator_value
        super().__init__(params, {"lr": lr, "eps": eps, "l2": l2, "start": start})
        for table in self._tables():
            if table.ndim != 2:
                raise ValueError(
                    f"a parameter has shape {tuple(table.shape)}: RowWiseAdagrad takes tables "
                    "(rows, d); give all else to another optimizer"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Change the rows that have a gradient.

        Args:
            closure: Computes gradients and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None:
                    self._change(table, *row_gradients(table.grad), group)
        return loss

    def _change(self, table: Tensor, rows: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        sums = self._sums(table, group["start"])
        grad = grad.to(sums.dtype)
        if group["l2"]:
            touched = grad.ne(0).any(1, keepdim=True)
            grad = grad + group["l2"] * torch.where(touched, table[rows].to(grad.dtype), 0)
        mine = sums.index_select(0, rows) + grad.square().mean(1)
        sums.index_copy_(0, rows, mine)
        factor = -group["lr"] / (mine.sqrt() + group["eps"])
        table.index_add_(0, rows, (grad * factor[:, None]).to(table.dtype))

    def state_dict(self) -> dict[str, Any]:
        """Return settings and accumulators; of sharded tables all, so every rank must call this."""
        packed = super().state_dict()
        for number, table in enumerate(self._tables()):
            shards = getattr(table, "shards", None)
            if shards is not None and number in packed["state"]:
                sums = shards.whole(packed["state"][number]["sum"])
                packed["state"][number] = {"sum": sums}
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take settings and accumulators of `state_dict`; their dtype is kept."""
        super().load_state_dict(state_dict)
        tables = self._tables()
        for number, entry in state_dict["state"].items():
            table = tables[number]
            shards = getattr(table, "shards", None)
            sums = entry["sum"] if shards is None else shards.own(entry["sum"])
            self.state[table]["sum"] = sums.to(table.device, sums_dtype(table), copy=True)

    def grow(self, table: nn.Parameter, places: Tensor) -> None:
        """Move the accumulators of a table that got more rows.

        Args:
            table: Table with its new rows.
            places: Row at which each old row now is, in order.
        """
        if "sum" not in self.state[table]:
            return
        old = self.state[table].pop("sum")
        group = next(g for g in self.param_groups if any(p is table for p in g["params"]))
        self._sums(table, group["start"])[places.to(old.device)] = old

    def _tables(self) -> list[Tensor]:
        return [table for group in self.param_groups for table in group["params"]]

    def _sums(self, table: Tensor, start: float) -> Tensor:
        """Return the accumulators (rows,) of a table."""
        state = self.state[table]
        if "sum" not in state:
            made = torch.full((len(table),), start, dtype=sums_dtype(table), device=table.device)
            state["sum"] = made
        if len(state["sum"]) != len(table):
            raise GatesError(
                f"a table has {len(table)} rows and {len(state['sum'])} accumulators: give the "
                "optimizer to grow(), or the checkpoint belongs to tables of other sizes"
            )
        return state["sum"]


def sums_dtype(table: Tensor) -> torch.dtype:
    """Return the dtype of the accumulators of a table: float32 at least."""
    return torch.promote_types(table.dtype, torch.float32)


def row_gradients(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows (U,) that a gradient touches, each once, and their gradients (U, d)."""
    if not grad.is_sparse:
        rows = grad.ne(0).any(1).nonzero().squeeze(1)
        return rows, grad[rows]
    return sum_by_row(grad._indices()[0], grad._values())


def sum_by_row(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return distinct rows (U,), ascending, and the sums (U, d) of their values.

    Sorting and one pass of ``embedding_bag`` take a fifth of the time of ``Tensor.coalesce``.

    Args:
        rows: Row numbers (n,).
        values: Values (n, d).
    """
    ordered, places = rows.sort(stable=True)
    distinct, counts = ordered.unique_consecutive(return_counts=True)
    if len(distinct) == len(rows):
        return ordered, values[places]
    ends = counts.cumsum(0)
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return distinct, F.embedding_bag(places, values, ends - counts, mode="sum")
