"""Gathering what the routing gates of a model return, and advancing their state from it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.module_tracker import ModuleTracker

from core_gates.routing.base import Gate
from core_gates.routing.output import RoutingOutput

_hidden: ContextVar[bool] = ContextVar("hidden", default=False)


def routing_gates(model: nn.Module) -> Iterator[tuple[str, Gate]]:
    """Iterate over the routing gates of a model and their qualified names.

    A model that is itself a gate is named after its class.
    """
    for name, module in model.named_modules():
        if isinstance(module, Gate):
            yield name or type(module).__name__, module


def outermost_gates(model: nn.Module) -> Iterator[tuple[str, Gate]]:
    """Iterate over the routing gates that lie in no other one, as :func:`routing_gates` does.

    A gate around another returns what both have done, auxiliary losses included: whoever counts
    routings must not count those of the inner gate again.
    """
    inside: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, Gate) and not any(name.startswith(prefix) for prefix in inside):
            inside.append(f"{name}." if name else "")
            yield name or type(module).__name__, module


@contextmanager
def collect_routing(model: nn.Module) -> Iterator[dict[str, list[RoutingOutput]]]:
    """Gather every routing computed inside the ``with`` block, with its gradients.

    Activation checkpointing runs a forward pass twice; the second run, inside the backward pass, is
    not gathered again. (It must be non-reentrant for the gathered routings to have gradients.)

    Args:
        model: Model whose gates are listened to; any module that holds gates.

    Yields:
        Name of each outermost gate -> its routings in order, empty for one that did not run. The
        dictionary stays readable after the block.
    """
    with _listening(dict(outermost_gates(model)), _unchanged) as routings:
        yield routings


@contextmanager
def update_gates(model: nn.Module) -> Iterator[None]:
    """Advance the state of every routing gate once, at the end of the ``with`` block.

    Put all micro-batches of one optimizer step and the optimizer step itself inside. If the block
    raises, no gate is advanced. All ranks must leave the block: gates that learn from their
    routings sum over ranks there.

    Args:
        model: Model whose gates are advanced; any module that holds gates.
    """
    gates = dict(routing_gates(model))
    learning = {name: gate for name, gate in gates.items() if gate.learns_from_routings}
    with _listening(learning, _detached) as routings:
        yield
    with torch.no_grad():
        for name, gate in gates.items():
            gate.update(routings.get(name, []))


@contextmanager
def _listening(
    gates: dict[str, Gate], prepare: Callable[[RoutingOutput], RoutingOutput]
) -> Iterator[dict[str, list[RoutingOutput]]]:
    routings: dict[str, list[RoutingOutput]] = {name: [] for name in gates}

    def hook_of(gathered: list[RoutingOutput]) -> Callable[[nn.Module, Any, RoutingOutput], None]:
        def hook(_gate: nn.Module, _inputs: Any, output: RoutingOutput) -> None:
            if not is_repeated():
                gathered.append(prepare(output))

        return hook

    with ExitStack() as hooks:
        for name, gate in gates.items():
            hooks.callback(gate.register_forward_hook(hook_of(routings[name])).remove)
        yield routings


@contextmanager
def unobserved() -> Iterator[None]:
    """Hide the forward passes inside the ``with`` block from routings gathered and monitors.

    For passes over positions that another pass of the step counts, too.
    """
    token = _hidden.set(True)
    try:
        yield
    finally:
        _hidden.reset(token)


def in_backward() -> bool:
    """Tell whether the backward pass is running, where activation checkpointing recomputes."""
    return bool(ModuleTracker().is_bw)


def is_repeated() -> bool:
    """Tell whether this forward pass repeats another one, so that nothing may count it again.

    That is in the backward pass, where activation checkpointing recomputes, and in `unobserved`.
    """
    return _hidden.get() or in_backward()


def _unchanged(routing: RoutingOutput) -> RoutingOutput:
    return routing


def _detached(routing: RoutingOutput) -> RoutingOutput:
    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(item) for key, item in value.items()}
        return value.detach() if isinstance(value, Tensor) else value

    return RoutingOutput(*(cut(value) for value in routing))
