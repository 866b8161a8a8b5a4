"""What held-out objects show of a trained network: its intervals, and whether it sizes at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import pandas as pd
import torch

from core_gates.errors import GatesError
from endoscopy.bundles.contents import SizingBundle
from endoscopy.data.datamodule import Part, PolypSizingDataModule
from endoscopy.data.frames.dataset import LesionDataset
from endoscopy.data.frames.transforms import Frame
from endoscopy.data.images import read_rgb
from endoscopy.evaluation.baselines import constant_size
from endoscopy.evaluation.conformal import MINIMUM, SplitConformal, calibrate, calibrate_few_frames
from endoscopy.evaluation.scores import score_differences
from endoscopy.inputs.frame import SourceFrame
from endoscopy.inputs.locations import Origin
from endoscopy.metrics import mean_relative_error, object_table
from endoscopy.segmentation.segmenter import AutomaticLocations, Segmenter

BATCH = 64
FEW_FRAMES = 8
"""Frames of each held-out object that show whether a network sizes at all."""

Located = Iterator[tuple[int, Frame]]


class HeldOut(NamedTuple):
    """How a network does on objects that it was not trained on, compared with a constant.

    Attributes:
        objects: Number of them.
        mape: Mean relative error of the network.
        constant_mape: That of the median training size.
        better: Whether the difference, over patients, is significant and below zero.
    """

    objects: int
    mape: float
    constant_mape: float
    better: bool

    def __str__(self) -> str:
        verdict = "better than" if self.better else "no better than"
        return (
            f"MAPE {self.mape:.3f} on {self.objects} held-out objects, {verdict} a constant"
            f" ({self.constant_mape:.3f})"
        )


def held_out(bundle: SizingBundle, data: PolypSizingDataModule) -> HeldOut:
    """Compare a network with a constant on the calibration part, or without one the validation.

    Args:
        bundle: Trained network.
        data: What it was trained on, loaded; the test part is left alone.
    """
    part: Part = "calibration" if len(data.rows("calibration")) else "validation"
    frames = data.load().frames
    rows = data.evaluation_rows(part)
    first = frames.iloc[rows].groupby("unique_id", sort=False).cumcount().to_numpy() < FEW_FRAMES
    sizes = _sized(bundle, data.frames(), _as_given(data.frames(), rows[first]))
    ours = object_table(sizes)
    constant = constant_size(frames.iloc[data.rows("train")])
    others = ours.assign(predicted_mm=constant)
    gap = score_differences(ours, others, only=("mape",))["mape"]
    exact = ours[~ours["censored"]]
    gt = exact["gt"].to_numpy(float)
    mape, constant_mape = (
        float(mean_relative_error(gt, found)) for found in (exact["predicted_mm"], constant)
    )
    return HeldOut(len(ours), mape, constant_mape, gap.significant and gap.value < 0)


def calibrate_locations(
    bundle: SizingBundle, data: PolypSizingDataModule, segmenter: Segmenter | None = None
) -> dict[Origin, SplitConformal]:
    """Fit intervals to the calibration part, for each way in which lesions may be located.

    - ``masks``: as the table has them, if every calibration frame has a mask or the network reads
      none;
    - ``boxes``: the same frames without their masks;
    - ``automatic``: where the segmenter finds a lesion, right or wrong. Objects on whose frames it
      finds none are left out, as they get no size.

    Args:
        bundle: Trained network.
        data: What it was trained on, loaded.
        segmenter: Finds lesions; without one nothing is fitted for automatic locations.

    Returns:
        Only those for which there are enough objects
        (:data:`endoscopy.evaluation.conformal.MINIMUM`).
    """
    table = data.load().frames
    held = table.iloc[data.rows("calibration")]
    if held["unique_id"].nunique() < MINIMUM:
        return {}
    frames, rows = data.frames(), data.evaluation_rows("calibration")
    trained = set(table.iloc[data.rows("train")]["unique_id"])
    ways: dict[Origin, Located] = {}
    masked = "mask_path" in held and bool((held["mask_path"].fillna("") != "").all())
    if masked or bundle.outline == "box":
        ways["masks"] = _as_given(frames, rows)
    if bundle.outline != "box":
        ways["boxes"] = ((row, frame._replace(mask=None)) for row, frame in _as_given(frames, rows))
    if segmenter is not None:
        ways["automatic"] = _found(frames, rows, segmenter)
    fitted: dict[Origin, SplitConformal] = {}
    for origin, located in ways.items():
        try:
            predictions = _sized(bundle, frames, located)
            conformal = calibrate(object_table(predictions), training_ids=trained, minimum=MINIMUM)
        except GatesError:  # too few objects that the segmenter finds, or of known size
            continue
        fitted[origin] = calibrate_few_frames(conformal, predictions)
    if bundle.outline == "box" and "masks" in fitted:
        fitted["boxes"] = fitted["masks"]
    return fitted


def _as_given(frames: LesionDataset, rows: Iterable[int]) -> Located:
    for row in rows:
        yield int(row), frames.sample(int(row)).frame


def _found(frames: LesionDataset, rows: Iterable[int], segmenter: Segmenter) -> Located:
    """Yield the likeliest lesion of every frame, sought on the frame as it is on disk."""
    locator, table = AutomaticLocations(segmenter), frames.reader.table
    for row in rows:
        image = read_rgb(str(table.path(int(row))))
        lesions = locator.locate(SourceFrame(image, str(row), int(row)), trim=False).lesions
        if lesions:
            yield int(row), lesions[0].on(image)


def _sized(bundle: SizingBundle, frames: LesionDataset, located: Located) -> pd.DataFrame:
    """Return the rows of the frame table that were located, with ``predicted_mm``."""
    rows: list[int] = []
    raws: list[torch.Tensor] = []
    while batch := list(islice(located, BATCH)):
        rows += [row for row, _ in batch]
        raws.append(bundle.raw([frame for _, frame in batch]))
    if not rows:
        raise GatesError("no lesion is found on any calibration frame; calibrate on others")
    table = frames.reader.table.frames
    names = [n for n in ("unique_id", "frame_id", "patient", "gt", "censored") if n in table]
    sizes = bundle.target.decode(torch.cat(raws)).double().numpy()
    return table.loc[rows, names].reset_index(drop=True).assign(predicted_mm=sizes)
