"""Frames with the boxes and sizes of their lesions, and strips of the tracks of one lesion."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from core_gates.errors import GatesError
from endoscopy.bundles.sizing_bundle import NO_CALIBRATION, Scope, SizingBundle
from endoscopy.data.frame_table import BOX
from endoscopy.data.sizing_datamodule import PolypSizingDataModule
from endoscopy.evaluation.conformal import bounds
from endoscopy.explain.saliency import (
    GRAD_CAM,
    attention_figure,
    attention_maps,
    gate_figure,
    overlay,
)
from endoscopy.inputs.frame_sources import frames
from endoscopy.inputs.locations import Locator
from endoscopy.metrics import TRUTH, object_table
from endoscopy.models import gates_of
from endoscopy.prediction import Prediction
from harness.figures.style import (
    BLUE,
    GRID,
    INK,
    MUTED,
    ORANGE,
    TEXT_SIZE,
    TITLE_SIZE,
    dress,
    new_figure,
    place,
)

FRAME = 1.3  # inches
GAP = 0.07
MOST_FRAMES = 8


@dataclass(frozen=True)
class Track:
    """The frames of a lesion, in order.

    Attributes:
        images: Frames (H, W, 3) uint8; None where they are not drawn.
        boxes: (T, 4) xmin, xmax, ymin, ymax in pixels of the frames.
        sizes: (T,) in millimeters or as an index.
        reasons: Why each frame abstains; empty where it does not.
        size: Of the lesion.
        low: Lower bound of its interval, NaN without one.
        high: Upper bound.
        calibrated: Whether sizes are millimeters; else they are a size index.
        name: Of the lesion.
        truth: True size, if it is known, in the same unit.
        automatic: Whether boxes come from the segmenter.
    """

    images: Sequence[np.ndarray | None]
    boxes: np.ndarray
    sizes: np.ndarray
    reasons: Sequence[str]
    size: float
    low: float
    high: float
    calibrated: bool
    name: str
    truth: float | None = None
    automatic: bool = False

    def caption(self) -> str:
        """Return the predicted size with interval and unit, and the truth where it is known."""
        interval = f" ({self.low:.3g} to {self.high:.3g})" if np.isfinite(self.low) else ""
        if self.calibrated:
            known = "" if self.truth is None else f"true {self.truth:.1f} mm, "
            return f"{known}predicted {self.size:.1f} mm{interval}"
        return f"size index {self.size:.2f}{interval}, {NO_CALIBRATION}"


def drawn_frames(count: int, most: int = MOST_FRAMES) -> list[int]:
    """Return which of ``count`` frames a strip shows: all, or evenly spaced ones."""
    if count <= most:
        return list(range(count))
    return [round(i) for i in np.linspace(0, count - 1, most)]


def strip_figure(track: Track) -> Figure:
    """Draw up to eight frames with their boxes over the sizes of all frames.

    The line and the band are the size of the lesion and its interval. Frames that abstain are
    crossed, with their first reason below the frame.

    Raises:
        ValueError: The track is empty.
    """
    count = len(track.sizes)
    if not count:
        raise ValueError("a track needs at least one frame")
    shown = drawn_frames(count)
    width = max(0.8 + len(shown) * (FRAME + GAP) + 0.15, 6.0)
    height = FRAME + 3.15
    figure = new_figure(width, height)
    figure.text(0.2 / width, 1 - 0.24 / height, track.name, fontsize=12, fontweight="bold",
                color=INK, va="center")  # fmt: skip
    figure.text(0.2 / width, 1 - 0.5 / height, track.caption(), fontsize=TITLE_SIZE - 0.5,
                color=INK, va="center")  # fmt: skip
    for column, index in enumerate(shown):
        _frame(figure, track, index, 0.75 + column * (FRAME + GAP), height - 0.7 - FRAME)
    _sizes(figure, track, width)
    return figure


def _frame(figure: Figure, track: Track, index: int, left: float, bottom: float) -> None:
    axes = place(figure, left, bottom, FRAME, FRAME)
    image = track.images[index]
    if image is not None:
        axes.imshow(image, interpolation="nearest")
    xmin, xmax, ymin, ymax = track.boxes[index]
    color = ORANGE if track.reasons[index] else BLUE
    style = "--" if track.automatic else "-"
    box = Rectangle((xmin - 0.5, ymin - 0.5), xmax - xmin, ymax - ymin, fill=False,
                    edgecolor="white", linewidth=2.4)  # fmt: skip
    axes.add_patch(box)
    axes.add_patch(Rectangle(box.get_xy(), xmax - xmin, ymax - ymin, fill=False, edgecolor=color,
                             linewidth=1.3, linestyle=style))  # fmt: skip
    axes.set_axis_off()
    reason = track.reasons[index].split(";")[0]
    note = f"{index + 1}: {reason}" if reason else f"{index + 1}"
    axes.text(0, -0.02, note, transform=axes.transAxes, fontsize=TEXT_SIZE - 2, va="top",
              color=ORANGE if track.reasons[index] else MUTED)  # fmt: skip


def _sizes(figure: Figure, track: Track, width: float) -> None:
    axes = place(figure, 0.75, 0.75, width - 0.95, 1.3)
    frames = np.arange(1, len(track.sizes) + 1)
    abstains = np.array([bool(reason) for reason in track.reasons])
    if np.isfinite(track.low):
        axes.axhspan(track.low, track.high, color=BLUE, alpha=0.12, linewidth=0)
    axes.axhline(track.size, color=BLUE, linewidth=1.2)
    axes.plot(frames[~abstains], track.sizes[~abstains], "o", color=BLUE, markersize=4.5)
    axes.plot(frames[abstains], track.sizes[abstains], "x", color=ORANGE, markersize=5)
    if track.truth is not None:
        axes.axhline(track.truth, color=INK, linewidth=1.0, linestyle=":")
        side = "top" if track.truth < track.size else "bottom"  # away from the predicted size
        axes.annotate("true size", (1, track.truth), xycoords=("axes fraction", "data"),
                      ha="right", va=side, fontsize=TEXT_SIZE - 2, color=INK)  # fmt: skip
    dress(axes, x="frame", y="mm" if track.calibrated else "size index", grid=False)
    axes.grid(True, axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_ylim(0, 1.15 * np.nanmax([track.high, track.sizes.max(), track.truth or 0]))
    axes.set_xlim(0.5, len(track.sizes) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    where = "boxes: automatic segmentation" if track.automatic else "boxes: as given"
    crossed = "; crosses abstain" if abstains.any() else ""
    figure.text(1 - 0.2 / width, 0.16 / figure.get_figheight(), where + crossed, ha="right",
                fontsize=TEXT_SIZE - 1.5, color=MUTED, va="center")  # fmt: skip


SIDE = 480  # pixels; smaller frames are enlarged to about that


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
    """Return k of `annotated_frame`."""
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
    xmin, xmax, ymin, ymax = (float(row[name]) for name in BOX)
    text = bundle.scope.text(float(row["predicted_mm"]), scope)
    if row["reasons"]:
        text = str(row["reasons"]).split("; ")[0]
    return Mark(
        (xmin, xmax, ymin, ymax), text, bool(row["reasons"]), row["location"] == "automatic"
    )


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
        objects: From `endoscopy.prediction.objects_of`, in millimeters.
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
    return [
        _track(row, parts[row["unique_id"]], images, unit, calibrated)
        for _, row in chosen.iterrows()
    ]


def _images(source: str | Path, needed: set[int]) -> dict[int, np.ndarray]:
    image_of: dict[int, np.ndarray] = {}
    for frame in frames(source, max_unreadable=1.0):
        if frame.index in needed:
            image_of[frame.index] = frame.image
        if len(image_of) == len(needed):
            return image_of
    raise GatesError(f"{source}: has fewer frames than when it was predicted; predict again")


def _track(
    row: pd.Series,
    part: pd.DataFrame,
    images: dict[int, np.ndarray],
    unit: float,
    calibrated: bool,
) -> Track:
    return Track(
        images=[images.get(int(index)) for index in part["frame_index"]],
        boxes=part[list(BOX)].to_numpy(float),
        sizes=part["predicted_mm"].to_numpy(float) / unit,
        reasons=part["reasons"].tolist(),
        size=float(row["predicted_mm"]) / unit,
        low=float(row.get("lower_mm", np.nan)) / unit,
        high=float(row.get("upper_mm", np.nan)) / unit,
        calibrated=calibrated,
        name=str(row["unique_id"]),
        automatic=bool((part["location"] == "automatic").any()),
    )


SHOWN = 6
Captioned = tuple[Figure, str]


def picture_figures(
    frames: pd.DataFrame, bundle: SizingBundle, data: PolypSizingDataModule
) -> Iterator[Captioned]:
    """Yield strips of some test objects, an overlay and the gates.

    Args:
        frames: Predictions of the test frames.
        bundle: The network that made them.
        data: Loaded; pictures are left out where its frames cannot be read.
    """
    if gates := gates_of(bundle.model):
        scores = {name: gate.scores().detach() for name, gate in gates.items()}
        yield gate_figure(scores), "Every feature of every gate, the most open ones first."
    try:
        rows = _rows(frames, _examples(object_table(frames)), data)
        for example, of_object in rows.items():
            track = _track_figure(frames[frames["unique_id"] == example], of_object, bundle, data)
            yield strip_figure(track), "Frames of a test object with the size read from each."
        yield _overlay([of_object[0] for of_object in rows.values()], bundle, data)
    except GatesError:  # the frames were moved, or the network has neither maps nor attention
        return


def _examples(objects: pd.DataFrame) -> list[str]:
    """Return the object with the median error of each class, and the one with the largest."""
    error = (np.log(objects["predicted_mm"]) - np.log(objects["gt"])).abs()
    classes = TRUTH.classes(objects["gt"])
    chosen = []
    for k in np.unique(classes):
        ordered = objects.loc[error[classes == k].sort_values().index, "unique_id"].to_list()
        chosen += [ordered[len(ordered) // 2], ordered[-1]]
    return list(dict.fromkeys(chosen))[:SHOWN]


def _rows(
    frames: pd.DataFrame, examples: list[str], data: PolypSizingDataModule
) -> dict[str, np.ndarray]:
    table = data.load().frames
    keys = table.set_index(["unique_id", "frame_id"]).index
    rows_of = {}
    for example in examples:
        object_frames = frames[frames["unique_id"] == example]
        wanted = object_frames.set_index(["unique_id", "frame_id"]).index
        rows = np.asarray(keys.get_indexer(wanted))
        if (rows < 0).any():
            raise GatesError(f"the data has no object {example}: evaluate again")
        rows_of[example] = rows
    return rows_of


def _track_figure(
    object_frames: pd.DataFrame, rows: np.ndarray, bundle: SizingBundle, data: PolypSizingDataModule
) -> Track:
    source = data.frames()
    read = [source.sample(int(row)).frame for row in rows]
    objects = object_table(object_frames)
    low = high = float("nan")
    if bundle.conformal is not None:
        low, high = (float(bound[0]) for bound in bounds(objects, bundle.conformal))
    return Track(
        images=[frame.image for frame in read],
        boxes=np.array([frame.box for frame in read])[:, [0, 2, 1, 3]],
        sizes=object_frames["predicted_mm"].to_numpy(float),
        reasons=object_frames["reasons"].fillna("").tolist()
        if "reasons" in object_frames
        else [""] * len(object_frames),
        size=float(objects["predicted_mm"].iloc[0]),
        low=low,
        high=high,
        calibrated=True,
        name=str(object_frames["unique_id"].iloc[0]),
        truth=float(object_frames["gt"].iloc[0]),
    )


def _overlay(rows: list[int], bundle: SizingBundle, data: PolypSizingDataModule) -> Captioned:
    """Return Grad-CAM of a ResNet, or the attention roll-out of a ViT."""
    source = data.frames()
    samples = [source.sample(int(row)) for row in rows]
    attention = attention_maps(bundle, [sample.frame for sample in samples])
    if attention is None:
        raise GatesError("the network has neither maps nor attention")
    maps, name = attention
    figure = attention_figure(
        [sample.frame.image for sample in samples],
        list(maps),
        captions=[f"{sample.size_mm:.1f} mm" for sample in samples],
        title=name[0].upper() + name[1:],
    )
    return figure, (
        "Where the network sees evidence for a larger lesion."
        if name == GRAD_CAM
        else "Attention roll-out to the token that the head reads."
    )
