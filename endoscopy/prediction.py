"""Sizes of the lesions on the frames of a source, equal for every container, or in memory."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from core_gates.errors import GatesError
from endoscopy.bundles.bundle_fitting import BATCH, CARRIED
from endoscopy.bundles.frame_quality import frame_statistics, stacked
from endoscopy.bundles.sizing_bundle import SizingBundle, source_scope
from endoscopy.data.images import Frame, resize_frame
from endoscopy.data.readers.tabular import ReadReport
from endoscopy.data.samples import LesionDataset
from endoscopy.data.sizing_datamodule import Part, PolypSizingDataModule
from endoscopy.data.streams import Outline, check_streams, outline_of
from endoscopy.evaluation.conformal import crossed
from endoscopy.evaluation.rendered_frames import FrameStack, Predictor
from endoscopy.inputs.frame_sources import frames
from endoscopy.inputs.image_files import InputReport, SourceFrame
from endoscopy.inputs.locations import Lesion, Located, Locator
from endoscopy.metrics.classification import CLASS_NAMES
from endoscopy.metrics.size_errors import PROBABILITIES, Level, object_table
from endoscopy.segmenter import NO_POLYP

Objects = Literal["auto", "frame", "source"]
NOTHING = Lesion((math.nan, math.nan, math.nan, math.nan))
"""Stands for the lesion of a frame on which the segmenter finds none."""


@dataclass
class Prediction:
    """Sizes on a source.

    Attributes:
        frames: One row for each lesion on each frame, and one for each frame in which the
            segmenter finds none: unique_id, frame_id, frame_index; bbox_xmin, bbox_xmax,
            bbox_ymin, bbox_ymax in pixels of the frame; left, top, width, height of its part
            without padding; location, predicted_mm, sharpness, reasons (why the frame abstains,
            separated by "; "), and p_* of a network of classes.
        scope: Scope of the source, None if unknown.
        input: Counts of the frames.
        locations: Counts of the locations.
    """

    frames: pd.DataFrame
    scope: str | None
    input: InputReport
    locations: ReadReport


class _Item(NamedTuple):
    """A lesion, ready for the network; without a frame if there is none."""

    row: dict[str, Any]
    frame: Frame | None


def predict(
    source: str | Path,
    locator: Locator,
    bundle: SizingBundle,
    *,
    scope: str | None = None,
    objects: Objects = "auto",
    batch_size: int = 32,
    max_unreadable: float = 0.01,
    progress: Callable[[int, int | None], None] | None = None,
) -> Prediction:
    """Predict the size of every lesion that is located on the frames of a source.

    Frames are decoded, located and sized in batches; only one batch is in memory.

    Args:
        source: Folder or zip archive of images, image, video, or DICOM.
        locator: Finds the lesions.
        bundle: Trained network.
        scope: Scope of the source as the user states it, see
            `endoscopy.bundles.sizing_bundle.source_scope`.
        objects: Identity of unnamed lesions: ``frame``, another one on every frame; ``source``, the
            same on all frames; ``auto``, the latter in videos and DICOM.
        batch_size: Lesions at a time.
        max_unreadable: Fraction of frames that may be unreadable.
        progress: Called with the numbers of frames read and expected.

    Raises:
        GatesError: In one line, if the source or its locations cannot be used, or the network
            reads depths, which a source does not have.
    """
    check_streams(bundle.streams, has_depth=False)
    named = source_scope(source, scope)
    report = InputReport()
    read = frames(source, report, max_unreadable=max_unreadable)
    items = _items(read, report, locator, bundle, objects, named, progress)
    rows: list[dict[str, Any]] = []
    while batch := list(itertools.islice(items, batch_size)):
        rows += _sized(batch, bundle)
    locator.finish(report)
    if not rows:
        left_out = ", ".join(locator.report.reasons("excluded"))
        why = f"left out {left_out}; correct them" if left_out else "it has none for them"
        raise GatesError(
            f"{report.source}: no lesion on any of {report.read} frames; {locator.path}: {why}"
        )
    return Prediction(pd.DataFrame(rows), named, report, locator.report)


def objects_of(
    prediction: Prediction, bundle: SizingBundle, level: Level = "median"
) -> pd.DataFrame:
    """Return one row per object: its size, and its interval by the network.

    Frames without a polyp do not count, and frames that abstain only where all of an object do.

    Returns:
        Columns of `endoscopy.metrics.object_table`, and ``size_class``; ``lower_mm`` and
        ``upper_mm``, NaN where the error of such sizes is unknown: lesions located in a way for
        which the network has no intervals, sources out of its scope, objects that abstain;
        ``interval_crosses``, the cut-offs of the classes inside the interval, such as
        ``5 and 10 mm``; ``p_diminutive``, ``p_small`` and ``p_large`` where there are intervals, or
        the network returns them.

    Raises:
        GatesError: No frame shows a polyp.
    """
    sized = prediction.frames[prediction.frames["predicted_mm"].notna()]
    if sized.empty:
        raise GatesError(
            f"{prediction.input.source}: {NO_POLYP} on any of {prediction.input.read} frames; give "
            "boxes or masks"
        )
    table = object_table(sized.assign(gt=np.nan), level).drop(columns=["gt"])
    sizes = table["predicted_mm"].to_numpy(float)
    classes = np.array(CLASS_NAMES)[bundle.cut_offs.classes(sizes)]
    table = table.assign(lower_mm=np.nan, upper_mm=np.nan, size_class=classes, interval_crosses="")
    conformal = bundle.intervals.get(str(table["location"].iloc[0]))  # type: ignore[call-overload]
    if conformal is None or not bundle.scope.is_calibrated(prediction.scope):
        return table
    rows = ~table["abstained"].to_numpy(dtype=bool)
    lower, upper = conformal.interval(sizes[rows], table["num_frames"].to_numpy()[rows])
    table.loc[rows, ["lower_mm", "upper_mm"]] = np.stack([lower, upper], 1)
    table.loc[rows, "interval_crosses"] = crossed(lower, upper)
    if not set(PROBABILITIES) <= set(table):
        table.loc[rows, list(PROBABILITIES)] = conformal.probabilities(sizes[rows])
    return table


def _items(
    read: Iterable[SourceFrame],
    report: InputReport,
    locator: Locator,
    bundle: SizingBundle,
    objects: Objects,
    scope: str | None,
    progress: Callable[[int, int | None], None] | None,
) -> Iterator[_Item]:
    trim = not bundle.scope.is_calibrated(scope)  # calibrated frames are like those of training
    for position, frame in enumerate(read):
        if position == 0:
            locator.begin(report, scope)
        part = locator.locate(frame, trim=trim)
        if progress is not None:
            progress(report.read, report.expected)
        missed = [NOTHING] if locator.origin == "automatic" else []
        for number, lesion in enumerate(part.lesions or missed):
            identity = lesion.name or _identity(frame, report, objects, number)
            shown = None
            if lesion is not NOTHING:
                shown = resize_frame(lesion.on(part.image), bundle.image_size)
            yield _Item(_row(frame, part, lesion, identity, locator.origin), shown)


def _identity(frame: SourceFrame, report: InputReport, objects: Objects, number: int) -> str:
    if objects == "auto":
        objects = "frame" if report.kind == "images" else "source"
    base = frame.key if objects == "frame" else report.source
    return f"{base}:{number + 1}" if number else base


def _row(
    frame: SourceFrame, part: Located, lesion: Lesion, identity: str, origin: str
) -> dict[str, Any]:
    xmin, xmax, ymin, ymax = lesion.box
    return {
        "unique_id": identity,
        "frame_id": frame.key,
        "frame_index": frame.index,
        "bbox_xmin": xmin + part.left,
        "bbox_xmax": xmax + part.left,
        "bbox_ymin": ymin + part.top,
        "bbox_ymax": ymax + part.top,
        "left": part.left,
        "top": part.top,
        "width": part.image.shape[1],
        "height": part.image.shape[0],
        "location": origin,
    }


def _sized(items: list[_Item], bundle: SizingBundle) -> list[dict[str, Any]]:
    """Return the rows of a batch with its sizes."""
    rows = [item.row for item in items]
    for row in rows:
        row |= {"predicted_mm": np.nan, "sharpness": np.nan, "reasons": NO_POLYP}
    frame_of = {i: item.frame for i, item in enumerate(items) if item.frame is not None}
    if not frame_of:
        return rows
    shown = list(frame_of.values())
    raw = bundle.raw(shown)
    sizes, probabilities = bundle.target.decode(raw).numpy(), bundle.target.probabilities(raw)
    measured = frame_statistics(*stacked(shown))
    reasons = bundle.quality.reasons(measured) if bundle.quality else [""] * len(shown)
    for place, i in enumerate(frame_of):
        rows[i] |= {
            "predicted_mm": float(sizes[place]),
            "sharpness": float(measured["sharpness"][place]),
            "reasons": reasons[place],
        }
        if probabilities is not None and probabilities.shape[1] == len(PROBABILITIES):
            rows[i] |= dict(zip(PROBABILITIES, probabilities[place].tolist(), strict=True))
    return rows


def frames_of(source: LesionDataset, rows: np.ndarray, outline: Outline = "mask") -> FrameStack:
    """Read some rows of a frame table into memory; there are depths only if all rows have one.

    Args:
        source: Lesions by row.
        rows: Which.
        outline: How frames without a mask are outlined, see
            `endoscopy.data.streams.outline_of`.
    """
    read = [source.sample(int(row)).frame for row in rows]
    depths = [frame.depth for frame in read if frame.depth is not None]
    table = source.reader.table.frames
    return FrameStack(
        images=np.stack([frame.image for frame in read]),
        masks=np.stack([outline_of(frame, outline) > 0 for frame in read]),
        boxes=np.array([frame.box for frame in read], dtype=float).reshape(-1, 4),
        table=table.loc[rows, [c for c in CARRIED if c in table]].reset_index(drop=True),
        depths=np.stack(depths) if len(depths) == len(read) else None,
    )


def cue_frames(data: PolypSizingDataModule) -> list[FrameStack]:
    """Return training, validation and test frames of rendered data with masks and depths."""
    source = data.variant(streams=("rgb_mask_depth",)).frames()
    parts: tuple[Part, ...] = ("train", "validation", "test")
    return [frames_of(source, data.evaluation_rows(part)) for part in parts]


def drop_unmasked(frames: FrameStack) -> tuple[FrameStack, int]:
    """Return the frames whose mask is not empty, and the number of dropped ones."""
    seen = np.asarray(frames.masks.any((1, 2)))
    return frames.take(seen), int((~seen).sum())


def predictor_of(bundle: SizingBundle, depth_factor: float = 1.0) -> Predictor:
    """Return a function from frames to sizes in mm.

    Args:
        bundle: Trained network.
        depth_factor: Multiplies depths, for those that are not in mm.
    """

    def predict(frames: FrameStack) -> np.ndarray:
        if frames.images.shape[1] != bundle.image_size:
            raise GatesError(
                f"frames have {frames.images.shape[1]} pixels, the network takes"
                f" {bundle.image_size}; render or prepare them at that size"
            )
        sizes = []
        for start in range(0, len(frames), BATCH):
            rows = range(start, min(start + BATCH, len(frames)))
            raw = bundle.raw([_frame(frames, row, depth_factor) for row in rows])
            sizes.append(bundle.target.decode(raw).double().numpy())
        return np.concatenate(sizes)

    return predict


def _frame(frames: FrameStack, row: int, depth_factor: float) -> Frame:
    xmin, ymin, xmax, ymax = (float(side) for side in frames.boxes[row])
    depth = None
    if frames.depths is not None:
        depth = (frames.depths[row] * depth_factor).astype(np.float32)
    mask = frames.masks[row].astype(np.uint8)
    return Frame(frames.images[row], (xmin, ymin, xmax, ymax), mask, depth)
