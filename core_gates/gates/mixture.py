"""Several gates over one set of experts: any routing gates, or linear gates with a mask."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core_gates.errors import check_at_least, check_option
from core_gates.numerics import ignored_as_zero, linear_fp32
from core_gates.ops._select import use_slices
from core_gates.ops.multi_gate_mix import pairs, reference
from core_gates.ops.multi_gate_mix.op import multi_gate_mix
from core_gates.ops.multi_gate_mix.pairs import plan_of
from core_gates.routing.base import Gate


class _MixtureWeights(nn.Module):
    """What a monitor watches of a mixture: the weights as they pass, unchanged."""

    def forward(self, weights: Tensor, padding_mask: Tensor | None) -> Tensor:  # noqa: ARG002
        """Return the weights (..., S, E)."""
        return weights


class MultiGate(nn.Module):
    """Mix one set of experts by several routing gates of any kind (Ma et al., 2018).

    For plain softmax gates `MaskedMixture` does the same in one matmul.

    Args:
        gates: One routing gate for each mixture.
        mask: True where a gate sees an expert (S, E): gate s then routes over the experts of row
            s, in their order. By default every gate sees all experts.

    Shape:
        ``x`` (..., dim), experts (..., E, D); result (..., S, D). ``collect_routing`` gathers the
        routings.

    Raises:
        ValueError: There is no gate, or a gate has another number of experts than it sees.
    """

    places: Tensor

    def __init__(self, gates: Sequence[Gate], mask: Tensor | None = None) -> None:
        super().__init__()
        if not gates:
            raise ValueError("a mixture needs at least one gate, got none")
        if mask is None:
            mask = torch.ones(len(gates), gates[0].num_experts, dtype=torch.bool)
        if mask.dtype != torch.bool or mask.ndim != 2 or len(mask) != len(gates):
            raise ValueError(
                f"mask must be a boolean table ({len(gates)}, experts), one row per gate, got"
                f" {mask.dtype} {tuple(mask.shape)}"
            )
        for s, (gate, row) in enumerate(zip(gates, mask, strict=True)):
            if gate.num_experts != int(row.sum()):
                raise ValueError(
                    f"gate {s} routes over {gate.num_experts} experts, its row of the mask shows"
                    f" {int(row.sum())}"
                )
        self.gates = nn.ModuleList(gates)
        self.mixed = _MixtureWeights()
        self.shape = (mask.shape[0], mask.shape[1])
        self._places = mask.cpu().flatten().nonzero().flatten()
        self.register_buffer("places", self._places.clone(), persistent=False)

    def reset_parameters(self) -> None:
        """Reset every gate."""
        for gate in self.gates:
            gate.reset_parameters()  # type: ignore[operator]
        self.places.copy_(self._places)

    def weights(
        self, x: Tensor, *, ids: Tensor | None = None, padding_mask: Tensor | None = None
    ) -> Tensor:
        """Return the weights (..., S, E), exactly zero where a gate does not route.

        The arguments are those of `core_gates.routing.base.Gate.forward`.
        """
        routings = [(gate(x, ids=ids, padding_mask=padding_mask), gate) for gate in self.gates]
        rows = [routing.to_dense(gate.num_experts).weights for routing, gate in routings]
        return _spread(torch.cat(rows, -1), self.places, torch.Size(self.shape))

    def forward(
        self,
        x: Tensor,
        experts: Tensor,
        *,
        ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the mixtures (..., S, D) of the outputs of the experts (..., E, D).

        Args:
            x: Routing input (..., dim).
            experts: Outputs of the experts (..., E, D).
            ids: Token or user numbers (...), for gates that route by identity.
            padding_mask: True (...) at tokens to ignore, whose mixtures are zero.

        Raises:
            ValueError: ``experts`` has another number of experts, or the mask does not fit.
        """
        if experts.shape[-2] != self.shape[1]:
            raise ValueError(f"expected {self.shape[1]} experts, found {experts.shape[-2]}")
        weights: Tensor = self.weights(x, ids=ids, padding_mask=padding_mask)
        weights = self.mixed(weights, padding_mask)
        experts = ignored_as_zero(experts, padding_mask)  # 0 · NaN = NaN
        acc = torch.promote_types(weights.dtype, experts.dtype)
        return (weights.to(acc) @ experts.to(acc)).to(experts.dtype)


class MaskedMixture(nn.Module):
    """Mix one set of experts by linear softmax gates that see part of it each.

    A table of gates and experts makes the model: all True is MMoE (Ma et al., 2018); own and shared
    experts is CGC (Tang et al., 2020); groups of a hierarchy, with self gates over each group's
    own experts on a residual path, is HoME (arXiv 2408.05430):

    ``y_s = Σ_e∈mask(s) softmax(x W_s + b_s)_e E_e + Σ_e∈self(s) self_s(x V_s + c_s)_e E_e``,

    where a self gate is a softmax, or a sigmoid if it sees exactly one expert. AdaTT (Li et al.,
    2023) has free weights on the residual path instead, which do not depend on the input: they
    start uniform in ±1/√n for n own experts; without shared experts a single own expert has the
    weight one.

    All gates of an input are computed in one matmul; only visible experts have weights: row i of
    ``weight`` belongs to the i-th True of the mask, row by row.

    Args:
        dim: Features of the gates' input.
        mask: True where a gate sees an expert (S, E).
        self_mask: The same for the self gates, or None for a mixture without them; a row without
            True has no self gate.
        self_weights: ``gate`` for self gates, ``free`` for the weights of AdaTT, a single one of
            which is one, ``trained`` for those of AdaTT with shared experts, all trained.
        reads: For every gate the input that it reads; None if all read the same.
        bias: Whether the logits have a bias.
        device: Device of parameters and tables.
        dtype: Floating dtype of the parameters; the gates are computed in float32.

    Attributes:
        gate_of_row: Gate whose logit, or whose self gate's, each row of weight and bias makes.

    Shape:
        ``x`` (..., dim), with ``reads`` (..., I, dim); experts (..., E, D); result (..., S, D).

    Raises:
        ValueError: The masks are not boolean tables of one shape, a gate sees no expert, ``reads``
            has another number of gates, or ``self_weights`` is unknown.
    """

    tables: Tensor
    places: Tensor

    def __init__(
        self,
        dim: int,
        mask: Tensor,
        *,
        self_mask: Tensor | None = None,
        self_weights: Literal["gate", "free", "trained"] = "gate",
        reads: Sequence[int] | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, dim=dim)
        check_option("self_weights", self_weights, ("gate", "free", "trained"))
        _check_masks(mask, self_mask)
        if reads is not None and (len(reads) != len(mask) or min(reads) < 0):
            raise ValueError(f"reads must name an input for each of {len(mask)} gates, got {reads}")
        self.dim, self.reads = dim, None if reads is None else tuple(reads)
        free, gated = (None, self_mask) if self_weights == "gate" else (self_mask, None)
        self._fewest = 1 if self_weights == "trained" else 2  # own experts whose weights are free
        # What reset_parameters fills the buffers from.
        self._tables = torch.stack([mask] if gated is None else [mask, gated]).cpu()
        self._free = None if free is None else free.cpu()
        self.shape = (mask.shape[0], mask.shape[1])
        self._plan = plan_of(self._tables)
        self._rows = _rows_of_inputs(self._tables, self.reads)
        self.gate_of_row = tuple(self._tables.nonzero()[:, 1].tolist())
        width = len(self.gate_of_row)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(width, dim, **where))
        self.bias = nn.Parameter(torch.empty(width, **where)) if bias else None
        self.self_weight = None
        if self._free is not None:
            several = self._free.sum(-1)
            number = int(several[several >= self._fewest].sum())
            self.self_weight = nn.Parameter(torch.empty(number, **where))
        tables_ = torch.empty(self._tables.shape, device=device, dtype=torch.bool)
        self.register_buffer("tables", tables_, persistent=False)
        places = torch.empty(width, device=device, dtype=torch.int64)
        self.register_buffer("places", places, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, 0.02²), so that the gates start near uniform; zero the bias."""
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self._free is not None and self.self_weight is not None:
            counts = self._free.sum(-1, keepdim=True).expand_as(self._free)[self._free]
            bound = counts[counts >= self._fewest].to(self.self_weight) ** -0.5
            with torch.no_grad():
                self.self_weight.uniform_(-1, 1).mul_(bound)
        self.tables.copy_(self._tables)
        self.places.copy_(self._tables.flatten().nonzero().flatten())

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        """Return the mixtures (..., S, D) of the outputs of the experts (..., E, D).

        Raises:
            ValueError: ``x`` or ``experts`` has another shape.
        """
        packed = self._packed(x)
        if experts.ndim == 3 and use_slices(packed, experts) and self._fits(packed, experts):
            mixed = pairs.mix(experts, packed, self._plan)
        else:
            kinds = _spread(packed, self.places, self.tables.shape).unbind(-3)
            selfs = (kinds[1], self.tables[1]) if len(kinds) == 2 else ()
            mixed = multi_gate_mix(experts, kinds[0], self.tables[0], *selfs)
        free = self._free_weights()
        return mixed if free is None else mixed + free.to(experts.dtype) @ experts

    def weights(self, x: Tensor, *, residual: bool = True) -> Tensor:
        """Return the weights (..., S, E) of the gates.

        Args:
            x: Input of the gates.
            residual: Whether those of the residual path, of self gates or free, are added.
        """
        kinds = _spread(self._packed(x), self.places, self.tables.shape)
        weights = reference.normalize(kinds, self.tables)
        weights = weights.sum(-3) if residual else weights[..., 0, :, :]
        free = self._free_weights() if residual else None
        return weights if free is None else weights + free

    def gate_values(self, x: Tensor, experts: Tensor) -> Tensor:  # noqa: ARG002
        """Return the weights of every gate and self gate at the experts that it sees (..., N)."""
        kinds = _spread(self._packed(x), self.places, self.tables.shape)
        weights = reference.normalize(kinds, self.tables)
        return weights.flatten(-3).index_select(-1, self.places)

    def extra_repr(self) -> str:
        """Show the sizes in ``print(mixture)``."""
        _, num_gates, num_experts = self.tables.shape
        self_gates = len(self.tables) == 2
        return f"dim={self.dim}, gates={num_gates}, experts={num_experts}, self_gates={self_gates}"

    def _packed(self, x: Tensor) -> Tensor:
        """Return the logits of visible experts (..., P), in the order of the masks."""
        if self.reads is None:
            return linear_fp32(x, self.weight, self.bias)
        inputs = x.unbind(-2)  # whose gradients are stacked; those of slices are added
        outputs = []
        read = [(i, rows) for i, rows in enumerate(self._rows) if rows]
        for i, rows in read:
            weight = torch.cat([self.weight[part] for part in rows])
            bias = None if self.bias is None else torch.cat([self.bias[part] for part in rows])
            outputs.append(linear_fp32(inputs[i], weight, bias))
        parts: dict[int, Tensor] = {}
        for (_, rows), output in zip(read, outputs, strict=True):
            sizes = [part.stop - part.start for part in rows]
            starts = [part.start for part in rows]
            parts |= dict(zip(starts, torch.split(output, sizes, -1), strict=True))
        return torch.cat([parts[start] for start in sorted(parts)], -1)

    def _fits(self, packed: Tensor, experts: Tensor) -> bool:
        """Return whether there is an output of each expert for each row."""
        return experts.shape[:2] == (*packed.shape[:-1], self.tables.shape[2])

    def _free_weights(self) -> Tensor | None:
        """Return the free weights (S, E) of the residual path."""
        if self.self_weight is None or self._free is None:
            return None
        free = self._free.to(self.weight.device)
        several = free & (free.sum(-1, keepdim=True) >= self._fewest)
        ones = (free & ~several).to(self.self_weight.dtype)
        return ones.masked_scatter(several, self.self_weight)


def _check_masks(mask: Tensor, self_mask: Tensor | None) -> None:
    for table in [mask] if self_mask is None else [mask, self_mask]:
        if table.dtype != torch.bool or table.ndim != 2 or table.shape != mask.shape:
            raise ValueError(
                "the masks must be boolean tables (gates, experts) of one shape, got"
                f" {table.dtype} {tuple(table.shape)}"
            )
    if not mask.any(-1).all():
        raise ValueError(f"gates {(~mask.any(-1)).nonzero().flatten().tolist()} see no expert")


def _rows_of_inputs(tables: Tensor, reads: Sequence[int] | None) -> list[list[slice]]:
    """Return for every input the slices of rows that belong to gates reading it."""
    if reads is None:
        return []
    by_input: list[list[slice]] = [[] for _ in range(max(reads) + 1)]
    start = 0
    for counts in tables.sum(-1).tolist():
        for i, count in zip(reads, counts, strict=True):
            rows = by_input[i]
            if rows and rows[-1].stop == start:
                rows[-1] = slice(rows[-1].start, start + count)
            elif count:
                rows.append(slice(start, start + count))
            start += count
    return by_input


def _spread(packed: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """Return the values (..., N) at their places in a table of ``shape``, zeros elsewhere."""
    zeros = packed.new_zeros(*packed.shape[:-1], shape.numel())
    return zeros.index_copy(-1, places, packed).view(*packed.shape[:-1], *shape)
