"""Thresholds of proximal steps that grow in stages, each with a learning rate that starts again."""

import warnings
from collections.abc import Iterable, Sequence
from statistics import NormalDist
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from core_gates.errors import check_at_least, check_fraction, check_option
from core_gates.routing.schedules import Shape, TemperatureSchedule
from core_gates.training.proximal import ProximalStep, Rule

Growth = Literal["linear", "log-linear", "exp-linear"]
_SHAPES: dict[Growth, Shape] = {
    "linear": "linear",
    "log-linear": "logarithmic",
    "exp-linear": "exponential",
}
MOST_OF_RATE = 0.4
"""A threshold of this fraction of the learning rate is too much for a gate that learns by Adam."""


class ThresholdSchedule:
    """Shrink gates after every step of an optimizer, by a threshold that changes by stages.

    It is a `ProximalStep` whose threshold it sets: Algorithm 1 of SoRA (arXiv 2311.11696).
    The published code trains later stages with the exhausted learning rate of the first, so that
    they only prune; here each stage has its own rise and fall, see `rate`. Nothing needs to
    be called after a step. To resume, save and load its state next to that of the optimizer.

    With ``kept`` the thresholds move by feedback: before every proximal step ξ is what would leave
    that fraction of all gates at the end of the last stage if they learned nothing from here on:
    for one half, the median of their magnitudes divided by the steps to come. Gates that learn and
    come back raise it, dead ones lower it, and the last step meets the fraction, but for rounding
    to a whole number of gates. As the learning rate falls to zero, ξ grows by about its largest
    value at most. Reading the magnitudes waits for the device.

    A gate moves by about the learning rate in a step of Adam, and linear decay takes that below any
    threshold in the end: give gates their own group with a learning rate well above the threshold.
    A threshold of 0.4 of it or more warns.

    Examples:
        >>> schedule = ThresholdSchedule(optimizer, rank_gates(model), [0.0, 1e-3, 2e-3], 500)
        >>> scheduler = LambdaLR(optimizer, schedule.rate)

    Args:
        optimizer: Any optimizer.
        gates: Parameters of it that become sparse, float32 or float64.
        thresholds: ξ of each stage, see `growing`; the last one stays. With ``kept`` their
            ratios.
        stage_steps: Steps of a stage.
        warmup: Fraction of a stage in which the learning rate rises.
        rule: See `ProximalStep`.
        kept: Fraction of the gates that remain after the last stage, between 0 and 1; None for
            thresholds as they are.

    Attributes:
        num_steps: Steps that were taken.

    Raises:
        ValueError: There is no threshold, one is negative, a stage has no step, or as
            `ProximalStep`; with ``kept``, there is no gate, the last threshold is zero, or
            the rule is not ``soft``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        gates: Iterable[Tensor],
        thresholds: Sequence[float],
        stage_steps: int,
        *,
        warmup: float = 0.06,
        rule: Rule = "soft",
        kept: float | None = None,
    ) -> None:
        check_at_least(1, stage_steps=stage_steps, number_of_thresholds=len(thresholds))
        check_at_least(0, threshold=min(thresholds))
        check_fraction(warmup=warmup)
        gates = list(gates)
        self.thresholds = [float(threshold) for threshold in thresholds]
        self.stage_steps, self.warmup, self.num_steps = stage_steps, warmup, 0
        self.kept, self._gates, largest = kept, gates, max(self.thresholds)
        if kept is not None:
            if not gates or not self.thresholds[-1] or rule != "soft":
                raise ValueError(
                    f"kept needs gates, a last threshold above 0 and the rule 'soft', got"
                    f" {len(gates)}, {self.thresholds[-1]:g} and {rule!r}"
                )
            largest *= threshold_for(kept, stage_steps) / sum(self.thresholds)
            optimizer.register_step_post_hook(self._aim)  # before the proximal step
        self.proximal = ProximalStep(optimizer, gates, self.thresholds[0], rule=rule)
        optimizer.register_step_post_hook(self._count)
        _warn_of_rate(optimizer, gates, largest)

    @property
    def stage(self) -> int:
        """Number of the present stage, from 0."""
        return min(self.num_steps // self.stage_steps, len(self.thresholds) - 1)

    def rate(self, step: int) -> float:
        """Return the factor of the learning rate after ``step`` steps.

        In each stage it rises linearly, then falls linearly to zero; after the last one it is zero.
        """
        if step >= self.stage_steps * len(self.thresholds):
            return 0.0
        place, rise = step % self.stage_steps, round(self.warmup * self.stage_steps)
        if place < rise:
            return (place + 1) / rise
        return (self.stage_steps - place) / (self.stage_steps - rise)

    def state_dict(self) -> dict[str, int]:
        """Return the number of steps taken; the threshold follows from it."""
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after a number of steps."""
        self.num_steps = state["num_steps"]
        if self.kept is None:
            self.proximal.threshold = self.thresholds[self.stage]

    def _aim(self, _optimizer: Optimizer, _args: Any, _options: Any) -> None:
        """Set ξ by the gate that is the last one to be cut, and the steps to come."""
        whole = (g.full_tensor() if hasattr(g, "full_tensor") else g for g in self._gates)
        sizes = torch.cat([gate.detach().abs().flatten().cpu() for gate in whole])
        cut = len(sizes) - round((self.kept or 0.0) * len(sizes))
        current, steps = self.thresholds[self.stage], self.stage_steps
        left = max(1, steps * (self.stage + 1) - self.num_steps)  # of this stage
        ahead = left * current + steps * sum(self.thresholds[self.stage + 1 :])
        last = float(sizes.kthvalue(cut).values) if cut else 0.0
        self.proximal.threshold = last * (current / ahead)

    def _count(self, _optimizer: Optimizer, _args: Any, _options: Any) -> None:
        self.load_state_dict({"num_steps": self.num_steps + 1})


def growing(start: float, end: float, stages: int, growth: Growth = "linear") -> list[float]:
    """Return the thresholds of stages, from the first to the last one.

    Args:
        start: ξ of the first stage.
        end: ξ of the last stage.
        stages: Number of stages; a single one has ``end``.
        growth: ``linear``; ``log-linear``, the logarithm of equal steps between e^start and e^end;
            or ``exp-linear``, equal factors, for which ``start`` must be positive.

    Raises:
        ValueError: There is no stage, the growth is unknown, or its start does not fit.
    """
    check_at_least(1, stages=stages)
    check_option("growth", growth, get_args(Growth))
    if stages == 1:
        return [end]
    schedule = TemperatureSchedule(start, end, stages - 1, _SHAPES[growth])
    return [schedule(stage) for stage in range(stages)]


def threshold_for(kept: float, steps: int) -> float:
    """Return the threshold with which gates drawn from N(0, 1) keep a fraction *without learning*.

    N steps of ξ without a gradient cut what started below N ξ, so P(|g| > N ξ) of the gates remain.
    Gates that learn end above or below that: see how many are kept, and which.

    Args:
        kept: Fraction of the gates that remains, between 0 and 1.
        steps: Steps N that shrink gates.

    Raises:
        ValueError: The fraction is not between 0 and 1, or there is no step.
    """
    check_at_least(1, steps=steps)
    if not 0 < kept < 1:
        raise ValueError(f"kept must lie between 0 and 1, got {kept}")
    return NormalDist().inv_cdf(1 - kept / 2) / steps


def _warn_of_rate(optimizer: Optimizer, gates: Sequence[Tensor], threshold: float) -> None:
    """Warn where gates that learn could not stay above the threshold."""
    gate_ids = {id(gate) for gate in gates}
    rates = [
        float(group.get("initial_lr", group["lr"]))
        for group in optimizer.param_groups
        if any(id(p) in gate_ids for p in group["params"])
    ]
    if rates and threshold >= MOST_OF_RATE * min(rates):
        warnings.warn(
            f"the threshold {threshold:g} is {threshold / min(rates):.2g} times the learning"
            f" rate of the gates, {min(rates):g}: most of them only shrink; give gates a learning"
            f" rate above {threshold / MOST_OF_RATE:g}",
            stacklevel=3,
        )
