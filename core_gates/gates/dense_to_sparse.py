"""The dense-to-sparse gate of EvoMoE."""

from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from core_gates.errors import check_option
from core_gates.numerics import accumulation_dtype, linear_fp32, lowest_index_top_k
from core_gates.routing.losses import mean_over_positions
from core_gates.routing.output import RoutingOutput
from core_gates.routing.schedules import StagedGate, StagedSchedule

Combine = Literal["gumbel", "softmax"]


class DenseToSparseGate(StagedGate):
    """Start with all experts and end with one, by a Gumbel-softmax that cools (Nie et al., 2021).

    With logits h = x W and Gumbel noise ζ, drawn in training only, ``p = softmax((h + ζ) / τ)``.

    - Phase ``shared``: every token uses expert 0 with weight 1.
    - Phase ``annealing``: experts with p above the threshold c are used. Their weights are p, or
      those of softmax(h), depending on ``combine``; they are not scaled to sum 1.
    - Phase ``hard``: the expert with the largest h + ζ alone is used, with that same weight.

    Evaluation goes by the phase too. Phase and temperature follow ``stages``, one step per
    `update`; at the end of the phase ``shared`` the training spawns the experts, by
    `core_gates.moe.spawn.advance_gates` or itself. The loss ``balance`` is
    ``E Σ_e mean_t(weight) mean_t(is used)``: E if all experts are used equally, 1 if one per
    token is; its gradient goes through the weights only.

    Args:
        dim: Features of a token.
        num_experts: Number of experts.
        stages: Lengths of the phases, and the temperature.
        threshold: c, below 1/E.
        combine: ``gumbel`` weighs by p, ``softmax`` by softmax(h).
        device: Device of the parameters and buffers.
        dtype: Floating dtype of the parameters; τ is kept in float32 at least.

    Shape:
        ``x`` (..., D); probs and logits (..., E), ``probs`` being p; weights (..., E) while
        annealing, else weights and indices (..., 1).

    Raises:
        ValueError: The threshold is out of range or ``combine`` is unknown.
    """

    phases: ClassVar[tuple[str, ...]] = ("shared", "annealing", "hard")

    tau: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        stages: StagedSchedule = StagedSchedule(),  # noqa: B008 (frozen)
        threshold: float = 0.001,
        combine: Combine = "gumbel",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_experts, device=device)
        if not 0 <= threshold < 1 / num_experts:
            raise ValueError(
                f"threshold must lie between 0 and 1/num_experts={1 / num_experts:.3g}, which is"
                f" excluded as it could close every expert; got {threshold}"
            )
        check_option("combine", combine, get_args(Combine))
        self.stages = stages
        self.threshold = threshold
        self.combine = combine
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        exact = accumulation_dtype(self.weight)
        self.register_buffer("tau", torch.empty((), device=device, dtype=exact))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero the weight, so that experts start alike, and return to the first phase."""
        super().reset_parameters()
        nn.init.zeros_(self.weight)
        self.tau.fill_(self.stages.temperature_at(0))

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Numbers of updates after which the next of the ``phases`` begins."""
        return self.stages.boundaries

    def forward(
        self,
        x: Tensor,
        *,
        ids: Tensor | None = None,  # noqa: ARG002
        padding_mask: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> RoutingOutput:
        """Route every token of ``x``; see `Gate`.

        Args:
            x: Routing input (..., D).
            ids: Not used.
            padding_mask: True (...) at tokens to ignore.
            noise: ζ (..., E); drawn in training if None.
        """
        logits = linear_fp32(x, self.weight, padding_mask=padding_mask)
        if noise is None and self.training and self.phase != "shared":
            noise = -torch.empty_like(logits).exponential_().log()
        routing = self.route(logits, noise).ignore(padding_mask)
        used = routing.chosen(self.num_experts, dropped=False)
        weights = routing.to_dense(self.num_experts).weights
        mean_weight, mean_use = (
            mean_over_positions(t, padding_mask=padding_mask) for t in (weights, used)
        )
        balance = self.num_experts * (mean_weight * mean_use).sum()
        return routing._replace(aux={"balance": balance})

    def route(self, logits: Tensor, noise: Tensor | None = None) -> RoutingOutput:
        """Return the routing of given logits in the present phase, without losses.

        Args:
            logits: h (..., E).
            noise: ζ (..., E), or None for none.
        """
        scores = logits if noise is None else logits + noise
        probs = (scores / self.tau).softmax(-1)
        phase = self.phase
        if phase == "shared":
            first = torch.ones_like(logits[..., :1]) + 0 * logits[..., :1]  # the gate stays in use
            return RoutingOutput(first, torch.zeros_like(first).long(), logits=logits, probs=probs)
        weights = probs if self.combine == "gumbel" else logits.softmax(-1)
        if phase == "annealing":
            weights = weights.masked_fill(probs <= self.threshold, 0)
            return RoutingOutput(weights, logits=logits, probs=probs)
        _, best = lowest_index_top_k(scores, 1)
        return RoutingOutput(weights.gather(-1, best), best, logits=logits, probs=probs)

    def advance(self, step: int) -> None:
        """Enter the phase after ``step`` updates and set its temperature."""
        super().advance(step)
        self.tau.fill_(self.stages.temperature_at(step))

    def extra_repr(self) -> str:
        """Show the sizes in ``print(gate)``."""
        return f"{super().extra_repr()}, phase={self.phase!r}, combine={self.combine!r}"
