"""Watching the gates of a model through hooks."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist

from core_gates.moe.experts import StackedExperts
from core_gates.monitor.activations import ActivationStatistics
from core_gates.monitor.report import GateReport
from core_gates.monitor.routings import Choices, RoutingStatistics
from core_gates.monitor.sums import split
from core_gates.monitor.values import ValueStatistics
from core_gates.routing.base import Gate
from core_gates.routing.collect import is_repeated, outermost_gates
from core_gates.routing.output import RoutingOutput

Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]
Statistics = RoutingStatistics | ValueStatistics | ActivationStatistics


class OffersGateValues(Protocol):
    """A module that is no routing gate and shows its gate to the monitor."""

    def gate_values(self, *inputs: Any, **options: Any) -> Tensor:
        """Return gate values between 0 and 1, of any shape, for the inputs of ``forward``.

        It draws no random numbers and changes nothing.
        """


class GateMonitor:
    """Measure every gate of a model on sampled steps.

    Routing gates (:class:`~core_gates.routing.base.Gate`) are measured from what they return, other
    modules that offer ``gate_values`` by one more call of it, and ``experts`` from their outputs.
    Nothing is read on the host before :meth:`compute`. Recomputation by activation checkpointing is
    not counted again.

    Example:
        >>> monitor = GateMonitor(model, every=50)
        >>> for step, batch in enumerate(batches):
        ...     monitor.begin_step(step)
        ...     train(model, batch)
        >>> monitor.compute()["layers.0.gate"]["load_cv"]

    Args:
        model: Any module that holds gates; hooks stay on it until :meth:`close`.
        every: Measure steps 0, n, 2n, …; without :meth:`begin_step` everything is measured.
        bins: Bins of the histograms over [0, 1].
        dead_share: A routed expert is dead below this part of the mean load.
        experts: Names of modules that compute experts, with their number E: ``StackedExperts`` of
            any dispatch, or outputs (..., E, D), of any shape for one expert. Their zero-activation
            rate and scale are measured, of what positions are routed to alone (of the experts in an
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
        if every < 1 or bins < 1:
            raise ValueError(f"every and bins must be at least 1, got {every} and {bins}")
        self._model = model
        self._every = every
        self._sampling = True
        self._measuring = False
        self._statistics: dict[str, Statistics] = {}
        self._totals: dict[str, Tensor] = {}
        self._choices: dict[str, list[Choices]] = {}
        self._probe: dict[str, list[Choices]] | None = None
        self._hooks = [
            module.register_forward_hook(
                self._hook(name, module, bins, dead_share), with_kwargs=True
            )
            for name, module in (*outermost_gates(model), *_value_gates(model))
        ]
        for name, num_experts in (experts or {}).items():
            hook = self._expert_hook(name, num_experts)
            module = dict(model.named_modules())[name]
            self._hooks.append(module.register_forward_hook(hook, with_kwargs=True))
        self.reset()

    def begin_step(self, step: int) -> None:
        """Say which optimizer step the next forward passes belong to."""
        self._sampling = step % self._every == 0

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Compare the routing of a fixed batch with that at the last probe: the figure ``churn``.

        Run the same batch through the model inside the ``with`` block every time, in evaluation
        mode, so that no noise of the gates counts as change. Nothing else is measured meanwhile.

        Raises:
            ValueError: The batch has another shape than at the last probe.
        """
        self._probe = {}
        try:
            yield
            probe = self._probe
        finally:
            self._probe = None
        for name, choices in probe.items():
            statistics = cast(RoutingStatistics, self._statistics[name])
            for before, after in zip(self._choices.get(name, []), choices, strict=False):
                self._add(name, statistics.changes(before, after))
        self._choices = probe

    def report(
        self, *, all_reduce: bool = False, group: dist.ProcessGroup | None = None
    ) -> GateReport:
        """Return figures and distributions since the last :meth:`reset`, to be shown or saved.

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
        """Return the figures of every gate since the last :meth:`reset`.

        Args:
            all_reduce: Whether to sum over ranks first, if there are several; then every rank must
                call.
            group: The ranks to sum over; all by default.

        Returns:
            Gate name -> figure -> value; the figures are those of
            :class:`~core_gates.monitor.routings.RoutingStatistics`,
            :class:`~core_gates.monitor.values.ValueStatistics` and
            :class:`~core_gates.monitor.activations.ActivationStatistics`.
        """
        return self.report(all_reduce=all_reduce, group=group).figures

    def histograms(
        self, *, all_reduce: bool = False, group: dist.ProcessGroup | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """Return the distributions of every gate since the last :meth:`reset`, as counts.

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
        for name, statistics in self._statistics.items():
            self._totals[name] = torch.zeros(sum(statistics.sizes.values()), dtype=torch.float64)

    def close(self) -> None:
        """Remove the hooks; what was measured stays readable."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _hook(self, name: str, module: nn.Module, bins: int, dead_share: float) -> Hook:
        if isinstance(module, Gate):
            return self._routing_hook(name, RoutingStatistics(module.num_experts, bins, dead_share))
        return self._value_hook(name, ValueStatistics(bins))

    def _routing_hook(self, name: str, statistics: RoutingStatistics) -> Hook:
        self._statistics[name] = statistics

        def hook(
            _gate: nn.Module, _inputs: Any, options: dict[str, Any], routing: RoutingOutput
        ) -> None:
            if is_repeated():
                return
            padding_mask = options.get("padding_mask")
            with torch.no_grad():
                if self._probe is not None:
                    choices = statistics.choices(routing, padding_mask)
                    self._probe.setdefault(name, []).append(choices)
                elif self._sampling:
                    self._add(name, statistics.sums(routing, padding_mask))

        return hook

    def _value_hook(self, name: str, statistics: ValueStatistics) -> Hook:
        self._statistics[name] = statistics

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

    def _expert_hook(self, name: str, num_experts: int) -> Hook:
        if name not in dict(self._model.named_modules()):
            raise ValueError(f"experts names {name!r}, which is no module of the model")
        if name in self._statistics:
            raise ValueError(f"experts names {name!r}, which is a gate; name what it mixes")
        experts = self._model.get_submodule(name)
        if isinstance(experts, StackedExperts) and experts.num_experts != num_experts:
            raise ValueError(f"{name!r} has {experts.num_experts} experts, not {num_experts}")
        statistics = ActivationStatistics(num_experts)
        self._statistics[name] = statistics

        def hook(
            module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], outputs: Tensor
        ) -> None:
            if not self._samples() or self._measuring:
                return
            with torch.no_grad():
                numbers = None
                if isinstance(module, StackedExperts):
                    numbers = module.experts_of(outputs, *inputs, **options)
                self._add(name, statistics.sums(outputs, numbers))

        return hook

    def _samples(self) -> bool:
        return self._sampling and self._probe is None and not is_repeated()

    def _add(self, name: str, sums: Tensor) -> None:
        self._totals[name] = self._totals[name].to(sums.device) + sums

    def _summed(self, all_reduce: bool, group: dist.ProcessGroup | None) -> dict[str, Tensor]:
        """Return the flat sums of every gate, on the host."""
        sizes = {name: total.numel() for name, total in self._totals.items()}
        if not sizes:
            return {}
        parameter = next(self._model.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        total = torch.cat([total.to(device) for total in self._totals.values()])
        if all_reduce and dist.is_initialized():
            dist.all_reduce(total, group=group)
        return split(total.cpu(), sizes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


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
