"""Several gates over one set of experts: any routing gates, or linear gates with a mask."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from core_gates.errors import check_at_least
from core_gates.numerics import linear_fp32
from core_gates.ops.multi_gate_mix import reference
from core_gates.ops.multi_gate_mix.op import multi_gate_mix
from core_gates.padding import ignored_as_zero
from core_gates.routing.base import Gate


class MultiGate(nn.Module):
    """Mix one set of experts by several routing gates of any kind (Ma et al., 2018).

    For plain softmax gates :class:`MaskedMixture` does the same in one matmul.

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
        self._shape = mask.shape
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

        The arguments are those of :meth:`~core_gates.routing.base.Gate.forward`.
        """
        routings = [(gate(x, ids=ids, padding_mask=padding_mask), gate) for gate in self.gates]
        rows = [routing.to_dense(gate.num_experts).weights for routing, gate in routings]
        return _spread(torch.cat(rows, -1), self.places, self._shape)

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
        if experts.shape[-2] != self._shape[1]:
            raise ValueError(f"expected {self._shape[1]} experts, found {experts.shape[-2]}")
        weights = self.weights(x, ids=ids, padding_mask=padding_mask)
        experts = ignored_as_zero(experts, padding_mask)  # 0 · NaN = NaN
        acc = torch.promote_types(weights.dtype, experts.dtype)
        return (weights.to(acc) @ experts.to(acc)).to(experts.dtype)


class MaskedMixture(nn.Module):
    """Mix one set of experts by linear softmax gates that see part of it each.

    A table of gates and experts makes the model: all True is MMoE (Ma et al., 2018); own and shared
    experts is CGC (Tang et al., 2020); groups of a hierarchy, with self gates over each group's
    own experts on a residual path, is HoME (arXiv 2408.05430):

    ``y_s = Σ_e∈mask(s) softmax(x W_s + b_s)_e E_e + Σ_e∈self(s) self_s(x V_s + c_s)_e E_e``,

    where a self gate is a softmax, or a sigmoid if it sees exactly one expert. All gates are
    computed in one matmul; only visible experts have weights: row i of ``weight`` belongs to the
    i-th True of the mask, row by row.

    Args:
        dim: Features of the gates' input.
        mask: True where a gate sees an expert (S, E).
        self_mask: The same for the self gates, or None for a mixture without them; a row without
            True has no self gate.
        bias: Whether the logits have a bias.
        device: Device of parameters and tables.
        dtype: Floating dtype of the parameters; the gates are computed in float32.

    Shape:
        ``x`` (..., dim), experts (..., E, D); result (..., S, D).

    Raises:
        ValueError: ``dim`` is below 1, the masks are not boolean tables of one shape, or a gate
            sees no expert.
    """

    tables: Tensor
    places: Tensor

    def __init__(
        self,
        dim: int,
        mask: Tensor,
        *,
        self_mask: Tensor | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, dim=dim)
        tables = [mask] if self_mask is None else [mask, self_mask]
        for table in tables:
            if table.dtype != torch.bool or table.ndim != 2 or table.shape != mask.shape:
                raise ValueError(
                    "the masks must be boolean tables (gates, experts) of one shape, got"
                    f" {table.dtype} {tuple(table.shape)}"
                )
        if not mask.any(-1).all():
            raise ValueError(f"gates {(~mask.any(-1)).nonzero().flatten().tolist()} see no expert")
        self.dim = dim
        self._tables = torch.stack(tables).cpu()  # what reset_parameters fills the buffers from
        width = int(self._tables.sum())
        self.weight = nn.Parameter(torch.empty(width, dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(width, device=device, dtype=dtype)) if bias else None
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
        self.tables.copy_(self._tables)
        self.places.copy_(self._tables.flatten().nonzero().flatten())

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        """Return the mixtures (..., S, D) of the outputs of the experts (..., E, D).

        Raises:
            ValueError: ``x`` or ``experts`` has another shape.
        """
        logits = self._logits(x)
        if len(self.tables) == 1:
            return multi_gate_mix(experts, logits[..., 0, :, :], self.tables[0])
        gates, self_gates = logits.unbind(-3)
        return multi_gate_mix(experts, gates, self.tables[0], self_gates, self.tables[1])

    def weights(self, x: Tensor) -> Tensor:
        """Return the weights (..., S, E) of the gates and, added, of the self gates."""
        return reference.normalize(self._logits(x), self.tables).sum(-3)

    def gate_values(self, x: Tensor, experts: Tensor) -> Tensor:  # noqa: ARG002
        """Return the weights of every gate and self gate at the experts that it sees (..., N)."""
        weights = reference.normalize(self._logits(x), self.tables)
        return weights.flatten(-3).index_select(-1, self.places)

    def extra_repr(self) -> str:
        """Show the sizes in ``print(mixture)``."""
        _, num_gates, num_experts = self.tables.shape
        self_gates = len(self.tables) == 2
        return f"dim={self.dim}, gates={num_gates}, experts={num_experts}, self_gates={self_gates}"

    def _logits(self, x: Tensor) -> Tensor:
        """Return logits (..., G, S, E), zero where a gate sees nothing."""
        packed = linear_fp32(x, self.weight, self.bias)
        return _spread(packed, self.places, self.tables.shape)


def _spread(packed: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """Return the values (..., N) at their places in a table of ``shape``, zeros elsewhere."""
    zeros = packed.new_zeros(*packed.shape[:-1], shape.numel())
    return zeros.index_copy(-1, places, packed).view(*packed.shape[:-1], *shape)
