"""Clinical size classes of polyps and the cut-offs between them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from core_gates.errors import GatesError

CLASS_NAMES = ("diminutive", "small", "large")


@dataclass(frozen=True)
class CutOffs:
    """Divide sizes into diminutive (at most ``small``), small, and large (at least ``large``).

    Args:
        small: Largest diminutive size, mm.
        large: Smallest large size, mm.

    Raises:
        ValueError: The cut-offs are not positive and ascending.
    """

    small: float
    large: float

    def __post_init__(self) -> None:
        if not 0 < self.small < self.large < np.inf:
            raise ValueError(
                f"cut-offs must be positive and ascending, got {self.small:g} and {self.large:g} mm"
            )

    def classes(self, mm: ArrayLike) -> np.ndarray:
        """Return the class of each size: 0 diminutive, 1 small, 2 large.

        Args:
            mm: Sizes of any shape.

        Returns:
            int64 of the same shape.

        Raises:
            GatesError: A size is not a number.
        """
        mm = np.asarray(mm, dtype=float)
        unknown = int(np.isnan(mm).sum())
        if unknown:
            raise GatesError(f"{unknown} of {mm.size} sizes are NaN; leave out rows without a size")
        return (mm > self.small).astype(np.int64) + (mm >= self.large)

    def __str__(self) -> str:
        return f"{self.small:g}/{self.large:g} mm"


TRUTH = CutOffs(5, 10)
"""Cut-offs of true sizes, whatever those of the predictions."""

CONTINUOUS = CutOffs(5, 10)
"""Cut-offs of predictions where true sizes are continuous, as those of the renderer."""

PUBLISHED = CutOffs(4.75, 10)
"""Cut-offs of predictions in the published evaluation of arXiv 2407.04400."""


def count_on_cut_offs(gt: ArrayLike, cut_offs: CutOffs = TRUTH) -> dict[float, int]:
    """Count the objects whose true size lies exactly on a cut-off, where noise decides the class.

    Args:
        gt: True sizes, mm.
        cut_offs: Those of the truth.

    Returns:
        Cut-off in mm -> number of objects.
    """
    gt = np.asarray(gt, dtype=float)
    return {cut: int((gt == cut).sum()) for cut in (cut_offs.small, cut_offs.large)}


def has_known_class(gt: ArrayLike, censored: ArrayLike, cut_offs: CutOffs = TRUTH) -> np.ndarray:
    """Return where the class is certain: that of a lower bound is only if it is large already."""
    return ~np.asarray(censored, dtype=bool) | (cut_offs.classes(gt) == len(CLASS_NAMES) - 1)
