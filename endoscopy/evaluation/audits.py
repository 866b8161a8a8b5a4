"""Audits: what a predictor of sizes leans on.

Each takes a predictor and frames and returns rows.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd

from core_gates.errors import GatesError
from endoscopy.data.streams import box_masks, boxes_of, ellipse_masks
from endoscopy.evaluation.rendered_frames import (
    FrameStack,
    Predictor,
    masked_median,
    predictions_of,
)
from endoscopy.evaluation.size_scores import columns_of, score_differences, score_intervals
from endoscopy.metrics import CONTINUOUS, CutOffs, object_table
from harness.evidence import Bar, Row, holm

SCORES = ("macro_f1", "mape", "bias_mm")


def condition_rows(
    conditions: Mapping[str, pd.DataFrame],
    *,
    reference: str,
    cut_offs: CutOffs = CONTINUOUS,
    scores: Sequence[str] = SCORES,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Score the predictions under every condition, and their change from one of them.

    Args:
        conditions: Name -> predictions of frames. Changes are paired where a condition has the
            objects of the reference; other conditions are compared as independent samples.
        reference: Name of the condition that the others are compared with.
        cut_offs: Of the predictions.
        scores: Names of `endoscopy.evaluation.size_scores.size_scores`.
        resamples: Number of bootstrap resamples.

    Returns:
        One row per condition: condition, objects, paired, and for each score ``{score}`` and
        ``{score}_change`` with ``_low`` and ``_high``, and ``{score}_p_value`` of paired changes.
    """
    tables = {name: object_table(predictions) for name, predictions in conditions.items()}
    base = tables[reference]
    of_base = score_intervals(base, cut_offs, only=scores, resamples=resamples)
    rows = []
    for name, table in tables.items():
        values = score_intervals(table, cut_offs, only=scores, resamples=resamples)
        paired, gaps = set(table["unique_id"]) == set(base["unique_id"]), {}
        if name != reference and paired:
            gaps = score_differences(table, base, cut_offs, only=scores, resamples=resamples)
        row: dict[str, object] = {"condition": name, "objects": len(table), "paired": paired}
        for score in scores:
            row |= columns_of(score, values[score])
            if score in gaps:
                row |= columns_of(f"{score}_change", gaps[score])
                row[f"{score}_p_value"] = gaps[score].p
            elif name != reference:
                change = _independent(values[score][:3], of_base[score][:3])
                row |= columns_of(f"{score}_change", change)
        rows.append(row)
    return pd.DataFrame(rows)


def _independent(
    value: tuple[float, float, float], other: tuple[float, float, float]
) -> tuple[float, float, float]:
    """Return the difference of two independent scores, its half widths added in quadrature."""
    gap = value[0] - other[0]
    down = np.hypot(value[0] - value[1], other[2] - other[0])
    up = np.hypot(value[2] - value[0], other[0] - other[1])
    return gap, float(gap - down), float(gap + up)


def mask_audit(
    predict: Predictor,
    frames: FrameStack,
    *,
    predicted: Mapping[str, np.ndarray] | None = None,
    cut_offs: CutOffs = CONTINUOUS,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Replace the true masks by those available in practice.

    Args:
        predict: Takes frames, true masks in training.
        frames: Held-out frames with true masks and boxes.
        predicted: Name -> masks (N, H, W) of a segmenter; the boxes then follow them. Where such
            a mask is empty, the true box is filled.
        cut_offs: Of the predictions.
        resamples: Number of bootstrap resamples.

    Returns:
        Rows ``true mask``, ``box``, ``ellipse in the box`` and the names of ``predicted``, with
        ``overlap``, the mean intersection over union with the true mask; see
        `condition_rows`.
    """
    height, width = frames.masks.shape[1:]
    filled = box_masks(frames.boxes, height, width)
    substitutes = {
        "true mask": frames,
        "box": frames.with_(masks=filled),
        "ellipse in the box": frames.with_(masks=ellipse_masks(frames.boxes, height, width)),
    }
    for name, masks in (predicted or {}).items():
        empty = np.flatnonzero(~masks.any((1, 2)))
        masks, boxes = masks.copy(), boxes_of(masks)
        masks[empty], boxes[empty] = filled[empty], frames.boxes[empty]
        substitutes[name] = frames.with_(masks=masks, boxes=boxes)
    rows = condition_rows(
        {name: predictions_of(predict, substitute) for name, substitute in substitutes.items()},
        reference="true mask",
        cut_offs=cut_offs,
        resamples=resamples,
    )
    overlaps = [_overlap(substitute.masks, frames.masks) for substitute in substitutes.values()]
    return rows.assign(overlap=overlaps)


def box_audit(
    predict: Predictor,
    frames: FrameStack,
    *,
    error: float = 0.2,
    cut_offs: CutOffs = CONTINUOUS,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Scale the boxes by 1 ± ``error`` and shift them by ``error`` of their sides.

    Masks are drawn again in the wrong boxes, so that masks and boxes agree. The reference
    has the right boxes and masks drawn in the same way.

    Args:
        predict: Takes frames.
        frames: Held-out frames.
        error: Relative error of the boxes.
        cut_offs: Of the predictions.
        resamples: Number of bootstrap resamples.

    Returns:
        Rows of `condition_rows` and ``log_change``, the mean over frames of
        |log predicted - log predicted with the right box|.
    """
    perturbations: dict[str, tuple[float, tuple[float, float]]] = {
        "right box": (1.0, (0.0, 0.0)),
        f"box {1 - error:.0%}": (1 - error, (0.0, 0.0)),
        f"box {1 + error:.0%}": (1 + error, (0.0, 0.0)),
        f"shift {error:.0%} right": (1.0, (error, 0.0)),
        f"shift {error:.0%} down": (1.0, (0.0, error)),
    }
    height, width = frames.masks.shape[1:]
    conditions = {}
    for name, (scale, shift) in perturbations.items():
        boxes = perturbed_boxes(frames.boxes, height, width, scale=scale, shift=shift)
        changed = frames.with_(boxes=boxes, masks=ellipse_masks(boxes, height, width))
        conditions[name] = predictions_of(predict, changed)
    rows = condition_rows(conditions, reference="right box", cut_offs=cut_offs, resamples=resamples)
    logs = [np.log(condition["predicted_mm"].to_numpy(float)) for condition in conditions.values()]
    return rows.assign(log_change=[float(np.abs(log_sizes - logs[0]).mean()) for log_sizes in logs])


def perturbed_boxes(
    boxes: np.ndarray,
    height: int,
    width: int,
    *,
    scale: float = 1.0,
    shift: tuple[float, float] = (0.0, 0.0),
) -> np.ndarray:
    """Scale boxes about their centers and shift them, then clip them to the frame.

    Args:
        boxes: (N, 4) pixels xmin, ymin, xmax, ymax, maxima exclusive.
        height: Of the frames.
        width: Of the frames.
        scale: Factor on both sides, 0.8 or 1.2 for an error of 20 %.
        shift: Right and down, in sides of the box.

    Returns:
        (N, 4), at least one pixel wide and high.
    """
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    sides = boxes[:, 2:] - boxes[:, :2]
    center = center + sides * np.asarray(shift)
    limit = np.array([width, height], dtype=float)
    low = np.clip(center - scale * sides / 2, 0, limit - 1)
    high = np.clip(center + scale * sides / 2, low + 1, limit)
    return np.concatenate([low, high], 1)


def _overlap(masks: np.ndarray, true: np.ndarray) -> float:
    both, either = (masks & true).sum((1, 2)), (masks | true).sum((1, 2))
    return float((both / np.maximum(either, 1)).mean())


Per = Literal["frame", "polyp", "all"]


def size_proxy(masks: np.ndarray, depths: np.ndarray) -> np.ndarray:
    """Return the extent of each mask times its median depth (N,), proportional to the size."""
    return np.sqrt(masks.mean((1, 2))) * masked_median(depths, masks)


def relative_depths(depths: np.ndarray) -> np.ndarray:
    """Return each frame's depth over its median, which loses the scale; 0 where unknown."""
    medians = np.array([np.median(depth[depth > 0]) for depth in depths])
    return depths / medians[:, None, None]


def fit_scale(proxy: np.ndarray, gt: np.ndarray) -> float:
    """Return the scale s of least squares |s proxy - gt|²."""
    return float(proxy @ gt / (proxy @ proxy))


def oracle_scales(proxy: np.ndarray, gt: np.ndarray, objects: np.ndarray, per: Per) -> np.ndarray:
    """Return the scale of each frame (N,) that fits the true sizes.

    Args:
        proxy: (N,) size up to the scale, of `size_proxy`.
        gt: (N,) true sizes, mm.
        objects: (N,) identity of the object.
        per: One scale for each frame, each polyp, or all frames.
    """
    if per == "frame":
        return gt / proxy
    if per == "all":
        return np.full(len(gt), fit_scale(proxy, gt))
    _, index = np.unique(objects, return_inverse=True)
    scales = np.bincount(index, proxy * gt) / np.bincount(index, proxy**2)
    return scales[index]


def oracle_scale_audit(
    predict: Predictor,
    frames: FrameStack,
    relative_depths: np.ndarray,
    *,
    global_scale: float,
    masks: Mapping[str, np.ndarray] | None = None,
    cut_offs: CutOffs = CONTINUOUS,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Give the predictor relative depth, scaled by the truth, with true and with other masks.

    Scales come from the true masks. The predictor was trained on metric depth, or on relative
    depth with scales computed in the same way.

    Args:
        predict: Reads ``depths`` and ``masks`` of frames.
        frames: Held-out frames, with true masks.
        relative_depths: (N, H, W) positive depth up to a scale of each frame.
        global_scale: The one scale, `fit_scale` over training objects.
        masks: Name -> other masks (N, H, W), such as predicted ones.
        cut_offs: Of the predictions.
        resamples: Number of bootstrap resamples.

    Returns:
        Rows of `condition_rows` named ``one scale``, ``true scale of each polyp`` and ``true
        scale of each frame``, with ``, NAME`` for other masks; the first is the reference.
    """
    proxy = size_proxy(frames.masks, relative_depths)
    scales = {"one scale": np.full(len(frames), global_scale)}
    for per in ("polyp", "frame"):
        scales[f"true scale of each {per}"] = oracle_scales(
            proxy,
            frames.gt,
            frames.objects,
            per,  # type: ignore[arg-type]
        )
    conditions = {}
    for mask_name, mask in ({"": frames.masks} | dict(masks or {})).items():
        for name, scale in scales.items():
            scaled = frames.with_(masks=mask, depths=relative_depths * scale[:, None, None])
            label = f"{name}, {mask_name}" if mask_name else name
            conditions[label] = predictions_of(predict, scaled)
    return condition_rows(conditions, reference="one scale", cut_offs=cut_offs, resamples=resamples)


def shortcut_audit(
    predict: Predictor,
    tests: Mapping[float, FrameStack],
    *,
    trained_rho: float = 0.8,
    cut_offs: CutOffs = CONTINUOUS,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Test one predictor where log distance shifts by ``rho`` times log size, for several rho.

    Args:
        predict: Trained at ``trained_rho``.
        tests: rho -> frames of held-out objects; with the trained rho among them. Changes are
            paired if all have the same objects.
        trained_rho: Correlation in training.
        cut_offs: Of the predictions.
        resamples: Number of bootstrap resamples.

    Returns:
        Rows ``rho 0.8``, ``rho 0``, … of `condition_rows`; changes are from the trained
        rho.

    Raises:
        GatesError: The trained rho is not tested.
    """
    if trained_rho not in tests:
        raise GatesError(f"the tests have rho {sorted(tests)}, expected the trained {trained_rho}"
                         " among them")  # fmt: skip
    return condition_rows(
        {
            f"rho {rho:g}": predictions_of(predict, tests[rho])
            for rho in sorted(tests, key=lambda rho: abs(rho - trained_rho))
        },
        reference=f"rho {trained_rho:g}",
        cut_offs=cut_offs,
        resamples=resamples,
    )


def partition_audit(
    predictions: pd.DataFrame,
    *,
    cue: str = "distance_mm",
    cut_offs: CutOffs = CONTINUOUS,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Score objects whose cue agrees with the habit, and those whose cue does not, separately.

    The habit is the sign of the rank correlation of cue and size over all objects; an object is
    consistent if its cue and its size lie on those sides of their medians that the habit implies.

    Args:
        predictions: Frames with gt, predicted_mm and the cue, a number.
        cue: Column that a shortcut could use.
        cut_offs: Of the predictions.
        resamples: Number of bootstrap resamples.

    Returns:
        Rows consistent and inconsistent of `condition_rows`, and the column ``correlation``.

    Raises:
        GatesError: The cue is missing, or one part has no object.
    """
    if cue not in predictions:
        raise GatesError(f"the predictions lack the column {cue} to partition by")
    objects = predictions.groupby("unique_id").agg(gt=("gt", "first"), cue=(cue, "median"))
    correlation = float(objects["gt"].corr(objects["cue"], method="spearman"))
    side = (objects["gt"] > objects["gt"].median()) == (objects["cue"] > objects["cue"].median())
    consistent = objects.index[side == (correlation >= 0)]
    inside = predictions["unique_id"].isin(consistent).to_numpy()
    if inside.all() or not inside.any():
        raise GatesError(f"all objects lie on one side of the habit of {cue}; nothing to compare")
    rows = condition_rows(
        {"consistent": predictions[inside], "inconsistent": predictions[np.logical_not(inside)]},
        reference="consistent",
        cut_offs=cut_offs,
        resamples=resamples,
    )
    return rows.assign(correlation=correlation)


NAMES = {
    "ladder": "features",
    "planted": "method",
    "generalization": "variant",
}
"""Column that names the rows of a table, by its first word; ``condition`` for audits."""

PLAIN = ("overlap", "log_change", "correlation")
LADDER_MAPE, LADDER_F1 = 0.03, 0.06
"""How far the ladder may be from the published one."""


def table_rows(name: str, table: pd.DataFrame, *, task: str) -> list[Row]:
    """Return every score of a table of an audit or study, with its interval.

    Args:
        name: Of the audit or study, such as ``masks`` or ``ladder_order``.
        table: One row per condition, method or claim.
        task: Of the rows.
    """
    if name == "ladder_order":
        claims = table["lower"] + " " + table["relation"] + " " + table["upper"]
        held = zip(claims, table["holds"], strict=True)
        return [Row(claim, task, "holds", float(holds)) for claim, holds in held]
    rows: list[Row] = []
    label = NAMES.get(name.partition("_")[0], "condition")
    figures = [c for c in table.columns if f"{c}_low" in table or c in PLAIN]
    for figure in figures:
        metric = figure.removesuffix("_change").removesuffix("_difference")
        metric = "ranking_auc" if figure == "gain" else metric
        if figure in PLAIN or metric == figure:  # compares nothing
            rows += _rows(table, label, figure, Row("", task, figure, np.nan))
            continue
        paired = table.get("paired", pd.Series(True, table.index))
        reference = str(table.loc[table[figure].isna(), label].iloc[0])
        rows += _rows(table[~paired], label, figure, Row("", task, figure, np.nan))
        rows += _rows(table[paired], label, figure, Row("", task, metric, np.nan, versus=reference))
    return rows


def _rows(table: pd.DataFrame, label: str, figure: str, form: Row) -> list[Row]:
    """Return one row per score of a column, like ``form``; p is corrected where there is one."""
    finite = table[np.isfinite(table[figure])]
    none = pd.Series(np.nan, finite.index)
    low, high = (finite.get(f"{figure}_{end}", none) for end in ("low", "high"))
    p = holm(finite.get(f"{form.metric}_p_value", none) if form.versus else none)
    units = finite["objects" if "objects" in finite else "seeds"].astype(int)
    cells = zip(finite[label].astype(str), finite[figure], low, high, units, p, strict=True)
    return [
        form._replace(method=name, value=value, low=down, high=up, n=n, p=p)
        for name, value, down, up, n, p in cells
    ]


def ladder_bars(table: pd.DataFrame, order: pd.DataFrame, *, prefix: str = "") -> list[Bar]:
    """Return how far the ladder is from the published one, except for the constant.

    Args:
        table: Of `endoscopy.evaluation.baselines.ladder`.
        order: Of `endoscopy.evaluation.baselines.ladder_order`.
        prefix: Put before the names of the bars.
    """
    table = table[table["features"] != "constant"]
    bars = []
    for score, most in (("mape", LADDER_MAPE), ("macro_f1", LADDER_F1)):
        gap = float((table[score] - table[f"{score}_published"]).abs().max())
        name = f"{prefix}ladder, largest distance of {score} from the prototype"
        bars.append(Bar(name, gap, "<=", most))
    name = f"{prefix}ladder, fraction of the claimed order that holds"
    return [*bars, Bar(name, float(order["holds"].mean()), ">=", 1.0)]
