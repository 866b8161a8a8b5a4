"""Tracks of a prediction, with the frames that their strips show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from core_gates.errors import GatesError
from endoscopy.bundles.scope import Scope
from endoscopy.explain.strip import Track, drawn_frames
from endoscopy.inference.prediction import Prediction
from endoscopy.inputs.kind import frames


def tracks_of(
    prediction: Prediction,
    objects: pd.DataFrame,
    scope: Scope,
    source: str | Path,
    *,
    most: int = 12,
) -> list[Track]:
    """Read the frames that strips need again, and return a track for each object.

    Args:
        prediction: Of the source.
        objects: From :func:`endoscopy.inference.prediction.objects_of`, in millimeters.
        scope: Of the model; sizes become an index where it is not calibrated for the source.
        source: The source itself.
        most: Maximum number of objects; those with the most frames come first.

    Raises:
        GatesError: The source cannot be read again.
    """
    chosen = objects.sort_values("num_frames", ascending=False, kind="stable").head(most)
    sized = prediction.frames[prediction.frames["predicted_mm"].notna()]
    parts = {name: sized[sized["unique_id"] == name] for name in chosen["unique_id"]}
    needed = {
        int(part["frame_index"].iloc[place])
        for part in parts.values()
        for place in drawn_frames(len(part))
    }
    images = _images(source, needed)
    calibrated = scope.is_calibrated(prediction.scope)
    unit = 1.0 if calibrated else scope.reference_mm
    rows = (row for _, row in chosen.iterrows())
    return [_track(row, parts[row["unique_id"]], images, unit, calibrated) for row in rows]


def _images(source: str | Path, needed: set[int]) -> dict[int, np.ndarray]:
    found: dict[int, np.ndarray] = {}
    for frame in frames(source, max_unreadable=1.0):
        if frame.index in needed:
            found[frame.index] = frame.image
        if len(found) == len(needed):
            return found
    raise GatesError(f"{source}: has fewer frames than when it was predicted; predict again")


def _track(
    row: pd.Series,
    part: pd.DataFrame,
    images: dict[int, np.ndarray],
    unit: float,
    calibrated: bool,
) -> Track:
    corners = ["bbox_xmin", "bbox_xmax", "bbox_ymin", "bbox_ymax"]
    return Track(
        images=[images.get(int(index)) for index in part["frame_index"]],
        boxes=part[corners].to_numpy(float),
        sizes=part["predicted_mm"].to_numpy(float) / unit,
        reasons=part["reasons"].tolist(),
        size=float(row["predicted_mm"]) / unit,
        low=float(row.get("lower_mm", np.nan)) / unit,
        high=float(row.get("upper_mm", np.nan)) / unit,
        calibrated=calibrated,
        name=str(row["unique_id"]),
        automatic=bool((part["location"] == "automatic").any()),
    )
