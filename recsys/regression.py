"""Log-normal numbers, such as play times, and the probabilities that they reach a threshold.

B rows, R regressions, H outputs of a network, T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from recsys.schema import FeatureSchema, Threshold

FURTHEST = 4.7534
"""Standard deviations up to which probabilities differ: Φ is 1e-6 away from 0 and 1."""

ERFC = (
    0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807,
    -0.18628806, 0.09678418, 0.37409196, 1.00002368, -1.26551223,
)  # fmt: skip
"""Coefficients of log erfc(x) + x² − log t in t = 1 / (1 + x / 2), the highest power first."""


class LogNormalHeads(nn.Module):
    """From the outputs of a network to the logits of all tasks, thresholds of numbers included.

    The logarithm of a number, over that of its scale s if it has one, is normal with a mean μ that
    the network gives and a trained standard deviation σ. It reaches min(factor s, most) with
    probability Φ((μ − log(min(factor s, most) / s)) / σ).

    Args:
        schema: With regressions.
        dense_names: Names of the dense inputs, in order.
        device: Device of the parameters.

    Attributes:
        spread: log σ (R,).
        scalers: (R, 3) center, factor and whether logarithms are taken, of the scales; those of the
            fitted transform once `take_scalers` is called.
    """

    scalers: Tensor

    def __init__(
        self, schema: FeatureSchema, dense_names: Sequence[str], device: Any = None
    ) -> None:
        super().__init__()
        self.regressions, self.tasks = schema.regressions, schema.tasks
        self.places = [
            dense_names.index(regression.scale) if regression.scale else None
            for regression in self.regressions
        ]
        self.spread = nn.Parameter(torch.zeros(len(self.regressions), device=device))
        start = torch.tensor([[0.0, 1.0, 0.0]] * len(self.regressions), device=device)
        self.register_buffer("scalers", start, persistent=False)

    def take_scalers(self, scalers: Mapping[str, Any]) -> None:
        """Remember how the scales were scaled, a `recsys.transform.fitting.Scaler` each."""
        for number, regression in enumerate(self.regressions):
            if regression.scale:
                values = torch.tensor([float(value) for value in scalers[regression.scale]])
                self.scalers[number] = values.to(self.scalers)

    def forward(self, outputs: Tensor, dense: Tensor) -> Tensor:
        """Return the logits (B, T) of outputs (B, H) and dense inputs (B, N)."""
        first = len(self.regressions)
        own_outputs = iter(outputs[:, first:].unbind(1))
        columns = [
            next(own_outputs)
            if task.threshold is None
            else self._logit(outputs, dense, task.threshold)
            for task in self.tasks
        ]
        return torch.stack(columns, 1)

    def numbers(self, logarithms: Tensor, dense: Tensor) -> Tensor:
        """Return numbers (B, R) of their logarithms over scales, medians for those of a network."""
        scales = [self._scale(dense, number) for number in range(len(self.regressions))]
        return logarithms[:, : len(scales)].exp() * torch.stack(scales, 1)

    def losses(self, outputs: Tensor, numbers: Tensor, weight: Tensor) -> Tensor:
        """Return the mean negative log-likelihood of each number (R,), without its constant.

        Args:
            outputs: (B, H).
            numbers: Logarithms (B, R), see `recsys.inputs.Batch`.
            weight: Of the rows (B,).
        """
        present = ~numbers.isnan()
        gaps = (outputs[:, : len(self.regressions)].float() - numbers.nan_to_num()).square()
        losses_of_rows = gaps / (2 * (2 * self.spread).exp()) + self.spread
        counted = present * weight.unsqueeze(1)
        return (counted * losses_of_rows).sum(0) / counted.sum(0).clamp(min=1e-8)

    def _logit(self, outputs: Tensor, dense: Tensor, threshold: Threshold) -> Tensor:
        number = [regression.name for regression in self.regressions].index(threshold.of)
        scale = self._scale(dense, number)
        least = log_threshold(threshold, scale).to(outputs)
        z = (outputs[:, number] - least) / self.spread[number].exp()
        return log_odds(-z if threshold.below else z)

    def _scale(self, dense: Tensor, number: int) -> Tensor:
        """Return the scale (B,) of a number, from its scaled column."""
        place = self.places[number]
        if place is None:
            return torch.ones(dense.shape[0], device=dense.device)
        center, factor, logarithmic = self.scalers[number]
        value = dense[:, place] / factor + center
        return torch.where(logarithmic > 0, value.expm1(), value).clamp(min=1e-6)


def log_odds(z: Tensor) -> Tensor:
    """Return log Φ(z) − log Φ(−z) for z up to ±4.75, as exact there as near 0, unlike a logit of Φ.

    From Chebyshev's fit of erfc, whose relative error is at most 1.2e-7 (Press et al., *Numerical
    Recipes*, second edition, section 6.2); it consists of what other runtimes know, too.
    """
    x = z.abs().clamp(max=FURTHEST) / math.sqrt(2)
    t = 1 / (1 + x / 2)
    polynomial = reduce(lambda sum_, coefficient: sum_ * t + coefficient, ERFC, torch.zeros_like(t))
    least = t.log() - x.square() + polynomial + math.log(0.5)
    return z.sign() * (torch.log1p(-least.exp()) - least)


def log_threshold(threshold: Threshold, scale: Tensor) -> Tensor:
    """Return log(min(factor s, most) / s) for scales s (B,)."""
    factor, most = threshold.ends
    return torch.clamp(most / scale, max=factor).log()
