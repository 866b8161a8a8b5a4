"""Predicted against true sizes: Bland-Altman, and the scatter with its conformal band."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from endoscopy.evaluation.conformal import SplitConformal
from endoscopy.metrics import CLASS_NAMES, CONTINUOUS, TRUTH, CutOffs, flags_of, ratio_limits
from endoscopy.plots.sizes import CLASS_COLORS, size_axis
from harness.figures.style import GRID, INK, MUTED, TEXT_SIZE, dress, new_figure, place

RATIOS = (0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)


def bland_altman_figure(objects: pd.DataFrame, *, title: str = "Agreement with truth") -> Figure:
    """Plot predicted over true size of each object, with the mean ratio and its limits.

    Errors grow with the size, so that limits in millimeters would be too wide for small polyps and
    too narrow for large ones; ratios have limits that are valid for all (Bland and Altman, 1999).

    Args:
        objects: Object table; lower bounds (``censored``) are left out and counted.
        title: Heading.
    """
    censored = flags_of(objects, "censored")
    gt, predicted = _sizes(objects[~censored])
    figure = new_figure(7.6, 4.3)
    axes = place(figure, 0.65, 0.55, 5.2, 3.2)
    axes.axhline(1, color=MUTED, linewidth=0.9)
    _points(axes, gt, predicted / gt)
    limits = ratio_limits(gt, predicted)
    named = ("mean ratio", "lower limit", "upper limit")
    for name, value in zip(named, (limits.bias, limits.low, limits.high), strict=True):
        style = "-" if name == "mean ratio" else "--"
        axes.axhline(float(value), color=INK, linewidth=1.2, linestyle=style)
        axes.annotate(
            f"{name} {value:.2f}", (1.015, float(value)), va="center",
            xycoords=("axes fraction", "data"), fontsize=TEXT_SIZE, color=INK,
            annotation_clip=False,
        )  # fmt: skip
    size_axis(axes, "x")
    axes.set_xlim(gt.min() / 1.08, gt.max() * 1.08)
    axes.set_yscale("log")
    reach = 1.1 * max(np.abs(np.log(predicted / gt)).max(), abs(np.log(float(limits.low))))
    axes.set_ylim(np.exp(-reach), np.exp(reach))
    inside = [tick for tick in RATIOS if abs(np.log(tick)) <= reach]
    axes.yaxis.set_ticks(inside, [f"{tick:g}" for tick in inside])
    axes.yaxis.set_ticks([], minor=True)
    dress(axes, title=title, x="true size (mm)", y="predicted / true")
    left_out = f", {int(censored.sum())} lower bounds left out" if censored.any() else ""
    _note(figure, f"{len(gt)} objects{left_out}")
    return figure


def size_figure(
    objects: pd.DataFrame,
    conformal: SplitConformal | None = None,
    *,
    cut_offs: CutOffs = CONTINUOUS,
    title: str = "Predicted and true size",
) -> Figure:
    """Plot predicted against true sizes, the conformal band and the cut-offs of the classes.

    Args:
        objects: Object table; lower bounds are drawn as arrows, objects that abstain hollow.
        conformal: Its band is drawn: a true size lies in it with the nominal probability.
        cut_offs: Of the predictions.
        title: Heading.
    """
    censored, abstained = flags_of(objects, "censored"), flags_of(objects, "abstained")
    gt, predicted = _sizes(objects)
    low, high = min(gt.min(), predicted.min()) / 1.12, max(gt.max(), predicted.max()) * 1.12
    figure = new_figure(6.6, 5.1)
    axes = place(figure, 0.65, 0.55, 4.1, 4.1)
    for cut in (TRUTH.small, TRUTH.large):
        axes.axvline(cut, color=GRID, linewidth=1.6, zorder=0)
    for cut in (cut_offs.small, cut_offs.large):
        axes.axhline(cut, color=GRID, linewidth=1.6, zorder=0)
    line = np.array([low, high])
    if conformal is not None:
        factor = np.exp(conformal.half_width)
        axes.fill_between(line, line / factor, line * factor, color=INK, alpha=0.07, linewidth=0)
        axes.annotate(
            f"{conformal.coverage:.0%} band\n÷ or × {factor:.2f}", (1.02, 0.98),
            xycoords="axes fraction", va="top", fontsize=TEXT_SIZE, color=MUTED,
            annotation_clip=False,
        )  # fmt: skip
    axes.plot(line, line, color=INK, linewidth=0.9)
    solid = ~censored & ~abstained
    _points(axes, gt[solid], predicted[solid])
    _points(axes, gt[abstained & ~censored], predicted[abstained & ~censored], hollow=True)
    axes.scatter(gt[censored], predicted[censored], s=34, marker=r"$\rightarrow$", color=MUTED)
    size_axis(axes)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    dress(axes, title=title, x="true size (mm)", y="predicted size (mm)", grid=False)
    for k, name in enumerate(CLASS_NAMES):
        axes.annotate(
            f"truly {name}", (1.02, 0.74 - 0.07 * k), xycoords="axes fraction",
            fontsize=TEXT_SIZE, color=CLASS_COLORS[k], fontweight="bold", annotation_clip=False,
        )  # fmt: skip
    marks = [(censored, "→ at least this size"), (abstained, "hollow: abstains")]
    for k, text in enumerate(text for flags, text in marks if flags.any()):
        axes.annotate(
            text, (1.02, 0.46 - 0.07 * k), xycoords="axes fraction", fontsize=TEXT_SIZE,
            color=MUTED, annotation_clip=False,
        )  # fmt: skip
    _note(figure, f"{len(gt)} objects")
    return figure


def _points(axes: Axes, gt: np.ndarray, y: np.ndarray, *, hollow: bool = False) -> None:
    colors = np.array(CLASS_COLORS)[TRUTH.classes(gt)]
    alpha = float(np.clip(400 / max(len(gt), 1), 0.35, 0.85))
    if hollow:
        axes.scatter(gt, y, s=14, facecolors="none", edgecolors=colors, linewidths=0.9)
    else:
        axes.scatter(gt, y, s=13, c=colors, alpha=alpha, linewidths=0)


def _sizes(objects: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    return objects["gt"].to_numpy(float), objects["predicted_mm"].to_numpy(float)


def _note(figure: Figure, text: str) -> None:
    figure.text(0.985, 0.965, text, ha="right", va="top", fontsize=TEXT_SIZE, color=MUTED)
