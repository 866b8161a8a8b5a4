"""What every model must beat: a constant, and regressions on hand-made cues, rung by rung."""

from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement, product
from typing import NamedTuple

import numpy as np
import pandas as pd

from core_gates.errors import GatesError
from endoscopy.data.frame_table import BOX
from endoscopy.evaluation.size_scores import columns_of, score_differences, score_intervals
from endoscopy.metrics import CONTINUOUS, CutOffs, object_table

REGRESSION = "mask area + photometry"
"""The regression on three numbers, which explain most of a rendered size."""

PHOTOMETRY = ("log_extent", "local_brightness", "frame_brightness")


class LogLinear(NamedTuple):
    """Log size as a polynomial of features, ``log t = intercept + products(z) · w``.

    The products are of ``z = (x - mean) / scale``; with degree 1 they are ``z``.

    Attributes:
        mean: (F,) of the features in training.
        scale: (F,) their standard deviation.
        weights: (P,) of the products of up to ``degree`` standardized features.
        intercept: Log size where all products are 0.
        degree: 1 is linear.
    """

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    intercept: float
    degree: int = 1

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Return sizes (N,) in mm from features (N, F)."""
        products = _products((features - self.mean) / self.scale, self.degree)
        return np.exp(self.intercept + products @ self.weights)


def fit_log_linear(
    features: np.ndarray,
    gt: np.ndarray,
    objects: np.ndarray,
    *,
    ridge: float = 1e-3,
    degree: int = 1,
) -> LogLinear:
    """Fit a ridge regression of log size in which all objects have the same weight.

    Args:
        features: (N, F); with F = 0 the fit is the constant, the geometric mean of sizes.
        gt: (N,) true sizes, mm.
        objects: (N,) identity of the object of each row.
        ridge: Penalty on the weights of products of standardized features.
        degree: Features in a product, at most.

    Raises:
        ValueError: The lengths differ, or a feature is not finite.
    """
    if not len(features) == len(gt) == len(objects) > 0:
        raise ValueError(f"features {len(features)}, gt {len(gt)} and objects {len(objects)} must"
                         " have one length above zero")  # fmt: skip
    if not np.isfinite(features).all():
        raise ValueError(f"{(~np.isfinite(features)).any(1).sum()} rows have features that are not"
                         " finite; leave out frames without a mask")  # fmt: skip
    _, index, counts = np.unique(objects, return_inverse=True, return_counts=True)
    share = (1 / counts[index]) / len(counts)
    mean = share @ features
    scale = np.sqrt(share @ (features - mean) ** 2)
    scale[scale == 0] = 1.0
    products = _products((features - mean) / scale, degree)
    center, target = share @ products, np.log(gt)
    middle = float(share @ target)
    normal = products.T @ (share[:, None] * (products - center)) + ridge * np.eye(len(center))
    weights = np.linalg.solve(normal, products.T @ (share * (target - middle)))
    return LogLinear(mean, scale, weights, middle - float(center @ weights), degree)


def _products(standard: np.ndarray, degree: int) -> np.ndarray:
    chosen = range(standard.shape[1])
    higher = [
        standard[:, list(places)].prod(1, keepdims=True)
        for factors in range(2, degree + 1)
        for places in combinations_with_replacement(chosen, factors)
    ]
    return np.hstack([standard, *higher])


DEGREES, RIDGES = (1, 2, 3), (1e-4, 1e-3, 1e-2, 1e-1)


def fit_photometry(train: pd.DataFrame, validation: pd.DataFrame) -> LogLinear:
    """Fit a polynomial of area and brightness, its degree and ridge those that err least elsewhere.

    Args:
        train: See `cue_baselines`.
        validation: The same of other objects.
    """
    columns = list(PHOTOMETRY)
    cues, gt, objects = (train[name].to_numpy() for name in (columns, "gt", "unique_id"))
    fits = [
        fit_log_linear(cues, gt, objects, ridge=ridge, degree=degree)
        for degree, ridge in product(DEGREES, RIDGES)
    ]
    others, truth = validation[columns].to_numpy(), validation["gt"].to_numpy()
    return min(fits, key=lambda fit: float(np.abs(np.log(fit.predict(others) / truth)).mean()))


class Pinhole(NamedTuple):
    """Size = factor × apparent extent × distance, as seen by a camera without distortion.

    Attributes:
        factor: Millimeters per unit of extent and millimeter of distance.
    """

    factor: float

    def predict(self, extent: np.ndarray, distance_mm: np.ndarray) -> np.ndarray:
        """Return sizes (N,) in mm.

        Args:
            extent: (N,) root of the apparent area, relative to the frame.
            distance_mm: (N,).
        """
        return self.factor * extent * distance_mm


def fit_pinhole(extent: np.ndarray, distance_mm: np.ndarray, gt: np.ndarray) -> Pinhole:
    """Fit the factor so that the median ratio of predicted to true size is one."""
    return Pinhole(float(1 / np.median(extent * distance_mm / gt)))


def constant_size(train: pd.DataFrame) -> float:
    """Return the constant to predict: the median size, mm, of the training objects."""
    return float(train.drop_duplicates("unique_id")["gt"].median())


def box_features(frames: pd.DataFrame) -> np.ndarray:
    """Return the log extent (N, 1) of the boxes: half the log of their fraction of the frame.

    Raises:
        GatesError: A column of the frame table is missing, or a box is empty.
    """
    if missing := [name for name in (*BOX, "width", "height") if name not in frames]:
        raise GatesError(f"the frame table lacks {', '.join(missing)} for the area baseline")
    wide = frames["bbox_xmax"] - frames["bbox_xmin"]
    high = frames["bbox_ymax"] - frames["bbox_ymin"]
    share = (wide * high / (frames["width"] * frames["height"])).to_numpy(float)
    if not (share > 0).all():
        raise GatesError(f"{(~(share > 0)).sum()} of {len(frames)} boxes are empty; drop them")
    return 0.5 * np.log(share)[:, None]


def baseline_predictions(train: pd.DataFrame, test: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Predict the test frames with the two baselines of every report.

    Args:
        train: Frame table of training, columns as in `FrameTable`.
        test: Frame table of the test, or its predictions with the columns of the boxes.

    Returns:
        ``constant`` and ``area``: test with ``predicted_mm``. The area is that of the box, so that
        it works for every data set.
    """
    regression = fit_log_linear(
        box_features(train), train["gt"].to_numpy(float), train["unique_id"].to_numpy()
    )
    return {
        "constant": test.assign(predicted_mm=constant_size(train)),
        "area": test.assign(predicted_mm=regression.predict(box_features(test))),
    }


def cue_baselines(
    train: pd.DataFrame, validation: pd.DataFrame, test: pd.DataFrame
) -> dict[str, np.ndarray]:
    """Predict the test frames from hand-made cues.

    Args:
        train: `endoscopy.evaluation.rendered_frames.frame_features` of the training frames.
        validation: The same of the frames that settings are chosen on.
        test: The same of the test frames.

    Returns:
        Predicted sizes (N,) in mm of ``constant``; ``mask area``, a log-linear regression;
        ``mask area × depth``, a pinhole camera, where depth is known; ``mask area + photometry``,
        a polynomial of the area and the brightness of the lesion and of the frame.
    """
    gt, objects = train["gt"].to_numpy(float), train["unique_id"].to_numpy()
    area = fit_log_linear(train[["log_extent"]].to_numpy(float), gt, objects)
    photometry = fit_photometry(train, validation)
    result = {
        "constant": np.full(len(test), constant_size(train)),
        "mask area": area.predict(test[["log_extent"]].to_numpy(float)),
        REGRESSION: photometry.predict(test[[*PHOTOMETRY]].to_numpy(float)),
    }
    if train["log_depth"].notna().all() and test["log_depth"].notna().all():
        fitted, tested = (np.exp(cues[["log_extent", "log_depth"]].to_numpy(float))
                          for cues in (train, test))  # fmt: skip
        pinhole = fit_pinhole(fitted[:, 0], fitted[:, 1], gt)
        result["mask area × depth"] = pinhole.predict(tested[:, 0], tested[:, 1])
    return result


SCORES = ("mape", "mae_mm", "macro_f1", "f1_5mm", "f1_10mm")
COMPARED = ("macro_f1", "mape")


class Rung(NamedTuple):
    """A set of features, measured under one exposure.

    Attributes:
        name: Of the row.
        exposure: ``fixed`` or ``agc``.
        features: Columns of `frame_features`.
        mape: Published prototype, for comparison.
        macro_f1: The same.
    """

    name: str
    exposure: str
    features: tuple[str, ...]
    mape: float
    macro_f1: float


AREA, MIN_MAX, LOCAL_FIXED, LOCAL_AGC, FRAME_AGC, METRIC = (
    "apparent area",
    "area + per-frame min-max depth",
    "area + local brightness, fixed gain",
    "area + local brightness, AGC",
    "area + local brightness + frame mean, AGC",
    "area + metric depth",
)
RUNGS = (
    Rung("constant", "fixed", (), 0.612, 0.156),
    Rung(AREA, "fixed", ("log_extent",), 0.319, 0.692),
    Rung(MIN_MAX, "fixed", ("log_extent", "relative_depth"), 0.306, 0.730),
    Rung(LOCAL_FIXED, "fixed", ("log_extent", "local_brightness"), 0.138, 0.872),
    Rung(LOCAL_AGC, "agc", ("log_extent", "local_brightness"), 0.286, 0.746),
    Rung(FRAME_AGC, "agc", ("log_extent", "local_brightness", "frame_brightness"), 0.187, 0.864),
    Rung(METRIC, "fixed", ("log_extent", "log_depth"), 0.129, 0.900),
)

NEGLIGIBLE = 0.3
"""A cue adds almost nothing if it gains less than this fraction of what metric depth gains."""


def ladder_predictions(
    train: Mapping[str, pd.DataFrame],
    test: Mapping[str, pd.DataFrame],
    rungs: Sequence[Rung] = RUNGS,
) -> dict[str, pd.DataFrame]:
    """Fit every rung on the training objects and predict the test objects.

    Args:
        train: Exposure -> `frame_features` of the training frames.
        test: The same of the test frames.
        rungs: What to fit.

    Returns:
        Name of the rung -> object table, the median over frames.
    """
    result = {}
    for rung in rungs:
        fitted, tested = train[rung.exposure], test[rung.exposure]
        columns = list(rung.features)
        model = fit_log_linear(
            fitted[columns].to_numpy(float),
            fitted["gt"].to_numpy(float),
            fitted["unique_id"].to_numpy(),
        )
        sizes = model.predict(tested[columns].to_numpy(float))
        result[rung.name] = object_table(
            tested[["unique_id", "gt"]].assign(predicted_mm=np.broadcast_to(sizes, len(tested)))
        )
    return result


def ladder(
    train: Mapping[str, pd.DataFrame],
    test: Mapping[str, pd.DataFrame],
    *,
    rungs: Sequence[Rung] = RUNGS,
    cut_offs: CutOffs = CONTINUOUS,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Tabulate the rungs.

    Args:
        train: Exposure -> `frame_features` of the training frames, 700 objects.
        test: The same of the test frames, 3,000 objects.
        rungs: What to fit.
        cut_offs: Of the predictions.
        resamples: Number of bootstrap resamples of objects.

    Returns:
        One row per rung: features, exposure, objects; mape, mae_mm, macro_f1, f1_5mm and f1_10mm
        with ``_low`` and ``_high``; the prototype's mape and macro_f1 with the suffix
        ``_published``.
    """
    rows = []
    tables = ladder_predictions(train, test, rungs)
    for rung in rungs:
        table = tables[rung.name]
        row: dict[str, object] = {
            "features": rung.name, "exposure": rung.exposure, "objects": len(table)
        }  # fmt: skip
        intervals = score_intervals(table, cut_offs, only=SCORES, resamples=resamples)
        for score in SCORES:
            row |= columns_of(score, intervals[score])
        row |= {"mape_published": rung.mape, "macro_f1_published": rung.macro_f1}
        rows.append(row)
    return pd.DataFrame(rows)


def ladder_order(
    tables: Mapping[str, pd.DataFrame],
    *,
    cut_offs: CutOffs = CONTINUOUS,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Check the order of the rungs by paired differences.

    ``A < B``: B is significantly better in MAPE and macro F1. ``A ≤ B``: A is not significantly
    better in macro F1. ``A ≈ B``: in MAPE, B gains less than 30 % of what metric depth gains over
    the area, with the whole interval.

    Args:
        tables: Of `ladder_predictions`.
        cut_offs: Of the predictions.
        resamples: Number of bootstrap resamples of objects.

    Returns:
        One row per claim: lower, relation, upper, holds, and the differences upper - lower of mape
        and macro_f1 with ``_low`` and ``_high``.
    """
    claims = [
        ("constant", "<", AREA),
        (AREA, "≈", MIN_MAX),
        (MIN_MAX, "<", LOCAL_FIXED),
        (LOCAL_FIXED, "≤", METRIC),
        (AREA, "≈", LOCAL_AGC),
    ]
    full = score_differences(
        tables[METRIC], tables[AREA], cut_offs, only=COMPARED, resamples=resamples
    )
    rows = []
    for lower, relation, upper in claims:
        gaps = score_differences(
            tables[upper], tables[lower], cut_offs, only=COMPARED, resamples=resamples
        )
        f1, mape = gaps["macro_f1"], gaps["mape"]
        holds = {
            "<": f1.significant and mape.significant and mape.value < 0 < f1.value,
            "≤": f1.high >= 0,
            "≈": max(abs(mape.low), abs(mape.high)) < NEGLIGIBLE * -full["mape"].value,
        }[relation]
        row = {"lower": lower, "relation": relation, "upper": upper, "holds": bool(holds)}
        rows.append(row | columns_of("mape", mape) | columns_of("macro_f1", f1))
    return pd.DataFrame(rows)
