"""Losses of sizes: weighted by size in millimeters, and one-sided for censored sizes."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from core_gates.errors import check_positive


def one_sided_error(prediction: Tensor, target: Tensor, censored: Tensor | None) -> Tensor:
    """Return ``prediction - target``, zero where a censored target is exceeded.

    A censored target is a lower bound, such as that of ``15mm-``: any larger size may be right.

    Args:
        prediction: Sizes (B,) in any increasing scale.
        target: Known sizes or lower bounds (B,) in the same scale.
        censored: Where the target is a lower bound (B,); nowhere when None.
    """
    error = prediction - target
    if censored is None:
        return error
    return torch.where(censored & (error > 0), 0, error)


def smooth_l1(error: Tensor, beta: float) -> Tensor:
    """Return ``e²/(2β)`` where |e| < β, else ``|e| - β/2``, of the shape of ``error``."""
    return F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none", beta=beta)


class CensoredSmoothL1:
    """Mean smooth L1 loss that lets predictions exceed a lower bound.

    Args:
        beta: Error at which the loss changes from square to linear.

    Raises:
        ValueError: ``beta`` is not positive.
    """

    def __init__(self, beta: float = 0.1) -> None:
        check_positive(beta=beta)
        self.beta = beta

    def __call__(
        self, prediction: Tensor, target: Tensor, censored: Tensor | None = None
    ) -> Tensor:
        """Return the mean loss of predictions (B,); see `one_sided_error`."""
        return smooth_l1(one_sided_error(prediction, target, censored), self.beta).mean()


class SizeWeightedLoss:
    """Errors with larger weights for larger polyps (arXiv 2407.04400).

    ``mean_i w(t_i) (α |e_i| + β e_i² + γ SmoothL1(e_i))`` with w = 1 for sizes t up to the first
    threshold, w₂ from the second on, w₁ between them. The published code compares thresholds in
    millimeters with sizes scaled to [-1, 1], so that its weights never apply; here ``sizes`` are
    millimeters whatever the scale of the errors is.

    Args:
        alpha: Factor of the absolute error.
        beta: Factor of the squared error.
        gamma: Factor of the smooth L1 error, whose β is 1.
        thresholds: Sizes in millimeters that separate the weights.
        weights: w₁ and w₂.
        space: Whether errors are in millimeters (``mm``) or in the scale of the network.

    Raises:
        ValueError: Thresholds do not increase, or a factor is negative, or the space is unknown.
    """

    def __init__(
        self,
        alpha: float = 0.0,
        beta: float = 0.0,
        gamma: float = 1.0,
        thresholds: tuple[float, float] = (5.0, 10.0),
        weights: tuple[float, float] = (3.0, 5.0),
        space: Literal["mm", "scaled"] = "mm",
    ) -> None:
        if not thresholds[0] < thresholds[1]:
            raise ValueError(f"thresholds must increase, got {thresholds}")
        if min(alpha, beta, gamma, *weights) < 0 or alpha + beta + gamma <= 0:
            raise ValueError(
                "alpha, beta, gamma and weights must not be negative, nor all three factors zero;"
                f" got {alpha}, {beta}, {gamma}, {weights}"
            )
        if space not in ("mm", "scaled"):
            raise ValueError(f"space is {space!r}; choose mm or scaled")
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.thresholds, self.weights, self.space = thresholds, weights, space

    def weight(self, sizes: Tensor) -> Tensor:
        """Return the weight of each size in millimeters, of the shape of ``sizes``."""
        (first, second), (middle, large) = self.thresholds, self.weights
        weights = torch.where(sizes > first, middle, 1.0)
        return torch.where(sizes >= second, large, weights).to(sizes.dtype)

    def __call__(
        self, prediction: Tensor, target: Tensor, sizes: Tensor, censored: Tensor | None = None
    ) -> Tensor:
        """Return the mean loss.

        Args:
            prediction: Predicted sizes (B,) in the scale of ``space``.
            target: True sizes (B,) in the same scale.
            sizes: True sizes (B,) in millimeters, which decide the weights.
            censored: Where the true size is a lower bound (B,).
        """
        error = one_sided_error(prediction, target, censored)
        loss = self.alpha * error.abs() + self.beta * error.square()
        loss = loss + self.gamma * smooth_l1(error, 1.0)
        return (self.weight(sizes) * loss).mean()
