"""Local search over permutations of the experts, around any gate (COMET+)."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from core_gates.collectives import gathered
from core_gates.errors import GatesError
from core_gates.numerics import accumulation_dtype, linear_fp32, widest_float
from core_gates.routing.assignment import (
    PermutationSearch,
    nearest_permutations,
    permutation_entropy,
    sinkhorn,
    sinkhorn_in_one_op,
)
from core_gates.routing.base import Gate
from core_gates.routing.output import RoutingOutput
from core_gates.routing.schedules import StagedGate


class PermutedGate(StagedGate):
    """Permute the experts of a gate, and learn how (COMET+, Ibrahim et al., 2023).

    Each tree or selector j of the gate, a row vector over experts, is multiplied by Π_j; the sum
    over j is scaled as the gate scales its own weights. Phase ``search``: Π is relaxed and learned,
    which makes any gate dense; evaluation uses the nearest permutation (the best assignment, by
    SciPy). Phase ``permuted``: Π is fixed, and a gate with indices keeps them;
    `set_permutations` begins it with given ones. Phases follow the updates of this gate; the
    wrapped one is updated for itself by `core_gates.routing.collect.update_gates`.

    The loss ``permutation_entropy`` joins the losses of the gate: the entropies of Π and of Π with
    rows scaled to sum 1, means over the permutations (published weight: 1e-4). After the search it
    is 0.

    Args:
        gate: Any gate whose routing is not a mixture of slots.
        search: Length and temperatures of the search.
        device: Device of the permutation.
        dtype: Floating dtype of B; the relaxation is computed in float32 at least.

    Shape:
        Those of the gate; in the search weights are (..., E) without indices. ``logits`` are in the
        order of the gate until the search is over, and None with one permutation per tree.

    Raises:
        ValueError: In ``forward``, if the number of permutations does not fit the gate, or if the
            gate returns slots. In ``load_state_dict`` or the first use after another way of
            loading, if the state is of a longer search that had not ended yet.
    """

    phases: ClassVar[tuple[str, ...]] = ("search", "permuted")

    targets: Tensor

    def __init__(
        self,
        gate: Gate,
        *,
        search: PermutationSearch,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(gate.dim, gate.num_experts, device=device)
        self.gate = gate
        self.search = search
        self.couples_tokens = gate.couples_tokens
        self.renormalize = gate.renormalize
        size = (search.num_permutations, gate.num_experts)
        scores = torch.empty(*size, gate.num_experts, device=device, dtype=dtype)
        self.permutation_logits = nn.Parameter(scores)
        self.register_buffer("targets", torch.empty(size, device=device, dtype=torch.int64))
        self._reset_search()

    def reset_parameters(self) -> None:
        """Reset the gate, draw B from U(±0.05), and begin the search again."""
        self.gate.reset_parameters()
        self._reset_search()

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Number of updates after which the search is over."""
        return (self.search.num_steps - 1,)

    @property
    def tau(self) -> Tensor:
        """Temperature () of the relaxation, from the number of steps."""
        return self.search.temperature_at(self._time().to(widest_float(self.step.device)))

    @property
    def iterations(self) -> Tensor:
        """Number () of Sinkhorn iterations, from the number of steps."""
        return self.search.iterations_at(self._time())

    def advance(self, step: int) -> None:
        """Enter the phase after ``step`` updates; at the end of the search fix the permutations."""
        if step == self.boundaries[0]:
            self.targets.copy_(nearest_permutations(self._scores(), self.iterations))
        super().advance(step)

    def resume(self, step: int) -> None:
        """Enter the phase of a step count that was loaded or set, not reached by an update.

        Raises:
            ValueError: The search should be over, but its end has fixed no permutation.
        """
        if self.stage_at(step) == 1 and bool((self.targets < 0).any()):
            raise ValueError(
                f"the state is of a permutation search that had not ended after {step} steps, but"
                f" num_steps is {self.search.num_steps}; resume it with the num_steps it began with"
            )
        super().resume(step)

    def relaxed(self, *, noisy: bool = False) -> Tensor:
        """Return the relaxed permutations (Q, E, E), from B at the present temperature.

        Args:
            noisy: Whether the noise of the search is drawn.
        """
        scores = self._scores(noisy=noisy)
        if torch.compiler.is_compiling():
            return sinkhorn_in_one_op(scores, self.iterations)
        last = self.search.num_steps - 1
        return sinkhorn(scores, self.search.iterations_at(min(self.known_step + 1, last)))

    def permutations(self) -> Tensor:
        """Return the matrices Π (Q, E, E) that a call would use now, 0 and 1 outside training."""
        if self.training and self.phase == "search":
            return self.relaxed(noisy=True)
        return nn.functional.one_hot(self._targets(), self.num_experts).to(torch.float32)

    def set_permutations(self, targets: Tensor) -> None:
        """End the search with given permutations, learned elsewhere or drawn.

        Args:
            targets: For each expert of the gate the expert that it becomes: (E,), alike for all
                trees, or (Q, E), one row per permutation.

        Raises:
            GatesError: The rows are not permutations of the experts, or of another number.
        """
        num_experts = self.num_experts
        rows = targets.expand(len(self.targets), -1) if targets.ndim == 1 else targets
        ordered = torch.arange(num_experts, device=rows.device).expand(self.targets.shape)
        if rows.dtype != torch.int64 or not torch.equal(rows.sort(-1).values, ordered):
            raise GatesError(
                f"targets {tuple(targets.shape)} must be one or {len(self.targets)} permutations of"
                f" the numbers 0 to {num_experts - 1}, int64"
            )
        step = torch.tensor(self.search.num_steps - 1)  # the last of the search
        self.load_state_dict({"step": step, "targets": rows}, strict=False)

    def forward(
        self, x: Tensor, *, ids: Tensor | None = None, padding_mask: Tensor | None = None
    ) -> RoutingOutput:
        """Route every token of ``x``; see `Gate`."""
        routing: RoutingOutput = self.gate(x, ids=ids, padding_mask=padding_mask)
        if routing.dispatch is not None:
            raise ValueError("slots mix tokens: a gate that returns them cannot be permuted")
        if self.training and self.phase == "search":
            relaxed = self.relaxed(noisy=True)
            entropy = permutation_entropy(relaxed)
            selectors = self._selectors(x, routing, ids, padding_mask)
            permuted = self._mixed(routing, selectors, relaxed)
        else:
            scores = self.permutation_logits.to(routing.weights.dtype)
            entropy = 0 * scores.sum()
            permuted = self._moved(routing, x, ids, padding_mask, self._targets())
            permuted = permuted._replace(weights=permuted.weights + entropy)  # in use, for DDP
        aux = {**(routing.aux or {}), "permutation_entropy": entropy}
        return permuted._replace(aux=aux).ignore(padding_mask)

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """Return how far the search is: ``tau``, ``iterations``, and of the relaxation.

        ``row_error`` and ``column_error`` are the largest deviations of its sums from 1,
        ``hardness`` is the mean of the largest entry of its rows, 1 for a permutation.
        """
        relaxed = self.relaxed()
        return {
            "tau": float(self.tau),
            "iterations": float(self.iterations),
            "row_error": (relaxed.sum(-1) - 1).abs().max().item(),
            "column_error": (relaxed.sum(-2) - 1).abs().max().item(),
            "hardness": relaxed.amax(-1).mean().item(),
        }

    def extra_repr(self) -> str:
        """Show the sizes in ``print(gate)``."""
        return f"{super().extra_repr()}, phase={self.phase!r}"

    def _reset_search(self) -> None:
        super().reset_parameters()
        nn.init.uniform_(self.permutation_logits, -0.05, 0.05)
        self.targets.fill_(-1)  # until the search fixes them

    def _time(self) -> Tensor:
        """Return the step t () of the search, from its buffer; the last one once it is over."""
        return (self.step + 1).clamp(max=self.search.num_steps - 1)

    def _targets(self) -> Tensor:
        """Return (Q, E): the expert that each expert of the gate becomes."""
        if self.phase == "permuted" or self.targets.is_meta:
            return self.targets
        return nearest_permutations(self._scores(), self.iterations)

    def _scores(self, *, noisy: bool = False) -> Tensor:
        """Return B / τ (Q, E, E)."""
        dtype = accumulation_dtype(self.permutation_logits)
        scores = gathered(self.permutation_logits).to(dtype)
        if noisy and self.search.noise > 0:
            scores = scores - self.search.noise * torch.empty_like(scores).exponential_().log()
        return scores / self.tau

    def _selectors(
        self, x: Tensor, routing: RoutingOutput, ids: Tensor | None, padding_mask: Tensor | None
    ) -> Tensor:
        if type(self.gate).selectors is Gate.selectors:  # J = 1; a second call would draw new noise
            selectors = routing.to_dense(self.num_experts).weights.unsqueeze(-2)
        else:
            selectors = self.gate.selectors(x, ids=ids, padding_mask=padding_mask)
        if self.search.num_permutations not in (1, selectors.shape[-2]):
            raise ValueError(
                f"num_permutations is {self.search.num_permutations}, but the gate is a sum of"
                f" {selectors.shape[-2]}; give that number, or 1 to share one"
            )
        return selectors

    def _mixed(self, routing: RoutingOutput, selectors: Tensor, matrices: Tensor) -> RoutingOutput:
        if len(matrices) == 1:
            weights = linear_fp32(selectors.sum(-2), matrices[0].T)
            probs = None if routing.probs is None else linear_fp32(routing.probs, matrices[0].T)
        else:
            rows = zip(selectors.unbind(-2), matrices, strict=True)
            weights = torch.stack([linear_fp32(row, matrix.T) for row, matrix in rows]).sum(0)
        if self.renormalize:
            total = weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
            weights = weights * (selectors.sum((-2, -1)).unsqueeze(-1) / total)
        if len(matrices) > 1:
            return RoutingOutput(weights, probs=weights)
        return RoutingOutput(weights, logits=routing.logits, probs=probs)

    def _moved(
        self,
        routing: RoutingOutput,
        x: Tensor,
        ids: Tensor | None,
        padding_mask: Tensor | None,
        targets: Tensor,
    ) -> RoutingOutput:
        if len(targets) > 1:
            weights = _move(self._selectors(x, routing, ids, padding_mask), targets).sum(-2)
            return RoutingOutput(weights, probs=weights)
        logits = None if routing.logits is None else _move(routing.logits, targets[0])
        probs = None if routing.probs is None else _move(routing.probs, targets[0])
        moved = routing._replace(logits=logits, probs=probs)
        if routing.indices is None:
            return moved._replace(weights=_move(routing.weights, targets[0]))
        return moved._replace(indices=targets[0][routing.indices])


def _move(values: Tensor, targets: Tensor) -> Tensor:
    """Return the values with entry e of the last dimension at place ``targets[..., e]``."""
    return torch.zeros_like(values).scatter(-1, targets.expand(values.shape), values)
