"""From a trained module to its bundle: limits, intervals and scope, fitted to held-out objects."""

from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from core_gates.errors import GatesError
from endoscopy.bundles.frame_quality import (
    QualityLimits,
    fit_quality,
    frame_statistics,
    stacked,
)
from endoscopy.bundles.sizing_bundle import Provenance, Scope, SizingBundle, load_bundle
from endoscopy.data.frame_table import RENDERED, SYNTHETIC, object_keys
from endoscopy.data.images import Frame, read_rgb
from endoscopy.data.samples import LesionDataset
from endoscopy.data.sizing_datamodule import Part, PolypSizingDataModule
from endoscopy.evaluation.baselines import constant_size
from endoscopy.evaluation.conformal import MINIMUM, SplitConformal, calibrate, calibrate_few_frames
from endoscopy.evaluation.size_scores import score_differences
from endoscopy.inputs.image_files import SourceFrame
from endoscopy.inputs.locations import Origin
from endoscopy.metrics import PROBABILITIES, mean_relative_error, object_table
from endoscopy.segmenter import AutomaticLocations, Segmenter, shipped_segmenter
from endoscopy.training.sizing_module import SizingModule

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
    ours = object_table(_sized(bundle, data.frames(), _as_given(data.frames(), rows[first])))
    constant = constant_size(frames.iloc[data.rows("train")])
    gap = score_differences(ours, ours.assign(predicted_mm=constant), only=("mape",))["mape"]
    exact = ours[~ours["censored"]]
    gt = exact["gt"].to_numpy(float)
    mape, constant_mape = (
        float(mean_relative_error(gt, predicted)) for predicted in (exact["predicted_mm"], constant)
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
        (`endoscopy.evaluation.conformal.MINIMUM`).
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


SCOPES = {RENDERED: SYNTHETIC, "REALC": "real_colon", "SUN": "sun"}
"""Database to the scope in which millimeters learned from it are given."""

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
    `calibrate_locations`. Millimeters count as calibrated for the scope of the data only if
    held-out objects are sized better than by a constant.

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
    compared = held_out(bundle, data)
    bundle.scope = Scope(
        ", ".join(names),
        tuple(names) if compared.better else (),
        float(np.exp(np.log(sizes).mean())),
    )
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
        if shared := set(bundle.training.objects) & set(held):
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
    return frame_predictions(bundle, data.frames(), data.evaluation_rows(part), reasons=reasons)


def frame_predictions(
    bundle: SizingBundle, frames: LesionDataset, rows: np.ndarray, *, reasons: bool = False
) -> pd.DataFrame:
    """Predict some rows of a frame table; see `part_predictions`."""
    raws: list[Tensor] = []
    sharpness: list[float] = []
    why: list[str] = []
    for start in range(0, len(rows), BATCH):
        part = [frames.sample(int(row)).frame for row in rows[start : start + BATCH]]
        raws.append(bundle.raw(part))
        if reasons and bundle.quality is not None:
            measured = frame_statistics(*stacked(part))
            sharpness += measured["sharpness"].tolist()
            why += bundle.quality.reasons(measured)
    raw = torch.cat(raws)
    table = frames.reader.table.frames
    predictions = table.loc[rows, [name for name in CARRIED if name in table]].reset_index(
        drop=True
    )
    predictions["predicted_mm"] = bundle.target.decode(raw).double().numpy()
    chances = bundle.target.probabilities(raw)
    if chances is not None and chances.shape[1] == len(PROBABILITIES):
        predictions[list(PROBABILITIES)] = chances.numpy()
    return predictions.assign(sharpness=sharpness, reasons=why) if why else predictions


def _quality(data: PolypSizingDataModule) -> QualityLimits | None:
    """Fit the limits to training frames as they are, evenly spaced if there are many."""
    rows = data.rows("train")
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), 3000)).astype(int)]
    frames = data.frames()
    images, boxes = stacked([frames.sample(int(row)).frame for row in rows])
    try:
        return fit_quality(images, boxes)
    except ValueError:  # too few frames
        return None


class Bundles:
    """The form of results that are networks: in bfloat16, in which they were calibrated."""

    def save(self, folder: Path, result: SizingBundle) -> None:
        """Write weights, configuration and model card."""
        result.save(folder, dtype=torch.bfloat16)

    def load(self, folder: Path) -> SizingBundle:
        """Read what `save` wrote.

        Raises:
            GatesError: A file is missing or damaged.
        """
        return load_bundle(folder)


def shipped_folder(config: str, name: str) -> Path:
    """Return the folder of a shipped network, which may not exist.

    Args:
        config: Name of the configuration.
        name: Of the network, such as ``configured-s0``.
    """
    return Path(str(files("endoscopy"))) / "weights" / config / "weights" / name
