"""What a sizing network is trained to return, and its conversion to millimeters."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from endoscopy.metrics.classification import TRUTH
from endoscopy.training.losses import CensoredSmoothL1, SizeWeightedLoss


class SizeTarget(ABC):
    """The scale of a network's output.

    Attributes:
        outputs: How many numbers the network returns.
    """

    outputs: int = 1

    @abstractmethod
    def encode(self, mm: Tensor) -> Tensor:
        """Convert sizes (B,) in millimeters to what the network should return (B,)."""

    @abstractmethod
    def decode(self, raw: Tensor) -> Tensor:
        """Convert raw outputs (B, outputs) to sizes (B,) in millimeters."""

    @abstractmethod
    def loss(self, raw: Tensor, mm: Tensor, censored: Tensor | None = None) -> Tensor:
        """Return the mean loss.

        Args:
            raw: Outputs of the network (B, outputs).
            mm: True sizes (B,) in millimeters.
            censored: Where the true size is a lower bound (B,); nowhere when None.
        """

    def probabilities(self, raw: Tensor) -> Tensor | None:  # noqa: ARG002
        """Return the probabilities of the size classes (B, K), or None for a regression."""
        return None


class LogSize(SizeTarget):
    """The logarithm of the size, so that errors are relative.

    ``t = log(mm / center)`` under a smooth L1 loss.

    Args:
        beta: Error at which the loss changes from square to linear.
        center_mm: Size for an output of zero.
        limits_mm: Predictions are clipped to these.

    Raises:
        ValueError: ``beta`` is not positive or the sizes do not increase.
    """

    def __init__(
        self,
        beta: float = 0.1,
        center_mm: float = 6.0,
        limits_mm: tuple[float, float] = (0.5, 60.0),
    ) -> None:
        if not 0 < limits_mm[0] < center_mm < limits_mm[1]:
            raise ValueError(f"expected 0 < low < center < high, got {limits_mm} and {center_mm}")
        self.smooth_l1 = CensoredSmoothL1(beta)
        self.center_mm, self.limits_mm = center_mm, limits_mm

    def encode(self, mm: Tensor) -> Tensor:
        """Return log(mm / center)."""
        return (mm / self.center_mm).log()

    def decode(self, raw: Tensor) -> Tensor:
        """Return center · exp(raw), clipped."""
        return (self.center_mm * _exact(raw[:, 0]).exp()).clamp(*self.limits_mm)

    def loss(self, raw: Tensor, mm: Tensor, censored: Tensor | None = None) -> Tensor:
        """Return the smooth L1 loss of the logarithm."""
        return self.smooth_l1(_exact(raw[:, 0]), self.encode(_exact(mm, raw)), censored)


class ScaledMillimeters(SizeTarget):
    """Millimeters scaled to [-1, 1] under a size-weighted loss (arXiv 2407.04400).

    ``t' = 2 (mm - 0.5) / (20 - 0.5) - 1``; predictions are clipped to 0.5 to 22 mm.

    Args:
        loss: Weighted loss, by default of errors in millimeters.
        range_mm: Sizes that map to -1 and +1.
        limits_mm: Predictions are clipped to these.

    Raises:
        ValueError: A range does not increase.
    """

    def __init__(
        self,
        loss: SizeWeightedLoss | None = None,
        range_mm: tuple[float, float] = (0.5, 20.0),
        limits_mm: tuple[float, float] = (0.5, 22.0),
    ) -> None:
        if not (range_mm[0] < range_mm[1] and limits_mm[0] < limits_mm[1]):
            raise ValueError(f"ranges must increase, got {range_mm} and {limits_mm}")
        self.weighted = loss or SizeWeightedLoss()
        self.range_mm, self.limits_mm = range_mm, limits_mm

    def encode(self, mm: Tensor) -> Tensor:
        """Return millimeters scaled to [-1, 1]."""
        low, high = self.range_mm
        return 2 * (mm - low) / (high - low) - 1

    def decode(self, raw: Tensor) -> Tensor:
        """Return millimeters, clipped."""
        return self._to_mm(_exact(raw[:, 0])).clamp(*self.limits_mm)

    def loss(self, raw: Tensor, mm: Tensor, censored: Tensor | None = None) -> Tensor:
        """Return the size-weighted loss; predictions are not clipped in it."""
        prediction = _exact(raw[:, 0])
        sizes = mm.to(prediction)
        if self.weighted.space == "mm":
            return self.weighted(self._to_mm(prediction), sizes, sizes, censored)
        return self.weighted(prediction, self.encode(sizes), sizes, censored)

    def _to_mm(self, scaled: Tensor) -> Tensor:
        low, high = self.range_mm
        return (scaled + 1) * (high - low) / 2 + low


class Ordinal(SizeTarget):
    """A chain of binary outputs: does the size exceed the next threshold, given the last one?

    ``P(size > t_k) = Π_{j ≤ k} σ(raw_j)`` (continuation ratio, as CORN: Shi et al., 2021), so that
    probabilities never increase with k. Trained by maximum likelihood. A size on a threshold is
    below it, from 10 mm on above it, as in the clinical classes: 5 mm are diminutive, 10 mm large.

    Args:
        thresholds_mm: Increasing sizes t_k.
        limits_mm: Smallest and largest size.

    Raises:
        ValueError: The sizes do not increase.
    """

    def __init__(
        self,
        thresholds_mm: Sequence[float] = (5.0, 10.0),
        limits_mm: tuple[float, float] = (0.5, 22.0),
    ) -> None:
        self.edges = _rising((limits_mm[0], *thresholds_mm, limits_mm[1]))
        self.outputs = len(thresholds_mm)

    def encode(self, mm: Tensor) -> Tensor:
        """Return the number of thresholds passed (B,), int64."""
        return _passed(mm, self.edges[1:-1])

    def decode(self, raw: Tensor) -> Tensor:
        """Return the mean size, ``∫ P(size > t) dt`` with P linear between the thresholds."""
        above = _exact(raw).sigmoid().cumprod(1)
        steps = above.new_tensor([high - low for low, high in pairwise(self.edges)])
        knots = torch.cat([torch.ones_like(above[:, :1]), above, torch.zeros_like(above[:, :1])], 1)
        return self.edges[0] + (0.5 * (knots[:, 1:] + knots[:, :-1]) * steps).sum(1)

    def loss(self, raw: Tensor, mm: Tensor, censored: Tensor | None = None) -> Tensor:
        """Return the mean negative log-likelihood; of a lower bound, that of its thresholds."""
        raw = _exact(raw)
        passed = self.encode(mm).unsqueeze(1)
        k = torch.arange(self.outputs, device=raw.device)
        stops = k == passed
        if censored is not None:
            stops = stops & ~censored.unsqueeze(1)
        log_likelihood = torch.where(k < passed, F.logsigmoid(raw), 0)
        log_likelihood = log_likelihood + torch.where(stops, F.logsigmoid(-raw), 0)
        return -log_likelihood.sum(1).mean()

    def probabilities(self, raw: Tensor) -> Tensor:
        """Return the probabilities of the classes between the thresholds (B, outputs + 1)."""
        above = _exact(raw).sigmoid().cumprod(1)
        knots = torch.cat([torch.ones_like(above[:, :1]), above, torch.zeros_like(above[:, :1])], 1)
        return knots[:, :-1] - knots[:, 1:]


class Classes(SizeTarget):
    """Size classes under a softmax; the size is the mean of the classes' typical sizes.

    Args:
        thresholds_mm: Increasing sizes between the classes; see `Ordinal` for sizes on one.
        typical_mm: Size of each class, one more than thresholds.

    Raises:
        ValueError: The sizes do not increase, or their numbers do not fit.
    """

    def __init__(
        self,
        thresholds_mm: Sequence[float] = (5.0, 10.0),
        typical_mm: Sequence[float] = (3.5, 7.0, 14.0),
    ) -> None:
        if len(typical_mm) != len(thresholds_mm) + 1:
            raise ValueError(
                f"{len(thresholds_mm)} thresholds separate {len(thresholds_mm) + 1} classes, but"
                f" typical_mm has {len(typical_mm)}"
            )
        self.thresholds_mm, self.typical_mm = _rising(thresholds_mm), _rising(typical_mm)
        self.outputs = len(typical_mm)

    def encode(self, mm: Tensor) -> Tensor:
        """Return the class (B,), int64."""
        return _passed(mm, self.thresholds_mm)

    def decode(self, raw: Tensor) -> Tensor:
        """Return the mean of the typical sizes."""
        probabilities = self.probabilities(raw)
        return probabilities @ probabilities.new_tensor(self.typical_mm)

    def loss(self, raw: Tensor, mm: Tensor, censored: Tensor | None = None) -> Tensor:
        """Return the mean cross-entropy; of a lower bound, that of all classes from its own on."""
        log_p = _exact(raw).log_softmax(1)
        encoded = self.encode(mm).unsqueeze(1)
        k = torch.arange(self.outputs, device=raw.device)
        possible = k == encoded
        if censored is not None:
            possible = possible | (censored.unsqueeze(1) & (k > encoded))
        return -torch.where(possible, log_p, -torch.inf).logsumexp(1).mean()

    def probabilities(self, raw: Tensor) -> Tensor:
        """Return the softmax (B, outputs)."""
        return _exact(raw).softmax(1)


def _exact(x: Tensor, like: Tensor | None = None) -> Tensor:
    """Return ``x`` in float32 at least, or float64 if it or ``like`` is: losses need precision."""
    return x.to(torch.promote_types((x if like is None else like).dtype, torch.float32))


def _rising(sizes: Sequence[float]) -> tuple[float, ...]:
    if not sizes or sizes[0] <= 0 or any(a >= b for a, b in pairwise(sizes)):
        raise ValueError(f"sizes must be positive and increasing, got {tuple(sizes)}")
    return tuple(sizes)


def _passed(mm: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Count the thresholds that each size (B,) passes; one of 10 mm or more is passed at once."""
    return torch.stack([mm >= t if t >= TRUTH.large else mm > t for t in thresholds]).sum(0)
