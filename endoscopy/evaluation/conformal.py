"""Split-conformal intervals of sizes, and the probabilities of classes that follow from them."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import beta

from core_gates.errors import GatesError
from endoscopy.metrics import TRUTH, CutOffs, flags_of, object_table

MINIMUM = 200
SHORT_TRACKS = 0.1
"""Fraction of calibration objects that may have fewer frames than usual."""


@dataclass(frozen=True)
class SplitConformal:
    """Intervals ``[p exp(-q), p exp(q)]`` around the predicted size p of an object.

    q is the ``⌈(n + 1) c⌉``-th smallest of the |log p - log t| of n calibration objects, none of
    which the model was trained on. Then the true size of an object that is exchangeable with them
    lies inside with probability c at least (Papadopoulos et al., 2002). Nothing is guaranteed
    for other objects, such as of another exposure or brand. An object that is seen on fewer frames
    than usual has the wider interval of calibration objects of which as few frames were drawn.

    Args:
        residuals: (n,) log p - log t of the calibration objects, ascending.
        coverage: Nominal coverage c.
        few_frames: (k, half width) of objects of k frames, ascending; see
            :func:`calibrate_few_frames`.
        usual_frames: Objects of as many frames or more have the half width q.

    Raises:
        ValueError: The coverage is not between 0 and 1, or more than n objects can give, or a
            number is not finite.
    """

    residuals: tuple[float, ...]
    coverage: float = 0.9
    few_frames: tuple[tuple[int, float], ...] = ()
    usual_frames: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.coverage < 1:
            raise ValueError(f"coverage must lie between 0 and 1, got {self.coverage}")
        widths = [width for _, width in self.few_frames]
        if not np.isfinite([*self.residuals, *widths]).all():
            raise ValueError("residuals and half widths must be finite")
        if self._rank > len(self.residuals):
            raise ValueError(f"{len(self.residuals)} objects cannot give {self.coverage:.0%}")

    @property
    def _rank(self) -> int:
        return int(np.ceil((len(self.residuals) + 1) * self.coverage - 1e-9))

    @property
    def half_width(self) -> float:
        """The half width q in log size."""
        return float(np.sort(np.abs(self.residuals))[self._rank - 1])

    def calibration_spread(self, level: float = 0.95) -> tuple[float, float]:
        """Return how far coverage varies below and above its mean with the calibration objects.

        Args:
            level: Fraction of calibration sets that lie between.
        """
        rank, count = self._rank, len(self.residuals)
        tail = (1 - level) / 2
        low, high = beta.ppf([tail, 1 - tail], rank, count + 1 - rank)
        mean = rank / (count + 1)
        return float(mean - low), float(high - mean)

    def interval(
        self, predicted_mm: np.ndarray, num_frames: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return lower and upper bounds, mm.

        Args:
            predicted_mm: Sizes of objects, of any shape.
            num_frames: On how many frames each object was seen; as many as usual by default.
        """
        widths = np.full(np.shape(predicted_mm), self.half_width)
        if num_frames is not None:
            for k, width in self.few_frames:
                widths = np.where(
                    (num_frames >= k) & (num_frames < self.usual_frames), width, widths
                )
        return predicted_mm / np.exp(widths), predicted_mm * np.exp(widths)

    def probabilities(self, predicted_mm: np.ndarray, cut_offs: CutOffs = TRUTH) -> np.ndarray:
        """Return the probabilities of the three classes, from the calibration residuals.

        One is added to the count of each class, so that no probability is exactly zero.

        Args:
            predicted_mm: (N,).
            cut_offs: Of the true sizes.

        Returns:
            (N, 3), rows summing to one.
        """
        log_size = np.log(predicted_mm)[:, None] - np.asarray(self.residuals)
        large = (log_size >= np.log(cut_offs.large)).sum(1)
        diminutive = (log_size <= np.log(cut_offs.small)).sum(1)
        counts = np.stack([diminutive, log_size.shape[1] - diminutive - large, large], 1) + 1.0
        return counts / counts.sum(1, keepdims=True)

    def state(self) -> dict[str, Any]:
        """Return plain numbers for a JSON file."""
        return {
            "coverage": self.coverage,
            "residuals": list(self.residuals),
            "few_frames": [list(pair) for pair in self.few_frames],
            "usual_frames": self.usual_frames,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "SplitConformal":
        """Build it from :meth:`state`."""
        return cls(
            tuple(float(value) for value in state["residuals"]),
            float(state["coverage"]),
            tuple((int(k), float(width)) for k, width in state.get("few_frames", [])),
            int(state.get("usual_frames", 1)),
        )


def calibrate(
    objects: pd.DataFrame,
    *,
    training_ids: Collection[str],
    coverage: float = 0.9,
    minimum: int = MINIMUM,
) -> SplitConformal:
    """Fit intervals to the predictions of calibration objects.

    Args:
        objects: Object table: unique_id, gt, predicted_mm, optional censored, whose lower bounds
            are left out, and abstained, whose objects are left out too.
        training_ids: Objects that the model was trained on.
        coverage: Nominal coverage.
        minimum: Smallest number of objects with a known size.

    Raises:
        GatesError: There are fewer objects, or the model was trained on some.
    """
    seen = set(objects["unique_id"]) & set(training_ids)
    if seen:
        raise GatesError(
            f"{len(seen)} of {len(objects)} calibration objects were trained on, such as"
            f" {min(map(str, seen))}; calibrate on others"
        )
    usable = np.ones(len(objects), dtype=bool)
    for column in ("censored", "abstained"):
        usable &= ~flags_of(objects, column)
    if usable.sum() < minimum:
        raise GatesError(
            f"found {usable.sum()} calibration objects with a known size, expected at least"
            f" {minimum}: hold out more objects, or report sizes without intervals"
        )
    kept = objects[usable]
    residuals = np.log(kept["predicted_mm"].to_numpy(float)) - np.log(kept["gt"].to_numpy(float))
    return SplitConformal(tuple(np.sort(residuals).tolist()), coverage)


def draw_frames(frames: pd.DataFrame, k: int) -> pd.DataFrame:
    """Return k frames of every object, or all that it has, drawn at random, the same each time."""
    drawn = frames.sample(frac=1.0, random_state=k).groupby("unique_id", sort=False).head(k)
    return drawn.sort_index()


def calibrate_few_frames(conformal: SplitConformal, frames: pd.DataFrame) -> SplitConformal:
    """Fit half widths for objects of 1, 2, 4, ... frames, as far as whole tracks are longer.

    None is narrower than one for more frames, as some would be by chance.

    Args:
        conformal: Fitted to the same objects by :func:`calibrate`.
        frames: Predictions of their frames, as for :func:`endoscopy.metrics.object_table`.
    """
    lengths = frames.groupby("unique_id").size().to_numpy()
    usual = int(np.quantile(lengths, SHORT_TRACKS, method="lower"))
    widths: list[tuple[int, float]] = []
    widest = conformal.half_width
    for k in reversed([2**i for i in range(usual.bit_length()) if 2**i < usual]):
        objects = object_table(draw_frames(frames, k))
        few = calibrate(objects, training_ids=(), coverage=conformal.coverage, minimum=0)
        widest = max(widest, few.half_width)
        widths.append((k, widest))
    return replace(conformal, few_frames=tuple(reversed(widths)), usual_frames=usual)
