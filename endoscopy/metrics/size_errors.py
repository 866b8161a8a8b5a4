"""Errors of sizes in millimeters, of frames, objects and patients, and how sizes rank objects."""

from typing import Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from core_gates.errors import GatesError, check_option
from endoscopy.metrics.classification import TRUTH, ratio

PROBABILITIES = ("p_diminutive", "p_small", "p_large")
"""Probabilities of the three size classes."""

_TRUE, _FALSE = frozenset({"true", "1", "1.0", "yes"}), frozenset({"false", "0", "0.0", "no", ""})


def flags_of(table: pd.DataFrame, name: str) -> np.ndarray:
    """Return a column of flags (N,) as booleans; False where it has no value or is absent.

    Text is parsed: ``true``, ``1``, ``yes``, or ``false``, ``0``, ``no``.

    Raises:
        GatesError: A value is neither.
    """
    if name not in table:
        return np.zeros(len(table), dtype=bool)
    column = table[name]
    if pd.api.types.is_bool_dtype(column) and not column.isna().any():
        return column.to_numpy(dtype=bool)
    text = column.astype("object").where(column.notna(), "").astype(str).str.strip().str.lower()
    is_flag = text.isin([*_TRUE, *_FALSE]).to_numpy(dtype=bool)
    if not is_flag.all():
        row = int(np.flatnonzero(~is_flag)[0])
        raise GatesError(f"{name} is {column.iloc[row]!r} in row {row}: write true or false")
    return text.isin(list(_TRUE)).to_numpy(dtype=bool)


def patients_of(table: pd.DataFrame) -> np.ndarray:
    """Return the patient (N,) of each row; an object without one is a separate patient.

    A missing or blank patient is named by the ``unique_id``, after ``object`` where a patient has
    that name already.
    """
    object_names = table["unique_id"].astype(str).to_numpy(dtype=object)
    if "patient" not in table:
        return object_names.astype(str)
    column = table["patient"]
    text = column.astype("object").where(column.notna(), "").astype(str)
    has_patient = (text.str.strip() != "").to_numpy(dtype=bool)
    patients = text.to_numpy(dtype=object)
    taken = set(patients[has_patient])
    object_names = np.array(
        [f"object {name}" if name in taken else name for name in object_names], dtype=object
    )
    return np.where(has_patient, patients, object_names).astype(str)


Level = Literal["median", "mean", "best_k"]
REQUIRED = ("unique_id", "gt", "predicted_mm")


def object_table(predictions: pd.DataFrame, level: Level = "median", *, k: int = 5) -> pd.DataFrame:
    """Aggregate the frames of each object.

    Args:
        predictions: One row per frame: ``unique_id``, ``gt`` (mm), ``predicted_mm``; optional
            ``censored`` (gt is a lower bound), ``patient``, ``sharpness``, probabilities
            ``p_diminutive``, ``p_small`` and ``p_large``, ``reasons`` (why a frame abstains, empty
            if it does not), and any other column, such as those of subgroups.
        level: ``median`` or ``mean`` of the sizes of frames, or ``best_k``, the median of the k
            sharpest frames. Probabilities are averaged over the same frames.
        k: Number of frames of ``best_k``.

    Returns:
        One row per object, in order of first appearance: all columns, ``num_frames`` (those that
        count) and ``abstained``. Frames that abstain do not count unless all of an object do.
        Other columns become the median if numbers, else the most frequent value.

    Raises:
        GatesError: A column is missing, a prediction is not finite, or an object has two sizes.
    """
    check_option("level", level, get_args(Level))
    _check(predictions, (*REQUIRED, "sharpness") if level == "best_k" else REQUIRED)
    reasons = predictions.get("reasons", pd.Series("", predictions.index))
    frames = predictions.assign(
        censored=flags_of(predictions, "censored"), reasons=reasons.fillna("").astype(str)
    )
    abstains = frames["reasons"] != ""
    all_abstain = abstains.groupby(frames["unique_id"]).transform("all")
    counting = frames[~abstains | all_abstain]
    if level == "best_k":
        sharp = counting.sort_values("sharpness", ascending=False, kind="stable")
        counting = sharp.groupby("unique_id", sort=False).head(k)
    grouped = counting.groupby("unique_id", sort=False)
    sizes = grouped["predicted_mm"].agg("mean" if level == "mean" else "median")
    columns = {"gt": grouped["gt"].first(), "predicted_mm": sizes}
    for name in counting.columns.difference(["unique_id", *columns], sort=False):
        columns[name] = _summary(counting, name)
    table = pd.DataFrame(columns).loc[frames["unique_id"].drop_duplicates()]
    table["num_frames"] = grouped.size()
    table["abstained"] = table["reasons"] != ""
    return table.rename_axis("unique_id").reset_index()


def patient_table(objects: pd.DataFrame) -> pd.DataFrame:
    """Keep the worst lesion of each patient: the greatest true and the greatest predicted size.

    Args:
        objects: From `object_table`, with a column ``patient``; an object without one counts
            as a separate patient.

    Returns:
        One row per patient: patient, unique_id (the patient's), gt, predicted_mm, censored,
        num_objects. A size is a lower bound if that of the largest lesion is.

    Raises:
        GatesError: There is no column ``patient``.
    """
    _check(objects, ("patient", *REQUIRED))
    objects = objects.assign(censored=flags_of(objects, "censored"), patient=patients_of(objects))
    largest = objects.sort_values(["gt", "censored"], kind="stable")
    grouped = largest.groupby("patient", sort=False)
    table = pd.DataFrame(
        {
            "gt": grouped["gt"].last(),
            "censored": grouped["censored"].last(),
            "predicted_mm": grouped["predicted_mm"].max(),
            "num_objects": grouped.size(),
        }
    ).loc[objects["patient"].drop_duplicates()]
    table = table.rename_axis("patient").reset_index()
    return table.assign(unique_id=table["patient"])


def _check(table: pd.DataFrame, needed: tuple[str, ...]) -> None:
    if missing := [name for name in needed if name not in table]:
        raise GatesError(
            f"predictions lack {', '.join(missing)}; found {', '.join(map(str, table.columns))}"
        )
    if table.empty:
        raise GatesError("predictions are empty; expected one row per frame")
    if broken := int((~np.isfinite(table["predicted_mm"].to_numpy(dtype=float))).sum()):
        raise GatesError(f"{broken} of {len(table)} predictions are not finite; expected mm")
    sizes = table.groupby("unique_id")["gt"].nunique(dropna=False)
    if (sizes > 1).any():
        name = sizes.index[sizes > 1][0]
        raise GatesError(f"object {name} has {sizes[name]} true sizes; expected one per object")


def _summary(frames: pd.DataFrame, name: str) -> pd.Series:
    grouped = frames.groupby("unique_id", sort=False)[name]
    if name in PROBABILITIES:
        return grouped.mean()
    if pd.api.types.is_bool_dtype(frames[name]):
        return grouped.any()
    if pd.api.types.is_numeric_dtype(frames[name]):
        return grouped.median()
    counts = frames.groupby(["unique_id", name], sort=False, dropna=False).size()
    most = counts.sort_values(ascending=False, kind="stable").groupby("unique_id").head(1)
    return most.reset_index(level=name)[name]


NORMAL_95 = 1.959963984540054


class LimitsOfAgreement(NamedTuple):
    """Bland-Altman limits (Bland and Altman, 1986), scalars or (...) of weights (..., N).

    Attributes:
        bias: Mean error, mm; or the mean ratio.
        low: Bias - 1.96 standard deviations of the error, mm; or the lower ratio.
        high: Bias + 1.96 standard deviations, mm; or the upper ratio.
    """

    bias: np.ndarray
    low: np.ndarray
    high: np.ndarray


def weighted_mean(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the mean of values (N,) under weights (..., N); NaN without weight."""
    if weights is None:
        weights = np.ones(len(values))
    return ratio(weights @ values, weights.sum(-1))


def mean_absolute_error(
    gt: ArrayLike, predicted: ArrayLike, weights: np.ndarray | None = None
) -> np.ndarray:
    """Return the mean of |predicted - gt|, mm."""
    return weighted_mean(np.abs(_errors(gt, predicted)), weights)


def root_mean_square_error(
    gt: ArrayLike, predicted: ArrayLike, weights: np.ndarray | None = None
) -> np.ndarray:
    """Return the root of the mean square error, mm."""
    return np.sqrt(weighted_mean(_errors(gt, predicted) ** 2, weights))


def mean_relative_error(
    gt: ArrayLike, predicted: ArrayLike, weights: np.ndarray | None = None
) -> np.ndarray:
    """Return the mean of |predicted - gt| / gt, known as MAPE; a ratio, not a percentage."""
    return weighted_mean(np.abs(_errors(gt, predicted)) / np.asarray(gt, dtype=float), weights)


def bias(gt: ArrayLike, predicted: ArrayLike, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the mean of predicted - gt, mm; positive where sizes are overestimated."""
    return weighted_mean(_errors(gt, predicted), weights)


def limits_of_agreement(
    gt: ArrayLike, predicted: ArrayLike, weights: np.ndarray | None = None
) -> LimitsOfAgreement:
    """Return the bias and the limits that hold 95 % of normally distributed errors.

    Args:
        gt: (N,) true sizes, mm.
        predicted: (N,), mm.
        weights: (..., N) counts; all one by default.
    """
    error = _errors(gt, predicted)
    if weights is None:
        weights = np.ones(len(error))
    mean, total = weighted_mean(error, weights), weights.sum(-1)
    square = np.maximum(weighted_mean(error**2, weights) - mean**2, 0)
    half = NORMAL_95 * np.sqrt(square * ratio(total, total - 1))
    return LimitsOfAgreement(mean, mean - half, mean + half)


def ratio_limits(
    gt: ArrayLike, predicted: ArrayLike, weights: np.ndarray | None = None
) -> LimitsOfAgreement:
    """Return limits of the ratio of predicted to true size, for errors that grow with the size.

    Those of the logarithms, exponentiated (Bland and Altman, 1999, section 3.1): 95 %
    of the ratios lie between, if they are distributed log-normally. The bias is the geometric mean.

    Args:
        gt: (N,) true sizes, mm.
        predicted: (N,), mm.
        weights: (..., N) counts; all one by default.
    """
    log_gt, log_predicted = (np.log(np.asarray(sizes, dtype=float)) for sizes in (gt, predicted))
    return LimitsOfAgreement(*map(np.exp, limits_of_agreement(log_gt, log_predicted, weights)))


def _errors(gt: ArrayLike, predicted: ArrayLike) -> np.ndarray:
    """Return predicted minus true sizes (N,), float64."""
    return np.asarray(predicted, dtype=float) - np.asarray(gt, dtype=float)


def auroc(score: ArrayLike, positive: ArrayLike, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the area under the ROC curve, also of many weighted samples at once.

    It is the probability that a positive sample has the higher score, ties counting half.

    Args:
        score: (N,).
        positive: (N,) boolean.
        weights: (..., N), all one by default.

    Returns:
        (...); NaN where one of the two classes has no weight.

    Raises:
        GatesError: A score is NaN, which has no rank.
        ValueError: The lengths differ.
    """
    score, positive = np.asarray(score, dtype=float), np.asarray(positive, dtype=bool)
    if score.shape != positive.shape or score.ndim != 1:
        raise ValueError(f"score {score.shape} and positive {positive.shape} must have one length")
    if unknown := int(np.isnan(score).sum()):
        raise GatesError(f"{unknown} of {score.size} scores are NaN; leave out rows without one")
    if weights is None:
        weights = np.ones(len(score))
    if not score.size:
        return np.full(weights.shape[:-1], np.nan)
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=-np.inf))
    ranked, is_positive = weights[..., order], positive[order].astype(float)
    positives = np.add.reduceat(ranked * is_positive, starts, axis=-1)
    negatives = np.add.reduceat(ranked * (1 - is_positive), starts, axis=-1)
    below = negatives.cumsum(-1) - negatives / 2
    return ratio((positives * below).sum(-1), positives.sum(-1) * negatives.sum(-1))


def size_auroc(
    gt: ArrayLike, predicted: ArrayLike, cut: Literal[5, 10], weights: np.ndarray | None = None
) -> np.ndarray:
    """Return the AUROC of the predicted size for > 5 mm, or ≥ 10 mm; see auroc."""
    positive = TRUTH.classes(gt) >= (1 if cut == 5 else 2)
    return auroc(predicted, positive, weights)
