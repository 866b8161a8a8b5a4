"""From a trained module to what is needed to predict: limits, intervals and scope are fitted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from core_gates.errors import GatesError
from endoscopy.bundles.calibration import calibrate_locations, held_out
from endoscopy.bundles.contents import SizingBundle
from endoscopy.bundles.quality import QualityLimits, fit_quality, frame_statistics
from endoscopy.bundles.scope import SYNTHETIC, Scope
from endoscopy.data.datamodule import Part, PolypSizingDataModule
from endoscopy.data.frames.dataset import LesionDataset, Sample
from endoscopy.data.provenance import Provenance, object_keys
from endoscopy.metrics import PROBABILITIES
from endoscopy.segmentation.segmenter import Segmenter, shipped_segmenter
from endoscopy.training.module import SizingModule

SCOPES = {"SYNTH": SYNTHETIC, "REALC": "real_colon", "SUN": "sun"}
"""Database to the scope in which millimeters learned from it are given."""

BATCH = 64
MOST_QUALITY_FRAMES = 3000
CARRIED = (
    "unique_id", "frame_id", "patient", "gt", "censored", "brand", "shape", "site", "distance_mm",
    "exposure", "bbox_xmin", "bbox_xmax", "bbox_ymin", "bbox_ymax", "width", "height", "frame_path",
)  # fmt: skip
"""Columns of the frame table that predictions carry along, where they exist."""


def bundle_of(
    module: SizingModule,
    data: PolypSizingDataModule,
    facts: dict[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    segmenter: Segmenter | None = None,
) -> SizingBundle:
    """Round the weights to bfloat16 and fit everything that a prediction needs.

    Intervals are fitted to the calibration part, see
    :func:`endoscopy.bundles.calibration.calibrate_locations`. Millimeters count as calibrated for
    the scope of the data only if held-out objects are sized better than by a constant.

    Args:
        module: Trained.
        data: What it was trained on, set up.
        facts: For the model card.
        settings: Everything that decided the training, by name.
        segmenter: For intervals of automatic locations; the shipped one when None.
    """
    table = data.load()
    train = table.frames.iloc[data.rows("train")]
    sizes = train.drop_duplicates("unique_id")["gt"].to_numpy(float)
    names = [SCOPES.get(name, name) for name in sorted(set(table.frames["database"]))]
    bundle = rounded_bundle(module, data)
    mean_size = float(np.exp(np.log(sizes).mean()))
    compared = held_out(bundle, data)
    bundle.scope = Scope(", ".join(names), tuple(names) if compared.better else (), mean_size)
    bundle.quality = _quality(data)
    bundle.facts = {"training objects": len(sizes), "held out": str(compared)} | (facts or {})
    bundle.training = Provenance(settings or {}, tuple(object_keys(train)))
    bundle.intervals = calibrate_locations(bundle, data, segmenter or shipped_segmenter())
    return bundle


def refuse_trained(bundle: SizingBundle, data: PolypSizingDataModule) -> None:
    """Refuse a network that was trained on objects of the test or the calibration part.

    Raises:
        GatesError: It was.
    """
    if bundle.training is None:
        return
    data.load()
    parts: tuple[Part, ...] = ("test", "calibration")
    for part in parts:
        held = data.object_keys(part)
        shared = set(bundle.training.objects) & set(held)
        if shared:
            raise GatesError(
                f"the network was trained on {len(shared)} of {len(held)} {part} objects: give the "
                "split and the fold that it was trained with, or train again under another --name"
            )


def rounded_bundle(module: SizingModule, data: PolypSizingDataModule) -> SizingBundle:
    """Return the network, its weights rounded to bfloat16, without limits and intervals."""
    model = module.model.cpu().eval()
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(value.bfloat16())
    form = data.form
    return SizingBundle(
        model,
        module.target,
        form.size,
        aperture=form.aperture,
        outline=form.outline,
        cut_offs=module.cut_offs,
    )


def part_predictions(
    bundle: SizingBundle, data: PolypSizingDataModule, part: Part, *, reasons: bool = False
) -> pd.DataFrame:
    """Predict the frames of a part, the first ones of every object.

    Args:
        bundle: Trained network.
        data: Loaded.
        part: Which.
        reasons: Also return why a frame should not be sized, if the network has limits.

    Returns:
        One row per frame: the columns ``CARRIED`` of the frame table, ``predicted_mm``, ``p_*`` of
        a network of classes, and ``sharpness`` and ``reasons`` if asked for.

    Raises:
        GatesError: The network was trained on test objects.
    """
    if part == "test":
        refuse_trained(bundle, data)
    rows = data.evaluation_rows(part)
    return frame_predictions(bundle, data.frames(), rows, reasons=reasons)


def frame_predictions(
    bundle: SizingBundle, frames: LesionDataset, rows: np.ndarray, *, reasons: bool = False
) -> pd.DataFrame:
    """Predict some rows of a frame table; see :func:`part_predictions`."""
    raws: list[Tensor] = []
    sharpness: list[float] = []
    why: list[str] = []
    for samples in _chunks(frames, rows):
        raws.append(bundle.raw([sample.frame for sample in samples]))
        if reasons and bundle.quality is not None:
            images = np.stack([sample.frame.image for sample in samples])
            measured = frame_statistics(images, np.array([s.frame.box for s in samples]))
            sharpness += measured["sharpness"].tolist()
            why += bundle.quality.reasons(measured)
    raw = torch.cat(raws)
    table = frames.reader.table.frames
    found = table.loc[rows, [name for name in CARRIED if name in table]].reset_index(drop=True)
    found["predicted_mm"] = bundle.target.decode(raw).double().numpy()
    chances = bundle.target.probabilities(raw)
    if chances is not None and chances.shape[1] == len(PROBABILITIES):
        found[list(PROBABILITIES)] = chances.numpy()
    return found.assign(sharpness=sharpness, reasons=why) if why else found


def _chunks(frames: LesionDataset, rows: np.ndarray) -> Iterator[list[Sample]]:
    for start in range(0, len(rows), BATCH):
        yield [frames.sample(int(row)) for row in rows[start : start + BATCH]]


def _quality(data: PolypSizingDataModule) -> QualityLimits | None:
    """Fit the limits to training frames as they are, evenly spaced if there are many."""
    rows = data.rows("train")
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), MOST_QUALITY_FRAMES)).astype(int)]
    frames = data.frames()
    samples = [frames.sample(int(row)).frame for row in rows]
    images = np.stack([frame.image for frame in samples])
    boxes = np.array([frame.box for frame in samples])
    try:
        return fit_quality(images, boxes)
    except ValueError:  # too few frames
        return None
