"""Layers of experts, and experts that are spawned from one."""

from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from core_gates.collectives import gathered, sharded_like
from core_gates.errors import GatesError, check_at_least, check_fraction, check_option
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
        experts: Experts, normally :class:`~core_gates.moe.experts.StackedExperts`.
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


OptimizerState = Literal["copy", "reset"]


@torch.no_grad()
def spawn_experts(
    experts: nn.Module,
    *,
    source: int = 0,
    mask_prob: float = 0.1,
    rescale: bool = False,
    noise_std: float = 0.0,
    reinit_fraction: float = 0.0,
    keep_source: bool = False,
    optimizer: Optimizer | None = None,
    optimizer_state: OptimizerState = "copy",
    generator: torch.Generator | None = None,
) -> None:
    """Replace all experts by differently perturbed copies of one, in place (Nie et al., 2021).

    Each weight of each copy is masked to zero with probability ``mask_prob``, independently; the
    variants redraw a fraction of the weights or add noise. Biases are copied as they are.

    Under FSDP every rank must call this; all get the copies of rank 0.

    Args:
        experts: Module whose every parameter stacks the experts along its first dimension: weights
            (E, …, …) and biases (E, …).
        source: The expert that is copied.
        mask_prob: Probability that a weight becomes zero (recommended: 0.1).
        rescale: Whether the weights left are divided by ``1 - mask_prob``.
        noise_std: Standard deviation of Gaussian noise on the weights, as a fraction of the
            standard deviation of the source's weights.
        reinit_fraction: Probability that a weight is drawn again, from a normal distribution with
            the standard deviation of the source's weights.
        keep_source: Whether the source itself stays as it was.
        optimizer: Optimizer of the experts, if it has run already.
        optimizer_state: ``copy`` gives every expert the moments of the source, ``reset`` forgets
            the state of all parameters of the experts.
        generator: Source of the random numbers; the global one if None. Ranks that hold copies of
            the same experts must give it the same seed.

    Raises:
        ValueError: A number is out of range, the parameters do not stack one number of experts, or
            the optimizer holds a state that cannot be copied.
    """
    experts.state_dict()  # makes FSDP shard again what a forward pass has left gathered
    parameters = dict(experts.named_parameters())
    num_experts = _num_experts(parameters)
    if not 0 <= source < num_experts:
        raise ValueError(f"source must lie between 0 and {num_experts - 1}, got {source}")
    _check(mask_prob, noise_std, reinit_fraction, optimizer_state)
    if optimizer is not None:  # first, because it may refuse
        _spawn_state(optimizer, parameters, source, optimizer_state)
    for parameter in parameters.values():
        copies = gathered(parameter)
        original = copies[source].clone()
        copies.copy_(original.expand_as(copies))
        if copies.ndim > 2:
            copies.mul_(_mask(copies, mask_prob, rescale, generator))
            _redraw(copies, original, reinit_fraction, noise_std, generator)
        if keep_source:
            copies[source] = original
        if copies is not parameter:
            parameter.copy_(sharded_like(copies, parameter))


def _mask(like: Tensor, prob: float, rescale: bool, generator: torch.Generator | None) -> Tensor:
    kept = _uniform(like, generator) >= prob
    return kept / (1 - prob) if rescale else kept


def _redraw(
    copies: Tensor,
    original: Tensor,
    fraction: float,
    noise_std: float,
    generator: torch.Generator | None,
) -> None:
    spread = original.std(correction=0)
    if fraction > 0:
        drawn = _uniform(copies, generator) < fraction
        copies.copy_(torch.where(drawn, spread * _normal(copies, generator), copies))
    if noise_std > 0:
        copies.add_(noise_std * spread * _normal(copies, generator))


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(like.shape, generator=generator, device=like.device)


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def _spawn_state(
    optimizer: Optimizer, parameters: dict[str, nn.Parameter], source: int, choice: OptimizerState
) -> None:
    if choice == "reset":
        for parameter in parameters.values():
            optimizer.state.pop(parameter, None)
        return
    moments = [
        (f"{key!r} of {name}", value, parameter.shape)
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor) and value.numel() > 1
    ]
    for name, value, shape in moments:
        if value.shape != shape:
            raise ValueError(
                f"the optimizer state {name} has shape {tuple(value.shape)}, not that of the"
                f" parameter {tuple(shape)}, and cannot be copied: choose optimizer_state='reset'"
            )
    for _, value, _ in moments:
        original = gathered(value)[source].clone()
        value.copy_(sharded_like(original.expand(value.shape), value))


def _num_experts(parameters: dict[str, nn.Parameter]) -> int:
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    sizes = {shape[:1] for shape in shapes.values()}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            "every parameter must stack the experts along its first dimension, got"
            f" {shapes or 'a module without parameters'}"
        )
    return next(iter(sizes))[0]


def _check(mask_prob: float, noise_std: float, reinit_fraction: float, state: str) -> None:
    check_fraction(mask_prob=mask_prob)
    if not 0 <= reinit_fraction <= 1:
        raise ValueError(f"reinit_fraction must lie between 0 and 1, got {reinit_fraction}")
    check_at_least(0, noise_std=noise_std)
    check_option("optimizer_state", state, get_args(OptimizerState))
