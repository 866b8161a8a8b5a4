"""Polyp versus mucosa: a task on real frames that needs boxes and no sizes.

Patches are classified by logistic regression on features, cross-fitted over cases, with intervals
by a bootstrap over cases. It tells whether real frames are read and cut right, and no more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from core_gates.errors import GatesError
from endoscopy.inference.patch_features import POSITION, patch_features, position_features
from endoscopy.inputs.frame import InputReport
from endoscopy.inputs.kind import frames
from endoscopy.inputs.locations import Locator
from endoscopy.metrics.ranking import auroc
from harness.evidence import Interval, Resamples, Scores

SIDE = 48  # pixels of a patch
GROWTH = 1.3  # side of a patch over the longer side of the box
SMALLEST = 16.0  # pixels
TRIES = 200
DARKEST = 25  # of 255; a patch with a darker mean shows no mucosa
REGULARIZATION = 0.03  # inverse strength, fixed before looking
MODELS = ("features", POSITION, "constant")


class PatchStudy(NamedTuple):
    """What the study found.

    Attributes:
        patches: One row a patch: case, frame_id, is_polyp, xmin, ymin, side, fold, and the
            cross-fitted probability of each model.
        scores: Model to score to interval: auroc, accuracy, sensitivity, specificity.
    """

    patches: pd.DataFrame
    scores: dict[str, dict[str, Interval]]

    def rows(self) -> list[dict[str, object]]:
        """Return one row a model, with every score and its bounds."""
        return [
            {"model": model}
            | {
                f"{name}{suffix}": value
                for name, interval in found.items()
                for suffix, value in (
                    ("", interval.value),
                    ("_low", interval.low),
                    ("_high", interval.high),
                )
            }
            for model, found in self.scores.items()
        ]


def case_of_name(frame_id: str) -> str:
    """Return what stands before the first underscore of a file name: its case."""
    return frame_id.rpartition("/")[2].partition("_")[0]


def patch_study(
    source: str | Path,
    locator: Locator,
    *,
    case_of: Callable[[str], str] = case_of_name,
    folds: int = 5,
    seed: int = 0,
    resamples: int = 2000,
) -> PatchStudy:
    """Cut patches, cross-fit the models over cases, and score them.

    Beside the features stand two baselines: the position of the patch in its frame, which tells how
    far the choice of the mucosa patches gives the answer away, and a constant.

    Args:
        source: Frames.
        locator: Their boxes.
        case_of: Case of a frame, by its key; patches of a case are never on both sides of a split.
        folds: Parts of the cross-fit.
        seed: Of the mucosa patches and the bootstrap.
        resamples: Of the bootstrap.

    Raises:
        GatesError: The source cannot be used, or has fewer cases than folds.
    """
    patches, pixels = cut_patches(source, locator, case_of=case_of, seed=seed)
    cases, labels = patches["case"].to_numpy(), patches["is_polyp"].to_numpy(bool)
    if len(np.unique(cases)) < folds:
        raise GatesError(
            f"{source}: {len(np.unique(cases))} cases cannot be split into {folds} parts; give "
            "more frames"
        )
    features = {"features": patch_features(pixels), POSITION: position_features(patches)}
    splits = list(GroupKFold(folds).split(labels, labels, cases))
    fold = np.zeros(len(labels), dtype=int)
    probabilities = {model: np.full(len(labels), 0.5) for model in MODELS}
    for number, (train, test) in enumerate(splits):
        fold[test] = number
        for model, values in features.items():
            fitted = _model().fit(values[train], labels[train])
            probabilities[model][test] = fitted.predict_proba(values[test])[:, 1]
        probabilities["constant"][test] = labels[train].mean()
    draws = Resamples.clusters(cases, resamples=resamples, seed=seed)
    scores = {
        model: draws.intervals(_scores(found, labels)) for model, found in probabilities.items()
    }
    return PatchStudy(patches.assign(fold=fold, **probabilities), scores)


def cut_patches(
    source: str | Path, locator: Locator, *, case_of: Callable[[str], str], seed: int = 0
) -> tuple[pd.DataFrame, np.ndarray]:
    """Cut a square around each box and, where there is room, one beside all boxes of its frame.

    Args:
        source: Frames.
        locator: Their boxes.
        case_of: Case of a frame, by its key.
        seed: Of the places of mucosa patches.

    Returns:
        Rows as in :attr:`PatchStudy.patches` up to ``side``, with width and height of the frame,
        and patches (N, 48, 48, 3) uint8.

    Raises:
        GatesError: The source cannot be used, or shows no lesion.
    """
    generator = np.random.default_rng(seed)
    rows: list[dict[str, object]] = []
    pixels: list[np.ndarray] = []
    report = InputReport()
    for position, frame in enumerate(frames(source, report)):
        if position == 0:
            locator.begin(report)
        part = locator.locate(frame, trim=True)
        boxes = np.array([lesion.box for lesion in part.lesions]).reshape(-1, 4)
        for box in boxes:
            square = _around(box, part.image)
            beside = _beside(square[2], boxes, part.image, generator)
            for place, is_polyp in ((square, True), (beside, False)):
                if place is None:
                    continue
                rows.append(_row(frame.key, case_of(frame.key), place, part.image, is_polyp))
                pixels.append(_cut(part.image, place))
    locator.finish(report)
    if not rows:
        raise GatesError(f"{source}: shows no lesion; give boxes of its frames")
    return pd.DataFrame(rows), np.stack(pixels)


Square = tuple[float, float, float]  # xmin, ymin, side


def _around(box: np.ndarray, image: np.ndarray) -> Square:
    """Return the square around a box, moved into the frame."""
    xmin, xmax, ymin, ymax = box
    height, width = image.shape[:2]
    side = min(max(GROWTH * max(xmax - xmin, ymax - ymin), SMALLEST), height, width)
    left = float(np.clip((xmin + xmax - side) / 2, 0, width - side))
    top = float(np.clip((ymin + ymax - side) / 2, 0, height - side))
    return left, top, side


def _beside(
    side: float, boxes: np.ndarray, image: np.ndarray, generator: np.random.Generator
) -> Square | None:
    """Return a lit square of the same side that touches no box, or None after 200 tries."""
    height, width = image.shape[:2]
    for _ in range(TRIES):
        left, top = generator.uniform(0, width - side), generator.uniform(0, height - side)
        apart_x = (boxes[:, 1] <= left) | (boxes[:, 0] >= left + side)
        apart_y = (boxes[:, 3] <= top) | (boxes[:, 2] >= top + side)
        square = (float(left), float(top), side)
        if (apart_x | apart_y).all() and _cut(image, square).mean() > DARKEST:
            return square
    return None


def _cut(image: np.ndarray, square: Square) -> np.ndarray:
    left, top, side = square
    box = (left, top, left + side, top + side)
    small = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR, box)
    return np.asarray(small)


def _row(
    key: str, case: str, square: Square, image: np.ndarray, is_polyp: bool
) -> dict[str, object]:
    left, top, side = square
    return {
        "case": case,
        "frame_id": key,
        "is_polyp": is_polyp,
        "xmin": left,
        "ymin": top,
        "side": side,
        "width": image.shape[1],
        "height": image.shape[0],
    }


def _model() -> LogisticRegression:
    return make_pipeline(StandardScaler(), LogisticRegression(C=REGULARIZATION, max_iter=500))


def _scores(probability: np.ndarray, labels: np.ndarray) -> Scores:
    """Return scores as functions of the weights of patches."""
    right = (probability >= 0.5) == labels

    def share(weights: np.ndarray, among: np.ndarray) -> np.ndarray:
        total = (weights * among).sum(-1)
        hits = (weights * (among & right)).sum(-1)
        return np.divide(hits, total, out=np.full(total.shape, np.nan), where=total > 0)

    def scores(weights: np.ndarray) -> dict[str, np.ndarray]:
        return {
            "auroc": auroc(probability, labels, weights),
            "accuracy": share(weights, np.ones_like(labels)),
            "sensitivity": share(weights, labels),
            "specificity": share(weights, ~labels),
        }

    return scores
