"""The hash gate: routing by identity."""

import heapq
from collections.abc import Sequence
from random import Random
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from core_gates.errors import check_at_least, check_option
from core_gates.numerics import check_padding_mask, content_version
from core_gates.routing.base import Gate
from core_gates.routing.output import RoutingOutput

HashTable = Literal["balanced", "random"]


class HashGate(Gate):
    """Send each token or user to fixed experts, by its number alone (Roller et al., 2021).

    A table drawn once from ``seed`` and kept in the state gives every id ``k`` different experts,
    each with weight 1 / k: ``random``, independently of each other, or ``balanced``, the most
    frequent ids first, each to the experts with the least load so far. There are no parameters. The
    state holds the number of experts of the table; loading another number is an error.

    Args:
        dim: Features of a token; only their shape is used.
        num_experts: Number of experts.
        num_ids: Number of ids; they run from 0 to ``num_ids - 1``.
        k: Experts of an id.
        table: How ids are spread over experts.
        frequencies: How often each id occurs, for ``balanced``; all alike if None.
        seed: Seed of the table.
        device: Device of the table.
        dtype: Floating dtype of the weights; float32 at least, and that of ``x`` if larger.

    Shape:
        ``x`` (..., D), ``ids`` (...); weights and indices (..., K); probs (..., E).

    Raises:
        ValueError: ``k`` or ``num_ids`` is out of range, the table is unknown, or the frequencies
            do not fit.
    """

    renormalize = True

    table: Tensor
    table_experts: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        num_ids: int,
        k: int = 1,
        table: HashTable = "balanced",
        frequencies: Sequence[float] | Tensor | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_experts)
        check_at_least(1, num_ids=num_ids)
        check_option("table", table, get_args(HashTable))
        if frequencies is not None:
            if table == "random":
                raise ValueError("a random table takes no frequencies; choose table='balanced'")
            frequencies = [float(f) for f in frequencies]
            if len(frequencies) != num_ids or not all(f >= 0 for f in frequencies):
                raise ValueError(
                    f"frequencies must be {num_ids} numbers that are not negative, one an id"
                )
        self.num_ids = num_ids
        self.k = self.checked_k(k)
        self.seed = seed
        self._kind = table
        self._frequencies: list[float] | None = frequencies
        self._dtype = torch.promote_types(dtype or torch.float32, torch.float32)
        self._known_version: tuple[int, int] | None = None
        self.register_buffer("table", torch.empty(num_ids, k, device=device, dtype=torch.int64))
        self.register_buffer("table_experts", torch.empty((), device=device, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table again from its seed."""
        if self.table.is_meta:
            return
        self.table_experts.fill_(self.num_experts)
        if self._kind == "random":
            generator = torch.Generator().manual_seed(self.seed)
            scores = torch.rand(self.num_ids, self.num_experts, generator=generator)
            drawn = scores.topk(self.k).indices
        else:
            frequencies = self._frequencies or [1.0] * self.num_ids
            drawn = torch.tensor(_balanced(frequencies, self.num_experts, self.k, self.seed))
        self.table.copy_(drawn)

    def forward(
        self, x: Tensor, *, ids: Tensor | None = None, padding_mask: Tensor | None = None
    ) -> RoutingOutput:
        """Route every token of ``x``; see `Gate`.

        Ids out of range raise where that costs no synchronization: on the CPU, outside compiled
        code; elsewhere the indexing itself fails. At ignored tokens they may be anything.

        Raises:
            ValueError: ``ids`` is missing, not integer, of another shape or out of range.
        """
        ids = self._checked(x, ids)
        if padding_mask is not None:
            check_padding_mask(padding_mask, x.shape[:-1])
            ids = ids.masked_fill(padding_mask, 0)
        if not (ids.is_cuda or ids.is_meta or torch.compiler.is_compiling()) and ids.numel():
            least, most = int(ids.min()), int(ids.max())
            if least < 0 or most >= self.num_ids:
                raise ValueError(
                    f"ids must lie between 0 and num_ids - 1 = {self.num_ids - 1}, got"
                    f" {least if least < 0 else most}"
                )
        self._refuse_other_table()
        indices = self.table[ids]
        dtype = torch.promote_types(x.dtype, self._dtype)
        weights = torch.full(indices.shape, 1 / self.k, dtype=dtype, device=indices.device)
        probs = weights.new_zeros(*ids.shape, self.num_experts).scatter(-1, indices, weights)
        return RoutingOutput(weights, indices, probs=probs).ignore(padding_mask)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        count = state_dict.get(f"{prefix}table_experts")
        if isinstance(count, Tensor) and not count.is_meta and int(count) != self.num_experts:
            errors: list[str] = args[-1]  # what load_state_dict raises in the end
            errors.append(self._other_table(f"{prefix}table", count))
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Show the sizes in ``print(gate)``."""
        return f"{super().extra_repr()}, num_ids={self.num_ids}, k={self.k}"

    def _refuse_other_table(self) -> None:
        if self.table.is_meta or torch.compiler.is_compiling():
            return
        version = content_version(self.table_experts)
        if version is None or version != self._known_version:
            if int(self.table_experts) != self.num_experts:
                raise ValueError(self._other_table("table", self.table_experts))
            self._known_version = version

    def _other_table(self, name: str, table_experts: Tensor) -> str:
        return (
            f"the table {name} spreads ids over {int(table_experts)} experts, but the gate has"
            f" {self.num_experts}"
        )

    def _checked(self, x: Tensor, ids: Tensor | None) -> Tensor:
        if x.shape[-1:] != (self.dim,):
            raise ValueError(f"x {tuple(x.shape)} must end in the {self.dim} features of a gate")
        if ids is None:
            raise ValueError("a hash gate routes by ids: pass ids, one integer per token")
        if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
            raise ValueError(f"ids must be integers, got {ids.dtype}")
        if ids.shape != x.shape[:-1]:
            raise ValueError(
                f"ids {tuple(ids.shape)} must have the shape {tuple(x.shape[:-1])} of the tokens"
            )
        return ids.long()


def _balanced(frequencies: list[float], num_experts: int, k: int, seed: int) -> list[list[int]]:
    """Give every id the ``k`` least loaded experts, the most frequent ids first; ties at random."""
    random = Random(seed)
    order = sorted(range(len(frequencies)), key=lambda i: (-frequencies[i], random.random()))
    queue = [(0.0, random.random(), expert) for expert in range(num_experts)]
    heapq.heapify(queue)
    table: list[list[int]] = [[] for _ in frequencies]
    for i in order:
        least = [heapq.heappop(queue) for _ in range(k)]
        table[i] = [expert for _, _, expert in least]
        for load, _, expert in least:
            heapq.heappush(queue, (load + frequencies[i] / k, random.random(), expert))
    return table
