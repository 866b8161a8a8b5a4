"""``GateMonitor``: hooks that measure gates while a model trains, and its report."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch import distributed as dist

from core_gates.errors import check_at_least
from core_gates.gates.mixture import MaskedMixture, MultiGate
from core_gates.moe.experts import StackedExperts
from core_gates.moe.normed_experts import NormedExperts
from core_gates.monitor.routings import Choices, RoutingStatistics
from core_gates.monitor.values import (
    ActivationStatistics,
    MixtureStatistics,
    ValueStatistics,
    split,
)
from core_gates.numerics import widest_float
from core_gates.routing.base import Gate, Listener
from core_gates.routing.collect import outermost_gates
from core_gates.routing.output import RoutingOutput
from core_gates.routing.repeated import Gathered, accumulate, is_repeated


@dataclass(frozen=True)
class GateReport:
    """Figures and distributions of every gate.

    Attributes:
        figures: Gate name -> figure -> value.
        distributions: Gate name -> distribution -> counts.
    """

    figures: dict[str, dict[str, float]]
    distributions: dict[str, dict[str, Tensor]]

    def table(self) -> str:
        """Return Markdown tables, one for the gates of a kind, a row for every gate.

        Gates are of a kind if they have a first figure in common. A figure that a gate lacks is
        left empty.
        """
        kinds: dict[str, dict[str, dict[str, float]]] = {}
        for name, figures in self.figures.items():
            kinds.setdefault(next(iter(figures)), {})[name] = figures
        return "\n\n".join(_table(gates) for gates in kinds.values())

    def json(self) -> str:
        """Return both parts as JSON; what is not finite becomes null."""
        distributions = {
            gate: {name: counts.tolist() for name, counts in parts.items()}
            for gate, parts in self.distributions.items()
        }
        content = {"figures": self.figures, "distributions": distributions}
        return json.dumps(_finite(content), indent=2, allow_nan=False)


def _table(gates: dict[str, dict[str, float]]) -> str:
    columns = list(dict.fromkeys(column for figures in gates.values() for column in figures))
    rows = [["gate", *columns]]
    for name, figures in gates.items():
        rows.append([name, *(f"{figures[c]:.4g}" if c in figures else "" for c in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(_line(row, widths) for row in rows)


def _line(cells: list[str], widths: list[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    aligned = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
    return f"| {' | '.join(aligned)} |"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]
Statistics = RoutingStatistics | ValueStatistics | ActivationStatistics | MixtureStatistics


class GateMonitor:
    """Measure every gate of a model on sampled steps.

    Routing gates (`core_gates.routing.base.Gate`) are measured from what they return, other
    modules that offer ``gate_values`` by one more call of it, and ``experts`` from their outputs.
    Of mixtures (``MaskedMixture``, ``MultiGate``) the mean weights of all gates and experts are
    measured, too: their distribution ``matrix``, without those of residual paths.
    Nothing is read on the host before `compute`. Recomputation by activation checkpointing is
    not counted again. A compiled model is measured as well, whenever it was compiled: for steps
    that are measured, it is compiled once more.

    Examples:
        >>> monitor = GateMonitor(model, every=50)
        >>> for step, batch in enumerate(batches):
        ...     monitor.begin_step(step)
        ...     train(model, batch)
        >>> monitor.compute()["layers.0.gate"]["load_cv"]

    Args:
        model: Any module that holds gates; hooks stay on it until `close`.
        every: Measure steps 0, n, 2n, …; without `begin_step` everything is measured.
        bins: Bins of the histograms over [0, 1].
        dead_share: A routed expert is dead below this part of the mean load.
        experts: Names of modules that compute experts, with their number E: ``StackedExperts`` of
            any dispatch, or outputs (..., E, D), of any shape for one expert. Their zero-activation
            rate and scale are measured, of what tokens are routed to alone (of the experts in an
            ``ExpertParallel``, with the dispatch ``sorted`` or ``loop``).

    Raises:
        ValueError: ``every`` or ``bins`` is below 1, or ``experts`` names no module, one that is
            measured as a gate, or one of another number of experts.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 1,
        bins: int = 20,
        dead_share: float = 0.1,
        experts: Mapping[str, int] | None = None,
    ) -> None:
        check_at_least(1, every=every, bins=bins)
        self._model = model
        self._every = every
        self._sampling = True
        self._probing = False
        self._measuring = False
        self._statistics: dict[str, Statistics] = {}
        self._totals: dict[str, Tensor] = {}
        self._choices: dict[str, list[Choices]] = {}
        self._watched: list[_Watched] = []
        self._listeners: dict[str, _RoutingListener] = {}
        for name, gate in outermost_gates(model):
            statistics = RoutingStatistics(gate.num_experts, bins, dead_share)
            self._start(name, gate, statistics)
            self._listeners[name] = _RoutingListener(self, name, statistics)
            gate.listeners = (*gate.listeners, self._listeners[name])
        for name, module in _value_gates(model):
            make = self._mixture_hook if isinstance(module, MaskedMixture) else self._value_hook
            self._watched.append(_Watched(module, make(name, module, bins)))
        for name, module in model.named_modules():
            if isinstance(module, MultiGate):
                hook = self._weights_hook(name or type(module).__name__, module)
                self._watched.append(_Watched(module.get_submodule("mixed"), hook))
        for name, num_experts in (experts or {}).items():
            hook = self._expert_hook(name, num_experts)
            self._watched.append(_Watched(model.get_submodule(name), hook))

    def begin_step(self, step: int) -> None:
        """Set which optimizer step the next forward passes belong to."""
        self._sampling = step % self._every == 0

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Compare the routing of a fixed batch with that at the last probe: the figure ``churn``.

        Run the same batch through the model inside the ``with`` block every time, in evaluation
        mode, so that no noise of the gates counts as change. Nothing else is measured meanwhile.

        Raises:
            ValueError: The batch has another shape than at the last probe.
        """
        for listener in self._listeners.values():
            listener.probed = Gathered()
        self._probing = True
        try:
            yield
        finally:
            self._probing = False
        for name, listener in self._listeners.items():
            choices = listener.probed.items()
            for before, after in zip(self._choices.get(name, []), choices, strict=False):
                self._add(name, listener.statistics.changes(before, after))
            self._choices[name] = choices

    def report(
        self, *, all_reduce: bool = False, group: dist.ProcessGroup | None = None
    ) -> GateReport:
        """Return figures and distributions since the last `reset`, to be shown or saved.

        Args:
            all_reduce: Whether to sum over ranks first, if there are several; then every rank must
                call.
            group: The ranks to sum over; all by default.
        """
        totals = self._summed(all_reduce, group)
        return GateReport(
            {name: s.figures(totals[name]) for name, s in self._statistics.items()},
            {name: s.distributions(totals[name]) for name, s in self._statistics.items()},
        )

    def compute(
        self, *, all_reduce: bool = False, group: dist.ProcessGroup | None = None
    ) -> dict[str, dict[str, float]]:
        """Return the figures of every gate since the last `reset`.

        Args:
            all_reduce: Whether to sum over ranks first, if there are several; then every rank must
                call.
            group: The ranks to sum over; all by default.

        Returns:
            Gate name -> figure -> value; the figures are those of
            `core_gates.monitor.routings.RoutingStatistics`,
            `core_gates.monitor.values.ValueStatistics`,
            `core_gates.monitor.values.MixtureStatistics` and
            `core_gates.monitor.values.ActivationStatistics`.
        """
        return self.report(all_reduce=all_reduce, group=group).figures

    def histograms(
        self, *, all_reduce: bool = False, group: dist.ProcessGroup | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """Return the distributions of every gate since the last `reset`, as counts.

        Args:
            all_reduce: Whether to sum over ranks first, if there are several; then every rank must
                call.
            group: The ranks to sum over; all by default.

        Returns:
            Gate name -> distribution -> counts, those of the same classes.
        """
        return self.report(all_reduce=all_reduce, group=group).distributions

    def reset(self) -> None:
        """Forget everything measured so far, but not the last probe."""
        for total in self._totals.values():
            total.zero_()

    def close(self) -> None:
        """Stop measuring; what was measured stays readable."""
        for watched in self._watched:
            watched.release()
        self._watched.clear()
        listeners: tuple[Listener, ...] = tuple(self._listeners.values())
        for _, gate in outermost_gates(self._model):
            gate.listeners = tuple(x for x in gate.listeners if x not in listeners)

    def _start(self, name: str, module: nn.Module, statistics: Statistics) -> None:
        self._statistics[name] = statistics
        device = _device_of(module)
        size = sum(statistics.sizes.values())
        self._totals[name] = torch.zeros(size, dtype=widest_float(device), device=device)

    def _value_hook(self, name: str, module: nn.Module, bins: int) -> Hook:
        statistics = ValueStatistics(bins)
        self._start(name, module, statistics)

        def hook(module: Any, inputs: tuple[Any, ...], options: dict[str, Any], _: Any) -> None:
            if self._measuring or not self._samples():
                return
            self._measuring = True  # gate_values may run hooked modules, even this one
            try:
                with torch.no_grad():
                    self._add(name, statistics.sums(module.gate_values(*inputs, **options)))
            finally:
                self._measuring = False

        return hook

    def _mixture_hook(self, name: str, module: nn.Module, bins: int) -> Hook:
        assert isinstance(module, MaskedMixture)
        statistics = MixtureStatistics(*module.shape, ValueStatistics(bins))
        self._start(name, module, statistics)

        def hook(module: Any, inputs: tuple[Any, ...], options: dict[str, Any], _: Any) -> None:
            if not self._samples():
                return
            x = inputs[0] if inputs else options["x"]
            with torch.no_grad():
                values = module.gate_values(*inputs, **options)
                self._add(name, statistics.sums(module.weights(x, residual=False), values=values))

        return hook

    def _weights_hook(self, name: str, module: MultiGate) -> Hook:
        statistics = MixtureStatistics(*module.shape)
        self._start(name, module, statistics)

        def hook(_: nn.Module, inputs: tuple[Any, ...], *__: Any) -> None:
            if self._samples():
                with torch.no_grad():
                    self._add(name, statistics.sums(*inputs))

        return hook

    def _expert_hook(self, name: str, num_experts: int) -> Hook:
        if name not in dict(self._model.named_modules()):
            raise ValueError(f"experts names {name!r}, which is not a module of the model")
        if name in self._statistics:
            raise ValueError(f"experts names {name!r}, which is a gate; name what it mixes")
        experts = self._model.get_submodule(name)
        stacked = isinstance(experts, StackedExperts | NormedExperts)
        if stacked and experts.num_experts != num_experts:
            raise ValueError(f"{name!r} has {experts.num_experts} experts, not {num_experts}")
        statistics = ActivationStatistics(num_experts)
        self._start(name, experts, statistics)

        def hook(
            module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], outputs: Tensor
        ) -> None:
            if not self._samples() or self._measuring:
                return
            with torch.no_grad():
                numbers = None
                if isinstance(module, NormedExperts):
                    numbers = module.experts_of(outputs)
                elif isinstance(module, StackedExperts):
                    numbers = module.experts_of(outputs, *inputs, **options)
                self._add(name, statistics.sums(outputs, numbers))

        return hook

    def _samples(self) -> bool:
        if not self._sampling or self._probing:
            return False
        return torch.compiler.is_compiling() or not is_repeated()

    def _add(self, name: str, sums: Tensor) -> None:
        if self._totals[name].device != sums.device:
            self._totals[name] = self._totals[name].to(sums)
        accumulate(self._totals[name], sums)

    def _summed(self, all_reduce: bool, group: dist.ProcessGroup | None) -> dict[str, Tensor]:
        """Return the flat sums of every gate, on the host."""
        sizes = {name: total.numel() for name, total in self._totals.items()}
        if not sizes:
            return {}
        device = _device_of(self._model)
        exact = widest_float(device)
        total = torch.cat([total.to(device, exact) for total in self._totals.values()])
        if all_reduce and dist.is_initialized():
            dist.all_reduce(total, group=group)
        return split(total.cpu().double(), sizes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _RoutingListener:
    """Adds up what a routing gate returns; ``torch.compile`` traces it with the gate."""

    def __init__(self, monitor: GateMonitor, name: str, statistics: RoutingStatistics) -> None:
        self.monitor = monitor
        self.name = name
        self.statistics = statistics
        self.probed: Gathered[Choices] = Gathered()

    @torch.no_grad()
    def __call__(self, routing: RoutingOutput, padding_mask: Tensor | None) -> None:
        if not torch.compiler.is_compiling() and is_repeated():
            return
        if self.monitor._probing:
            choices = self.statistics.choices(routing, padding_mask)
            self.probed.append(choices, routing.weights)
        elif self.monitor._sampling:
            self.monitor._add(self.name, self.statistics.sums(routing, padding_mask))


class _Watched:
    """A module with a forward hook that graphs of ``torch.compile`` do not miss.

    They do not guard on hooks, but on whether ``forward`` is an attribute of the module itself,
    which therefore is set, to what it is anyway.
    """

    def __init__(self, module: nn.Module, hook: Hook) -> None:
        self._module = module
        self._hook = module.register_forward_hook(hook, with_kwargs=True)
        if "forward" not in vars(module):
            module.forward = module.forward

    def release(self) -> None:
        self._hook.remove()
        module = self._module
        ours = getattr(vars(module).get("forward"), "__func__", None) is type(module).forward
        if ours and not module._forward_hooks:  # another monitor may still need it
            del module.forward


def _device_of(module: nn.Module) -> torch.device:
    tensors = (*module.parameters(), *module.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def _value_gates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over modules that offer gate values, but not over those within another of them."""
    inside: list[str] = []
    for name, module in model.named_modules():
        offers = callable(getattr(type(module), "gate_values", None))
        if isinstance(module, Gate) or not offers:
            continue
        if not any(name.startswith(prefix) for prefix in inside):
            inside.append(f"{name}." if name else "")
            yield name or type(module).__name__, module
