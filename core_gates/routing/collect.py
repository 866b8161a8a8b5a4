"""Gathering what the routing gates of a model return, and advancing their state."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch import distributed as dist

from core_gates.collectives import Group
from core_gates.routing.base import Gate, Listener
from core_gates.routing.output import RoutingOutput
from core_gates.routing.repeated import Gathered
from core_gates.routing.schedules import SteppedGate


def routing_gates(model: nn.Module) -> Iterator[tuple[str, Gate]]:
    """Iterate over the routing gates of a model and their qualified names.

    A model that is itself a gate is named after its class.
    """
    for name, module in model.named_modules():
        if isinstance(module, Gate):
            yield name or type(module).__name__, module


def outermost_gates(model: nn.Module) -> Iterator[tuple[str, Gate]]:
    """Iterate over the routing gates that lie in no other one, as `routing_gates` does.

    A gate around another returns what both have done, auxiliary losses included: code that counts
    routings must not count those of the inner gate again.
    """
    inside: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, Gate) and not any(name.startswith(prefix) for prefix in inside):
            inside.append(f"{name}." if name else "")
            yield name or type(module).__name__, module


class _Routings(Mapping[str, list[RoutingOutput]]):
    """Name of each gate -> what it has returned so far."""

    def __init__(self, names: Sequence[str]) -> None:
        self._gathered = {name: Gathered[RoutingOutput]() for name in names}

    def listener(self, name: str) -> "_Listener":
        return _Listener(self._gathered[name])

    def __getitem__(self, name: str) -> list[RoutingOutput]:
        return self._gathered[name].items()

    def __iter__(self) -> Iterator[str]:
        return iter(self._gathered)

    def __len__(self) -> int:
        return len(self._gathered)


class _Listener:
    def __init__(self, gathered: Gathered[RoutingOutput]) -> None:
        self._gathered = gathered

    def __call__(self, routing: RoutingOutput, padding_mask: Tensor | None) -> None:  # noqa: ARG002
        self._gathered.append(routing, routing.weights)


@contextmanager
def collect_routing(model: nn.Module) -> Iterator[Mapping[str, list[RoutingOutput]]]:
    """Gather every routing computed inside the ``with`` block, with its gradients.

    Activation checkpointing runs a forward pass twice; the second run, inside the backward pass, is
    not gathered again. (It must be non-reentrant for the gathered routings to have gradients.)

    A compiled model is compiled once more for the passes inside such blocks, whenever it was
    compiled first. Checkpointing *within* the compiled part allows no gathering and raises there:
    let the model return its routings or losses instead, as ``MoELayer`` does.

    Args:
        model: Model whose gates are listened to; any module that holds gates.

    Yields:
        Name of each outermost gate -> its routings in order, empty for one that did not run. The
        mapping stays readable after the block.
    """
    gates = dict(outermost_gates(model))
    routings = _Routings(list(gates))
    listeners: dict[str, Listener] = {name: routings.listener(name) for name in gates}
    for name, gate in gates.items():
        gate.listeners = (*gate.listeners, listeners[name])
    try:
        yield routings
    finally:
        for name, gate in gates.items():
            gate.listeners = tuple(x for x in gate.listeners if x is not listeners[name])


@torch.no_grad()
def update_gates(model: nn.Module, group: Group = None) -> None:
    """Advance the state of every routing gate by one optimizer step.

    Call it once a step, after all micro-batches and best after the optimizer. What gates have
    counted in training mode since the last call is summed over the ranks in one reduction, handed
    to `core_gates.routing.base.Gate.update` and cleared. The host waits for the device once.

    Args:
        model: Model whose gates are advanced; any module that holds gates.
        group: Ranks that hold the same gates, such as those of one pipeline stage; all ranks if
            None. Each of them must call this.

    Raises:
        ValueError: A gate that learns from its routings was not called in training mode, on any of
            the ranks, since the last update. No gate is advanced then.
    """
    gates = dict(routing_gates(model))
    learning = {name: gate for name, gate in gates.items() if gate.learns_from_routings}
    stepped = {name: gate for name, gate in gates.items() if isinstance(gate, SteppedGate)}
    counted = [cast(Tensor, gate.counted) for gate in learning.values()]
    sums = dict(zip(learning, _summed(counted, group), strict=True))
    steps = [gate.step for gate in stepped.values()]
    numbers = _on_host([*(total[0] for total in sums.values()), *steps])
    _refuse_unseen([name for name, calls in zip(learning, numbers, strict=False) if not calls])
    step_of = dict(zip(stepped, numbers[len(learning) :], strict=True))
    for name, gate in gates.items():
        step = step_of[name] + 1 if name in stepped else None
        gate.update(sums[name][1:] if name in learning else None, step)
    for total in counted:
        total.zero_()


def _summed(counted: list[Tensor], group: Group) -> list[Tensor]:
    """Return the sum over ranks of each tensor, on its device."""
    if not counted:
        return []
    total = torch.cat([tensor.to(counted[0].device) for tensor in counted])
    if dist.is_initialized():
        dist.all_reduce(total, group=group)
    parts = total.split_with_sizes([len(tensor) for tensor in counted])
    return [part.to(tensor.device) for part, tensor in zip(parts, counted, strict=True)]


def _on_host(numbers: list[Tensor]) -> list[int]:
    """Return integers () as plain numbers, with one wait for the device."""
    if not numbers:
        return []
    device = numbers[0].device
    return cast(list[int], torch.stack([number.to(device) for number in numbers]).tolist())


def _refuse_unseen(names: list[str]) -> None:
    if not names:
        return
    more = f" (nor did {len(names) - 1} more)" if len(names) > 1 else ""
    raise ValueError(
        f"gate {names[0]!r} learns from its routings, but saw none since the last update{more};"
        " run the model in training mode before update_gates, or pass only the part of it that ran"
    )


def refuse_coupled_gates(model: nn.Module, *, allow_leak: bool = False) -> None:
    """Refuse a causal model with a gate that couples tokens.

    Such a gate routes a token by those after it, too: a language model then sees in training what
    it must predict, and routes otherwise when it generates.

    Args:
        model: Model that must be causal; any module that holds gates.
        allow_leak: Whether to accept the leak.

    Raises:
        ValueError: A gate ``couples_tokens`` and the leak is not accepted.
    """
    coupled = [
        f"{name} ({type(gate).__name__})"
        for name, gate in routing_gates(model)
        if gate.couples_tokens
    ]
    if coupled and not allow_leak:
        raise ValueError(
            f"a causal model must not route by later tokens, as {', '.join(coupled)} would;"
            " take a gate that does not couple tokens (top-k, or no capacity), or pass"
            " allow_leak=True"
        )
