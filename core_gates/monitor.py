"""Watching the gates of a model through hooks."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch import distributed as dist

from core_gates.gates.base import Gate
from core_gates.gates.collect import in_backward
from core_gates.gates.routing import RoutingOutput
from core_gates.routing_statistics import RoutingStatistics
from core_gates.sums import split
from core_gates.value_statistics import ValueStatistics

Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]


class OffersGateValues(Protocol):
    """A module that is no routing gate and shows its gate to the monitor."""

    def gate_values(self, *inputs: Any, **options: Any) -> Tensor:
        """Return gate values between 0 and 1, of any shape, for the inputs of ``forward``.

        It draws no random numbers and changes nothing.
        """


class GateMonitor:
    """Measure every gate of a model on sampled steps.

    Routing gates (:class:`~core_gates.gates.base.Gate`) are measured from what they return, other
    modules that offer ``gate_values`` by one more call of it. Nothing is read on the host before
    :meth:`compute`. Recomputation by activation checkpointing is not counted again.

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

    Raises:
        ValueError: ``every`` or ``bins`` is below 1.
    """

    def __init__(
        self, model: nn.Module, *, every: int = 1, bins: int = 20, dead_share: float = 0.1
    ) -> None:
        if every < 1 or bins < 1:
            raise ValueError(f"every and bins must be at least 1, got {every} and {bins}")
        self._model = model
        self._every = every
        self._sampling = True
        self._measuring = False
        self._statistics: dict[str, RoutingStatistics | ValueStatistics] = {}
        self._totals: dict[str, Tensor] = {}
        self._hooks = [
            module.register_forward_hook(hook, with_kwargs=True)
            for name, module in model.named_modules()
            if (hook := self._hook(name or type(module).__name__, module, bins, dead_share))
        ]
        self.reset()

    def begin_step(self, step: int) -> None:
        """Say which optimizer step the next forward passes belong to."""
        self._sampling = step % self._every == 0

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
            :class:`~core_gates.routing_statistics.RoutingStatistics` and
            :class:`~core_gates.value_statistics.ValueStatistics`.
        """
        totals = self._summed(all_reduce, group)
        return {name: s.figures(totals[name]) for name, s in self._statistics.items()}

    def histograms(
        self, *, all_reduce: bool = False, group: dist.ProcessGroup | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """Return the distributions of every gate since the last :meth:`reset`, as counts.

        Args:
            all_reduce: Whether to sum over ranks first, if there are several; then every rank must
                call.
            group: The ranks to sum over; all by default.

        Returns:
            Gate name -> ``histogram`` of gate values or routed weights over [0, 1]; for routing
            gates also ``load`` and ``importance`` (E,) and ``active`` (E + 1,), the number of
            positions with 0, 1, … experts.
        """
        totals = self._summed(all_reduce, group)
        shown = ("histogram", "load", "importance", "active")
        return {
            name: {k: v for k, v in split(totals[name], s.sizes).items() if k in shown}
            for name, s in self._statistics.items()
        }

    def reset(self) -> None:
        """Forget everything measured so far."""
        for name, statistics in self._statistics.items():
            self._totals[name] = torch.zeros(sum(statistics.sizes.values()), dtype=torch.float64)

    def close(self) -> None:
        """Remove the hooks; what was measured stays readable."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _hook(self, name: str, module: nn.Module, bins: int, dead_share: float) -> Hook | None:
        if isinstance(module, Gate):
            return self._routing_hook(name, RoutingStatistics(module.num_experts, bins, dead_share))
        if callable(getattr(type(module), "gate_values", None)):
            return self._value_hook(name, ValueStatistics(bins))
        return None

    def _routing_hook(self, name: str, statistics: RoutingStatistics) -> Hook:
        self._statistics[name] = statistics

        def hook(
            _gate: nn.Module, _inputs: Any, options: dict[str, Any], routing: RoutingOutput
        ) -> None:
            if self._sampling and not in_backward():
                with torch.no_grad():
                    self._add(name, statistics.sums(routing, options.get("padding_mask")))

        return hook

    def _value_hook(self, name: str, statistics: ValueStatistics) -> Hook:
        self._statistics[name] = statistics

        def hook(module: Any, inputs: tuple[Any, ...], options: dict[str, Any], _: Any) -> None:
            if self._measuring or not self._sampling or in_backward():
                return
            self._measuring = True  # gate_values may run hooked modules, even this one
            try:
                with torch.no_grad():
                    self._add(name, statistics.sums(module.gate_values(*inputs, **options)))
            finally:
                self._measuring = False

        return hook

    def _add(self, name: str, sums: Tensor) -> None:
        self._totals[name] = self._totals[name].to(sums.device) + sums

    def _summed(self, all_reduce: bool, group: dist.ProcessGroup | None) -> dict[str, Tensor]:
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
