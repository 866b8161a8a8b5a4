"""Frames with their masks, depths and boxes in memory, and predictors of sizes from them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class FrameStack:
    """N frames, one lesion each.

    Args:
        images: (N, H, W, 3) uint8.
        masks: (N, H, W) boolean, the lesion.
        boxes: (N, 4) pixels xmin, ymin, xmax, ymax, maxima exclusive.
        table: N rows with unique_id, gt (mm) and whatever else is known: patient, frame_id,
            censored, columns of subgroups.
        depths: (N, H, W) distance in mm, 0 where unknown, or None.

    Raises:
        ValueError: The lengths differ or a column is missing.
    """

    images: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray
    table: pd.DataFrame
    depths: np.ndarray | None = None

    def __post_init__(self) -> None:
        lengths = {len(self.images), len(self.masks), len(self.boxes), len(self.table)}
        if self.depths is not None:
            lengths.add(len(self.depths))
        if len(lengths) > 1:
            raise ValueError(f"images, masks, boxes, depths and table have lengths {lengths}")
        missing = {"unique_id", "gt"} - set(self.table.columns)
        if missing:
            raise ValueError(f"the table of frames lacks {', '.join(sorted(missing))}")

    def __len__(self) -> int:
        return len(self.table)

    @property
    def gt(self) -> np.ndarray:
        """True sizes (N,), mm."""
        return self.table["gt"].to_numpy(float)

    @property
    def objects(self) -> np.ndarray:
        """Identity of the object of each frame (N,)."""
        return self.table["unique_id"].to_numpy()

    def take(self, rows: np.ndarray) -> "FrameStack":
        """Return the frames of these rows: positions, or a boolean (N,)."""
        depths = None if self.depths is None else self.depths[rows]
        table = self.table.iloc[np.arange(len(self))[rows]].reset_index(drop=True)
        return FrameStack(self.images[rows], self.masks[rows], self.boxes[rows], table, depths)

    def with_(self, **fields: np.ndarray | None) -> "FrameStack":
        """Return the frames with other masks, boxes or depths."""
        return replace(self, **fields)  # type: ignore[arg-type]


Predictor = Callable[[FrameStack], np.ndarray]
"""Frames -> predicted sizes (N,) in mm; it must not read the table."""


def predictions_of(predict: Predictor, frames: FrameStack) -> pd.DataFrame:
    """Return the table of frames with ``predicted_mm``.

    Raises:
        ValueError: The predictor returns another number of sizes.
    """
    sizes = np.asarray(predict(frames), dtype=float)
    if sizes.shape != (len(frames),):
        raise ValueError(f"the predictor returned {sizes.shape}, expected ({len(frames)},)")
    return frames.table.assign(predicted_mm=sizes)
