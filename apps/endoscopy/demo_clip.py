"""Frames dropped on the page, their boxes, and the polyp found on them."""

import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from core_gates.errors import GatesError
from endoscopy.bundles.sizing_bundle import SizingBundle
from endoscopy.data.frame_table import SYNTHETIC
from endoscopy.explain.strips import (
    Mark,
    annotated_frame,
    annotated_frames,
    enlargement,
    strip_figure,
    tracks_of,
)
from endoscopy.inputs.frame_sources import frames
from endoscopy.inputs.image_files import SourceFrame
from endoscopy.inputs.locations import Box, DrawnLocations, Locator
from endoscopy.prediction import objects_of, predict
from endoscopy.segmenter import AutomaticLocations, Segmenter
from harness.files.atomic import write_json

MOST_FRAMES = 64
NAME = "clip"


@dataclass
class Clip:
    """Frames and boxes of one visit; nothing but the frames is kept on disk.

    Attributes:
        folder: Holds the frames as ``clip/0000.bmp`` and so on.
        images: (H, W, 3) uint8.
        found: Boxes that the segmenter found, by frame.
        drawn: Boxes that were drawn, by frame.
        corner: Frame and x, y of the first corner of a box that is being drawn.
        truth: True size, if the frames are rendered.
    """

    folder: Path
    images: list[np.ndarray]
    found: dict[int, Box] = field(default_factory=dict)
    drawn: dict[int, Box] = field(default_factory=dict)
    corner: tuple[int, float, float] | None = None
    truth: float | None = None

    @property
    def source(self) -> Path:
        """The folder of the frames."""
        return self.folder / NAME

    def find(self, segmenter: Segmenter) -> None:
        """Ask the segmenter for the likeliest polyp of every frame."""
        locator = AutomaticLocations(segmenter)
        for index, image in enumerate(self.images):
            part = locator.locate(SourceFrame(image, key_of(index), index), trim=True)
            if part.lesions:
                xmin, xmax, ymin, ymax = part.lesions[0].box
                x, y = part.left, part.top
                self.found[index] = (xmin + x, xmax + x, ymin + y, ymax + y)

    def click(self, index: int, x: float, y: float) -> None:
        """Take a click on the picture of a frame as a corner of the box."""
        scale = enlargement(self.images[index])
        x, y = x / scale, y / scale
        if self.corner is None or self.corner[0] != index:
            self.corner = (index, x, y)
            return
        (left, right), (top, bottom) = sorted((self.corner[1], x)), sorted((self.corner[2], y))
        self.corner = None
        if right - left >= 1 and bottom - top >= 1:
            self.drawn[index] = (left, right, top, bottom)

    def picture(self, index: int) -> np.ndarray:
        """Return a frame marked with its first corner, its drawn box or the segmenter's, dashed."""
        image = self.images[index]
        marks = []
        if self.corner is not None and self.corner[0] == index:
            _, x, y = self.corner
            reach = max(image.shape[:2]) / 120
            marks = [Mark((x - reach, x + reach, y - reach, y + reach), "first corner")]
        elif index in self.drawn:
            marks = [Mark(self.drawn[index], "drawn")]
        elif index in self.found and not self.drawn:
            marks = [Mark(self.found[index], "automatic", automatic=True)]
        return annotated_frame(image, marks)

    def locator(self, segmenter: Segmenter) -> Locator:
        """Return drawn boxes if there are any, else the segmenter."""
        if not self.drawn:
            return AutomaticLocations(segmenter)
        return DrawnLocations({key_of(index): box for index, box in self.drawn.items()})

    def remove(self) -> None:
        """Delete the frames."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Measured(NamedTuple):
    """The result for a clip.

    Attributes:
        size: Millimeters, or a multiple of the reference of the scope.
        low: Lower bound of the interval, NaN without one.
        high: Upper bound.
        calibrated: Whether sizes are in millimeters.
        reasons: Why the polyp abstains, empty if it does not.
        frames: Number of frames that count, and of all frames with a polyp.
        origin: Where the boxes come from.
        overlay: Frame with box, size and saliency map.
        strip: Figure of the track; None for a single frame.
    """

    size: float
    low: float
    high: float
    calibrated: bool
    reasons: str
    frames: tuple[int, int]
    origin: str
    overlay: np.ndarray
    strip: Any


def read_clip(path: str | Path, root: Path) -> Clip:
    """Read a frame, a video or DICOM, of a long one at most 64 evenly spaced frames.

    Raises:
        GatesError: It cannot be read.
    """
    kept: list[np.ndarray] = []
    step = 1
    for frame in frames(path):
        if frame.index % step:
            continue
        kept.append(frame.image)
        if len(kept) > MOST_FRAMES:
            kept, step = kept[::2], 2 * step
    return _written(kept, root)


def rendered_clip(root: Path, index: int) -> Clip:
    """Render the track of a polyp whose true size is known."""
    from endoscopy.renderer.render import render_object
    from endoscopy.renderer.scene import RendererConfig

    seen = render_object(RendererConfig(seed=2026, side=64, frames=6, depth="none"), index)
    clip = _written([image.permute(1, 2, 0).numpy() for image in seen.images], root)
    write_json(clip.folder / "manifest.json", {"scope": SYNTHETIC})
    clip.truth = float(seen.scene.size)
    return clip


def measure(clip: Clip, index: int, bundle: SizingBundle, segmenter: Segmenter) -> Measured:
    """Size the polyp of a clip.

    Args:
        clip: Frames and boxes.
        index: Frame whose overlay is wanted.
        bundle: Sizing network.
        segmenter: Finds the polyp where no box is drawn.

    Raises:
        GatesError: There is no polyp.
    """
    prediction = predict(clip.source, clip.locator(segmenter), bundle, objects="source")
    table = objects_of(prediction, bundle)
    row = table.iloc[0]
    (track,) = tracks_of(prediction, table.head(1), bundle.scope, clip.source)
    sized = prediction.frames[prediction.frames["predicted_mm"].notna()]
    shown = index if (sized["frame_index"] == index).any() else int(sized["frame_index"].iloc[0])
    track_prediction = type(prediction)(
        prediction.frames[prediction.frames["frame_index"] == shown], prediction.scope,
        prediction.input, prediction.locations,
    )  # fmt: skip
    locator = clip.locator(segmenter)
    _, overlay = next(annotated_frames(track_prediction, clip.source, locator, bundle, most=1))
    return Measured(
        track.size,
        track.low,
        track.high,
        track.calibrated,
        str(row["reasons"]),
        (int(row["num_frames"]), len(sized)),
        "automatic" if track.automatic else "drawn",
        overlay,
        strip_figure(track) if len(track.sizes) > 1 else None,
    )


def key_of(index: int) -> str:
    """Return the key of a frame."""
    return f"{index:04d}"


def _written(images: list[np.ndarray], root: Path) -> Clip:
    if not images:
        raise GatesError("no frame could be read; drop an image, a video or a DICOM file")
    folder = root / uuid.uuid4().hex
    (folder / NAME).mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / NAME / f"{key_of(index)}.bmp")
    return Clip(folder, images)
