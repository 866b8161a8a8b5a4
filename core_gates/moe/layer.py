"""Layers of experts."""

from typing import cast

import torch
from torch import Tensor, nn

from core_gates.errors import GatesError, check_option
from core_gates.moe.checkpoint_layouts import rename_on_load
from core_gates.moe.dispatch import DISPATCHES, Dispatch, Experts, dispatch
from core_gates.routing.base import Gate
from core_gates.routing.output import RoutingOutput


class MoELayer(nn.Module):
    """Route every token to experts and add up their weighted results.

    Any routing gate goes with any way of dispatch. What the gate dropped (capacity) or ignores
    (padding) contributes nothing, so that the residual connection around the layer passes it on.

    A routing that is not finite is refused where counts reach the host anyway, on every device
    alike: by the dispatch ``capacity``, by ``ExpertParallel`` over several ranks (on all of them),
    and where dense weights become choices. Elsewhere, and inside ``torch.compile``, it shows in the
    result alone; ``GateMonitor`` counts it as ``non_finite`` under the full name of the gate.

    Inside ``torch.export`` and the transforms of ``torch.func`` (``grad``, ``vmap``, ``jvp``) the
    dispatch is ``dense``, whose shapes do not depend on the routing. The number of tokens may be
    dynamic. ``torch.jit.trace`` is refused.

    Args:
        gate: Routing gate.
        experts: Experts, normally `core_gates.moe.experts.StackedExperts`.
        dispatch: ``sorted`` (fast), ``capacity``, ``dense`` or ``loop``; the results agree.
        shared: Network from (..., D) to (..., D) that all tokens use, added to the result.
        return_routing: Whether the routing is returned too. Without, the layer takes the place of
            an MLP, and ``collect_routing`` gathers the routings.

    Shape:
        ``x`` (..., D) to the same.

    Raises:
        ValueError: The gate has another number of experts, or the dispatch is unknown.
    """

    def __init__(
        self,
        gate: Gate,
        experts: nn.Module,
        *,
        dispatch: Dispatch = "sorted",
        shared: nn.Module | None = None,
        return_routing: bool = True,
    ) -> None:
        super().__init__()
        check_option("dispatch", dispatch, DISPATCHES)
        if gate.num_experts != experts.num_experts:
            raise ValueError(
                f"the gate routes to {gate.num_experts} experts, but there are"
                f" {experts.num_experts}"
            )
        self.gate = gate
        self.experts = experts
        self.shared = shared
        self.dispatch = dispatch
        self.return_routing = return_routing
        self.register_load_state_dict_pre_hook(rename_on_load)  # type: ignore[no-untyped-call]

    def forward(
        self,
        x: Tensor,
        *,
        gate_input: Tensor | None = None,
        routing: RoutingOutput | None = None,
        ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, RoutingOutput] | Tensor:
        """Return the mixed results of the experts, and the routing unless it is not wanted.

        Args:
            x: Tokens (..., D).
            gate_input: What the gate reads (..., D'), ``x`` itself if not given.
            routing: A routing to follow (of an earlier layer, or a replay); the gate is not called.
            ids: Token or user numbers (...), for gates that route by identity.
            padding_mask: True (...) at tokens to ignore.

        Raises:
            GatesError: The routing is not finite (not with every dispatch, see the class), or the
                call is traced by ``torch.jit.trace``.
            ValueError: Shapes do not fit.
        """
        if torch.jit.is_tracing():  # type: ignore[no-untyped-call]
            raise GatesError(
                "torch.jit.trace would record the routing of this one input in"
                f" {type(self).__name__}: use torch.export.export, or torch.onnx.export with"
                " dynamo=True"
            )
        if routing is None:
            gate_input = x if gate_input is None else gate_input
            routing = cast(RoutingOutput, self.gate(gate_input, ids=ids, padding_mask=padding_mask))
        else:
            routing = routing.ignore(padding_mask)
        if padding_mask is not None:
            x = x.masked_fill(padding_mask.unsqueeze(-1), 0)  # 0 · NaN = NaN
        y = dispatch(x, routing, cast(Experts, self.experts), self.dispatch)
        if self.shared is not None:
            y = y + self.shared(x)
        return (y, routing) if self.return_routing else y

    def extra_repr(self) -> str:
        """Show the dispatch in ``print(layer)``."""
        return f"dispatch={self.dispatch}"
