"""Split-conformal intervals of sizes, and the probabilities of classes that follow from them."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from core_gates.errors import GatesError
from endoscopy.metrics import TRUTH, CutOffs

MINIMUM = 200


@dataclass(frozen=True)
class SplitConformal:
    """Intervals ``[p exp(-q), p exp(q)]`` around the predicted size p of an object.

    q is the ``⌈(n + 1) c⌉``-th smallest of the |log p - log t| of n calibration objects, none of
    which the model was trained on. Then the true size of an object that is exchangeable with them
    lies inside with probability c at least (Papadopoulos et al., 2002). Nothing is promised for
    other objects: other exposure, brand or number of frames.

    Args:
        residuals: (n,) log p - log t of the calibration objects, ascending.
        coverage: Nominal coverage c.

    Raises:
        ValueError: The coverage is not between 0 and 1, or more than n objects can give.
    """

    residuals: tuple[float, ...]
    coverage: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.coverage < 1:
            raise ValueError(f"coverage must lie between 0 and 1, got {self.coverage}")
        if self._rank > len(self.residuals):
            raise ValueError(f"{len(self.residuals)} objects cannot give {self.coverage:.0%}")

    @property
    def _rank(self) -> int:
        return int(np.ceil((len(self.residuals) + 1) * self.coverage - 1e-9))

    @property
    def half_width(self) -> float:
        """The half width q in log size."""
        return float(np.sort(np.abs(self.residuals))[self._rank - 1])

    def interval(self, predicted_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return lower and upper bounds, mm, of predicted sizes of any shape."""
        factor = np.exp(self.half_width)
        return predicted_mm / factor, predicted_mm * factor

    def probabilities(self, predicted_mm: np.ndarray, cut_offs: CutOffs = TRUTH) -> np.ndarray:
        """Return the chances of the three classes, as if the calibration residuals were drawn.

        The counts have one added to each class, so that no chance is exactly zero.

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
        return {"coverage": self.coverage, "residuals": list(self.residuals)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "SplitConformal":
        """Build it from :meth:`state`."""
        return cls(tuple(float(value) for value in state["residuals"]), float(state["coverage"]))


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
        minimum: Least number of objects with a known size.

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
        if column in objects:
            usable &= ~objects[column].to_numpy(dtype=bool)
    if usable.sum() < minimum:
        raise GatesError(
            f"found {usable.sum()} calibration objects with a known size, expected at least"
            f" {minimum}: hold out more objects, or report sizes without intervals"
        )
    kept = objects[usable]
    residuals = np.log(kept["predicted_mm"].to_numpy(float)) - np.log(kept["gt"].to_numpy(float))
    return SplitConformal(tuple(np.sort(residuals).tolist()), coverage)
