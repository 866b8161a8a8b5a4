"""Scores of a table of predictions as functions of the weights of its rows, and of subgroups."""

from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd

from core_gates.errors import GatesError
from endoscopy.metrics import (
    CLASS_NAMES,
    CONTINUOUS,
    PROBABILITIES,
    TRUTH,
    CutOffs,
    accuracy,
    at_cut_off,
    balanced_accuracy,
    bias,
    confusion_matrix,
    expected_calibration_error,
    flags_of,
    has_known_class,
    limits_of_agreement,
    macro_f1,
    mean_absolute_error,
    mean_relative_error,
    negative_predictive_value,
    patients_of,
    positive_predictive_value,
    quadratic_kappa,
    ratio_limits,
    root_mean_square_error,
    sensitivity,
    size_auroc,
    specificity,
    weighted_f1,
)
from harness.evidence import Difference, Interval, Resamples, Scores

_EACH_CLASS = {
    "sensitivity": sensitivity,
    "specificity": specificity,
    "ppv": positive_predictive_value,
    "npv": negative_predictive_value,
}


def size_scores(
    table: pd.DataFrame, cut_offs: CutOffs = CONTINUOUS, *, only: Collection[str] | None = None
) -> Scores:
    """Return all scores of sizes, for a bootstrap.

    Sizes that are lower bounds (``censored``) have no error in mm; they count in the classes where
    the bound is large already.

    Args:
        table: Rows of frames, objects or patients: gt, predicted_mm (mm), optional censored and
            probabilities of classes.
        cut_offs: Of the predictions.
        only: Names of the scores to compute; all by default.

    Returns:
        Function of weights (R, N). Scores: macro and weighted F1, accuracy, balanced accuracy,
        quadratic kappa; macro F1 and AUROC at 5 and 10 mm, weighted F1 at 10 mm; sensitivity,
        specificity, PPV and NPV of each class; MAE, RMSE, MAPE, bias and Bland-Altman limits,
        of errors and of ratios. If there are probabilities, ECE, and the F1 of their most probable
        class instead of that of the size: macro_f1_probability and weighted_f1_probability.
    """
    gt, predicted = table["gt"].to_numpy(dtype=float), table["predicted_mm"].to_numpy(dtype=float)
    censored = flags_of(table, "censored")
    classed = np.flatnonzero(has_known_class(gt, censored))
    exact = np.flatnonzero(~censored)
    truth, called = TRUTH.classes(gt[classed]), cut_offs.classes(predicted[classed])
    has_probabilities = set(PROBABILITIES) <= set(table.columns)
    chances = table[list(PROBABILITIES)].to_numpy()[classed] if has_probabilities else None

    def scores(weights: np.ndarray) -> dict[str, np.ndarray]:
        of_known, of_exact = weights[..., classed], weights[..., exact]
        result = _class_scores(confusion_matrix(truth, called, weights=of_known))
        for cut in (5, 10):
            if only is None or f"auroc_{cut}mm" in only:
                result[f"auroc_{cut}mm"] = size_auroc(
                    gt[classed], predicted[classed], cut, of_known
                )
        if chances is not None:
            matrix = confusion_matrix(truth, chances.argmax(1), weights=of_known)
            result["ece"] = expected_calibration_error(chances, truth, weights=of_known)
            result["macro_f1_probability"] = macro_f1(matrix)
            result["weighted_f1_probability"] = weighted_f1(matrix)
        result |= _millimeter_scores(gt[exact], predicted[exact], of_exact)
        return result if only is None else {k: v for k, v in result.items() if k in only}

    return scores


def score_intervals(
    table: pd.DataFrame | Sequence[pd.DataFrame],
    cut_offs: CutOffs = CONTINUOUS,
    *,
    only: Collection[str] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Score a table with 95 % intervals over patients, or the mean over tables of several seeds.

    Args:
        table: Predictions of one seed, or a table for each seed with the same rows in any order.
        cut_offs: Of the predictions.
        only: Names of the scores to compute; all by default.
        resamples: Number of bootstrap resamples.
        seed: Of the bootstrap.

    Raises:
        GatesError: Tables of seeds hold different rows.
    """
    tables = _aligned([table] if isinstance(table, pd.DataFrame) else list(table))
    draws = Resamples.clusters(patients_of(tables[0]), resamples=resamples, seed=seed)
    return draws.intervals([size_scores(table, cut_offs, only=only) for table in tables])


def columns_of(name: str, found: Sequence[float]) -> dict[str, float]:
    """Return a score and the ends of its interval as columns ``name``, with ``_low``, ``_high``.

    Args:
        name: Of the score.
        found: Value, lower and upper end, and perhaps more.
    """
    return dict(zip((name, f"{name}_low", f"{name}_high"), found[:3], strict=True))


def score_differences(
    table: pd.DataFrame | Sequence[pd.DataFrame],
    other: pd.DataFrame | Sequence[pd.DataFrame],
    cut_offs: CutOffs = CONTINUOUS,
    *,
    only: Collection[str] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Difference]:
    """Compare two models on the same rows, paired by patient and, if there are several, by seed.

    Args:
        table: Predictions of the model, or a table for each seed.
        other: Those of the model to compare with.
        cut_offs: Of the predictions of both.
        only: Names of the scores to compute; all by default.
        resamples: Number of bootstrap resamples.
        seed: Of the bootstrap.

    Returns:
        Score -> model minus other.

    Raises:
        GatesError: The tables hold different rows.
    """
    ours = [table] if isinstance(table, pd.DataFrame) else list(table)
    theirs = [other] if isinstance(other, pd.DataFrame) else list(other)
    tables = _aligned([*ours, *theirs])
    draws = Resamples.clusters(patients_of(tables[0]), resamples=resamples, seed=seed)
    functions = [size_scores(table, cut_offs, only=only) for table in tables]
    return draws.differences(functions[: len(ours)], functions[len(ours) :])


def _aligned(tables: list[pd.DataFrame]) -> list[pd.DataFrame]:
    """Return the tables with their rows in the order of the first; compare its keys and sizes."""
    of_frames = all("frame_id" in table and "num_frames" not in table for table in tables)
    keys = ["unique_id", "frame_id"] if of_frames else ["unique_id"]
    indexed = [table.set_index(keys) for table in tables]
    for other_table in indexed:
        if not other_table.index.is_unique:
            raise GatesError(f"{' and '.join(keys)} repeat in predictions; expected one row each")
        if (
            len(other_table) != len(indexed[0])
            or not other_table.index.isin(indexed[0].index).all()
        ):
            raise GatesError(
                f"predictions of {len(other_table)} and {len(indexed[0])} rows hold different"
                f" {keys[-1].removesuffix('_id')}s; compare models on the same ones"
            )
    ordered = [table.loc[indexed[0].index] for table in indexed]
    for other_table in ordered:
        if not np.allclose(other_table["gt"].to_numpy(float), ordered[0]["gt"].to_numpy(float)):
            raise GatesError("predictions to compare have different true sizes; check their data")
    return [table.reset_index() for table in ordered]


def _class_scores(matrix: np.ndarray) -> dict[str, np.ndarray]:
    result = {
        "macro_f1": macro_f1(matrix),
        "weighted_f1": weighted_f1(matrix),
        "accuracy": accuracy(matrix),
        "balanced_accuracy": balanced_accuracy(matrix),
        "quadratic_kappa": quadratic_kappa(matrix),
        "f1_5mm": macro_f1(at_cut_off(matrix, 5)),
        "f1_10mm": macro_f1(at_cut_off(matrix, 10)),
        "weighted_f1_10mm": weighted_f1(at_cut_off(matrix, 10)),
    }
    for name, score in _EACH_CLASS.items():
        for k, values in enumerate(np.moveaxis(score(matrix), -1, 0)):
            result[f"{name}_{CLASS_NAMES[k]}"] = values
    return result


def _millimeter_scores(
    gt: np.ndarray, predicted: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    limits = limits_of_agreement(gt, predicted, weights)
    ratios = ratio_limits(gt, predicted, weights)
    return {
        "mae_mm": mean_absolute_error(gt, predicted, weights),
        "rmse_mm": root_mean_square_error(gt, predicted, weights),
        "mape": mean_relative_error(gt, predicted, weights),
        "bias_mm": bias(gt, predicted, weights),
        "limit_low_mm": limits.low,
        "limit_high_mm": limits.high,
        "limit_low_ratio": ratios.low,
        "limit_high_ratio": ratios.high,
    }


COLUMNS = ("shape", "site", "brand", "distance_mm", "exposure")
SCORES = ("macro_f1", "mape", "mae_mm", "bias_mm", "sensitivity_diminutive", "sensitivity_large")


def subgroup_table(
    objects: pd.DataFrame,
    by: Sequence[str] = COLUMNS,
    *,
    cut_offs: CutOffs = CONTINUOUS,
    scores: Sequence[str] = SCORES,
    minimum: int = 10,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Score all objects, then those of each value of each column.

    Args:
        objects: Object table.
        by: Columns; those that are absent are left out. Numbers are cut at their tertiles.
        cut_offs: Of the predictions.
        scores: Names of `size_scores`.
        minimum: Groups of fewer objects are listed without scores.
        resamples: Number of bootstrap resamples.

    Returns:
        Columns column, group, objects, and each score with ``_low`` and ``_high``.

    Raises:
        GatesError: None of the columns exists.
    """
    present = [name for name in by if name in objects and objects[name].notna().any()]
    if not present:
        raise GatesError(f"the table has none of the columns {', '.join(by)} to group by")
    groups = [("all", "all", np.ones(len(objects), dtype=bool))]
    for name in present:
        labels = _labels(objects[name])
        groups += [(name, str(v), (labels == v).to_numpy()) for v in _sorted_values(labels)]
    rows = []
    for column, group, inside in groups:
        row: dict[str, object] = {"column": column, "group": group, "objects": int(inside.sum())}
        if inside.sum() >= minimum:
            intervals = score_intervals(objects[inside], cut_offs, only=scores, resamples=resamples)
            for score in scores:
                row |= columns_of(score, intervals[score])
        rows.append(row)
    return pd.DataFrame(rows)


def _labels(values: pd.Series) -> pd.Series:
    if not pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
        return values.astype("string").fillna("unknown")
    edges = [-np.inf, *values.quantile([1 / 3, 2 / 3]).tolist(), np.inf]
    names = [f"≤ {edges[1]:.3g}", f"{edges[1]:.3g} to {edges[2]:.3g}", f"> {edges[2]:.3g}"]
    if edges[1] == edges[2]:
        return pd.Series(np.where(values <= edges[1], names[0], names[2]), values.index)
    return pd.cut(values, edges, labels=names).astype("string").fillna("unknown")


def _sorted_values(labels: pd.Series) -> list[str]:
    order = {"≤": 0, ">": 2, "u": 3} if "≤" in "".join(labels.unique()) else {}
    return sorted(labels.unique(), key=lambda label: (order.get(str(label)[0], 1), str(label)))
