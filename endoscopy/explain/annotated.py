"""Frames with the boxes and sizes of their lesions, and a saliency map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from endoscopy.bundles.contents import SizingBundle
from endoscopy.explain.attention import attention_maps
from endoscopy.explain.overlay import overlay
from endoscopy.explain.strip import drawn_frames
from endoscopy.inference.prediction import Prediction
from endoscopy.inputs.kind import frames
from endoscopy.inputs.locations import Locator
from harness.figures.style import BLUE, ORANGE

SIDE = 480  # pixels; smaller frames are enlarged to about that
CORNERS = ["bbox_xmin", "bbox_xmax", "bbox_ymin", "bbox_ymax"]


class Mark(NamedTuple):
    """A lesion to be drawn.

    Attributes:
        box: xmin, xmax, ymin, ymax in pixels of the frame.
        text: Its size.
        warned: Whether the frame abstains.
        automatic: Whether the box comes from the segmenter.
    """

    box: tuple[float, float, float, float]
    text: str = ""
    warned: bool = False
    automatic: bool = False


def annotated_frame(
    image: np.ndarray, marks: Sequence[Mark], heat: np.ndarray | None = None
) -> np.ndarray:
    """Draw boxes and texts on a frame, over a map if there is one; small frames are enlarged.

    Args:
        image: (H, W, 3) uint8.
        marks: Lesions; boxes of the segmenter are dashed, those of frames that abstain orange.
        heat: (h, w) in [0, 1].

    Returns:
        (kH, kW, 3) uint8.
    """
    height, width = image.shape[:2]
    scale = enlargement(image)
    large = Image.fromarray(image).resize((scale * width, scale * height), Image.Resampling.BICUBIC)
    if heat is not None:
        large = Image.fromarray(overlay(np.asarray(large), heat))
    draw = ImageDraw.Draw(large)
    line = max(2, round(max(large.size) / 240))
    font = ImageFont.load_default(max(12, round(max(large.size) / 32)))
    for mark in marks:
        xmin, xmax, ymin, ymax = (round(scale * value) for value in mark.box)
        color = ORANGE if mark.warned else BLUE
        draw.rectangle((xmin - line, ymin - line, xmax + line, ymax + line), None, "white", line)
        _rectangle(draw, (xmin, ymin, xmax, ymax), color, line, dashed=mark.automatic)
        if mark.text:
            _label(draw, large.size, (xmin, ymin, ymax), mark.text, color, font)
    return np.asarray(large)


def enlargement(image: np.ndarray) -> int:
    """Return k of :func:`annotated_frame`."""
    return max(1, round(SIDE / max(image.shape[:2])))


def annotated_frames(
    prediction: Prediction,
    source: str | Path,
    locator: Locator,
    bundle: SizingBundle,
    *,
    most: int,
    skip: frozenset[str] = frozenset(),
) -> Iterator[tuple[str, np.ndarray]]:
    """Read a source again, and yield evenly spaced annotated frames.

    Args:
        prediction: Of the source.
        source: The source itself.
        locator: A new locator, equal to that of the prediction.
        bundle: The network.
        most: Maximum number of frames.
        skip: Keys of frames that are not needed.

    Yields:
        Key of the frame, and the frame (kH, kW, 3) uint8.
    """
    indices = prediction.frames["frame_index"].drop_duplicates().to_numpy()
    chosen = {int(indices[place]) for place in drawn_frames(len(indices), most)}
    trim = not bundle.scope.is_calibrated(prediction.scope)
    report = prediction.input
    for position, frame in enumerate(frames(source, max_unreadable=1.0)):
        if position == 0:
            locator.begin(report, prediction.scope)
        if frame.index not in chosen or frame.key in skip:
            continue
        part = locator.locate(frame, trim=trim)
        rows = prediction.frames[prediction.frames["frame_index"] == frame.index]
        marks = [mark_of(row, bundle, prediction.scope) for _, row in rows.iterrows()]
        heat = None
        if part.lesions:
            first = part.lesions[0].on(part.image)
            if (maps := attention_maps(bundle, [first])) is not None:
                heat = np.zeros(frame.image.shape[:2], dtype=np.float32)
                height, width = part.image.shape[:2]
                fitted = Image.fromarray(maps[0][0]).resize((width, height))
                window = (slice(part.top, part.top + height), slice(part.left, part.left + width))
                heat[window] = np.asarray(fitted)
        yield frame.key, annotated_frame(frame.image, [m for m in marks if m is not None], heat)


def mark_of(row: pd.Series, bundle: SizingBundle, scope: str | None) -> Mark | None:
    """Return how a row of a prediction is drawn, None where there is no lesion."""
    if not np.isfinite(row["predicted_mm"]):
        return None
    xmin, xmax, ymin, ymax = (float(row[name]) for name in CORNERS)
    size = float(row["predicted_mm"])
    text = bundle.scope.text(size, scope)
    if row["reasons"]:
        text = str(row["reasons"]).split("; ")[0]
    box = (xmin, xmax, ymin, ymax)
    return Mark(box, text, bool(row["reasons"]), row["location"] == "automatic")


def _rectangle(
    draw: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    color: str,
    line: int,
    *,
    dashed: bool,
) -> None:
    xmin, ymin, xmax, ymax = box
    if not dashed:
        draw.rectangle(box, None, color, line)
        return
    dash = 5 * line
    for x in range(xmin, xmax, 2 * dash):
        for y in (ymin, ymax):
            draw.line((x, y, min(x + dash, xmax), y), color, line)
    for y in range(ymin, ymax, 2 * dash):
        for x in (xmin, xmax):
            draw.line((x, y, x, min(y + dash, ymax)), color, line)


def _label(
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    place: tuple[int, int, int],
    text: str,
    color: str,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
) -> None:
    """Write a text above the box, or below it where there is no room."""
    xmin, ymin, ymax = place
    left, top, right, bottom = draw.textbbox((0, 0), text, font)
    pad = 4
    width, height = right - left + 2 * pad, bottom - top + 2 * pad
    x = int(min(max(xmin, 0), max(size[0] - width, 0)))
    y = int(ymin - height - pad if ymin > height + pad else min(ymax + pad, size[1] - height))
    draw.rectangle((x, y, x + width, y + height), fill=color)
    draw.text((x + pad - left, y + pad - top), text, "white", font)
