"""Figures of the evaluation of polyp sizing: agreement of sizes, classes, forests of its tables."""

from collections.abc import Iterator, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from endoscopy.bundles.sizing_bundle import SizingBundle
from endoscopy.evaluation.conformal import SplitConformal
from endoscopy.metrics import (
    CLASS_NAMES,
    CONTINUOUS,
    PROBABILITIES,
    TRUTH,
    CutOffs,
    confusion_matrix,
    expected_calibration_error,
    flags_of,
    has_known_class,
    object_table,
    ratio_limits,
    reliability,
    sensitivity,
)
from harness.figures.bars import calibration_figure
from harness.figures.forest import Estimate, Panel, forest_figure
from harness.figures.style import (
    AMBER,
    BLUE,
    GRID,
    INK,
    MUTED,
    ORANGE,
    SHARES,
    TEXT_SIZE,
    TITLE_SIZE,
    dress,
    new_figure,
    place,
)

CLASS_COLORS = (BLUE, AMBER, ORANGE)  # diminutive, small, large


def size_axis(axes: Axes, which: str = "both") -> None:
    """Make axes logarithmic in millimeters, ticks at clinical sizes."""
    ticks = [1, 2, 3, 5, 10, 20, 30]
    for name in ("x", "y") if which == "both" else (which,):
        getattr(axes, f"set_{name}scale")("log")
        axis = getattr(axes, f"{name}axis")
        axis.set_ticks(ticks, [str(tick) for tick in ticks])
        axis.set_ticks([], minor=True)


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
    for name, value, style in (
        ("mean ratio", limits.bias, "-"),
        ("lower limit", limits.low, "--"),
        ("upper limit", limits.high, "--"),
    ):
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


def confusion_figure(matrix: np.ndarray, *, title: str = "True and predicted class") -> Figure:
    """Show counts, colored by their fraction of the true class.

    Args:
        matrix: (3, 3), rows true and columns predicted.
        title: Heading.
    """
    figure = new_figure(5.3, 4.0)
    axes = place(figure, 1.15, 0.2, 3.0, 2.7)
    support = matrix.sum(1, keepdims=True)
    shares = np.divide(matrix, support, out=np.zeros_like(matrix, dtype=float), where=support > 0)
    edges = np.arange(4) - 0.5
    axes.pcolormesh(edges, edges, shares, cmap=mpl.colormaps[SHARES], vmin=0, vmax=1.25,
                    edgecolors="white", linewidth=2.5)  # fmt: skip
    axes.invert_yaxis()
    for (row, column), count in np.ndenumerate(matrix):
        color = "white" if shares[row, column] > 0.6 else INK
        axes.text(column, row - 0.08, f"{count:g}", ha="center", va="center", color=color,
                  fontsize=TITLE_SIZE + 2, fontweight="bold")  # fmt: skip
        axes.text(column, row + 0.22, f"{shares[row, column]:.0%}", ha="center", va="center",
                  color=color, fontsize=TEXT_SIZE - 0.5)  # fmt: skip
    axes.set_xticks(range(3), CLASS_NAMES, fontsize=TEXT_SIZE, color=INK)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_yticks(range(3), CLASS_NAMES, fontsize=TEXT_SIZE, color=INK)
    axes.set_xlabel("predicted", fontsize=TEXT_SIZE, color=MUTED)
    axes.set_ylabel("true", fontsize=TEXT_SIZE, color=MUTED)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    for row, value in enumerate(sensitivity(matrix)):
        axes.annotate(f"n = {support[row, 0]:g}\nrecall {value:.0%}", (2.58, row), va="center",
                      fontsize=TEXT_SIZE, color=INK, annotation_clip=False)  # fmt: skip
    figure.text(0.02, 0.955, title, fontsize=TITLE_SIZE, fontweight="bold", color=INK, va="top")
    return figure


def reliability_figure(
    table: pd.DataFrame, *, error: float | None = None, title: str = "Reliability"
) -> Figure:
    """Plot accuracy over confidence; the area of a mark is its number of samples.

    Args:
        table: Of `endoscopy.metrics.reliability`.
        error: Expected calibration error, written into the plot.
        title: Heading.
    """
    return calibration_figure(
        table["confidence"],
        table["accuracy"],
        table["count"],
        error=error,
        samples="objects",
        x="confidence",
        y="fraction correct",
        title=title,
    )


NAMES = {
    "macro_f1": "macro F1",
    "mape": "relative error (MAPE)",
}


def ladder_figure(table: pd.DataFrame, *, title: str = "Which cues determine the size") -> Figure:
    """Plot MAPE and macro F1 of every rung of `endoscopy.evaluation.baselines.ladder`."""
    panels = []
    for score in ("mape", "macro_f1"):
        estimates = [
            Estimate(
                row["features"], row[score], row[f"{score}_low"], row[f"{score}_high"],
                ORANGE if row["exposure"] == "agc" else BLUE, target=row[f"{score}_published"],
            )
            for _, row in table.iterrows()
        ]  # fmt: skip
        panels.append(Panel(estimates, NAMES[score], limits=(0, 1 if score == "macro_f1" else 0.7)))
    note = (
        f"{int(table['objects'].iloc[0])} objects, 95 % intervals; orange: automatic exposure;"
        " diamonds: prototype"
    )
    return forest_figure(panels, title=title, note=note)


def subgroup_figure(
    table: pd.DataFrame,
    *,
    scores: Sequence[str] = ("macro_f1", "mape"),
    title: str = "Subgroups",
) -> Figure:
    """Plot scores of subgroups; the line is the score of all objects.

    Args:
        table: Of `endoscopy.evaluation.size_scores.subgroup_table`.
        scores: Panels.
        title: Heading.
    """
    panels = []
    for score in scores:
        overall = float(table.loc[table["column"] == "all", score].iloc[0])
        estimates = []
        for column, group in table.groupby("column", sort=False):
            if column != "all":
                estimates.append(Estimate(str(column).removesuffix("_mm"), heading=True))
            for _, row in group.iterrows():
                few = pd.isna(row[score])
                unit = " mm" if str(column).endswith("_mm") else ""
                label = f"{row['group']}{unit} (n = {row['objects']})"
                estimates.append(
                    Estimate(label, note="too few") if few
                    else Estimate(label, row[score], row[f"{score}_low"], row[f"{score}_high"])
                )  # fmt: skip
        panels.append(Panel(estimates, NAMES.get(score, score), zero=overall))
    return forest_figure(panels, title=title, note="95 % intervals; line: all objects")


Captioned = tuple[Figure, str]


def agreement_figures(
    frames: pd.DataFrame, bundle: SizingBundle, cut_offs: CutOffs
) -> Iterator[Captioned]:
    """Yield size, Bland-Altman, confusion and reliability of one seed's test objects.

    Args:
        frames: Predictions of frames, perhaps with ``reasons``.
        bundle: The network.
        cut_offs: Of the predictions.
    """
    objects = object_table(frames)
    yield (
        size_figure(objects, bundle.conformal, cut_offs=cut_offs),
        "Median over the frames of every object.",
    )
    yield (
        bland_altman_figure(objects),
        "Predicted over true size; dashed: 95 % limits of agreement of the ratios.",
    )
    objects = objects[has_known_class(objects["gt"], flags_of(objects, "censored"))]
    truth = TRUTH.classes(objects["gt"])
    matrix = confusion_matrix(truth, cut_offs.classes(objects["predicted_mm"]))
    yield confusion_figure(matrix), f"Size classes; cut-offs of predictions: {cut_offs}."
    chances = _probabilities(objects, bundle)
    if chances is not None:
        error = float(expected_calibration_error(chances, truth))
        yield (
            reliability_figure(reliability(chances, truth), error=error),
            "Class probabilities implied by the calibration objects.",
        )


def _probabilities(objects: pd.DataFrame, bundle: SizingBundle) -> np.ndarray | None:
    if set(PROBABILITIES) <= set(objects.columns):
        return objects[list(PROBABILITIES)].to_numpy(float)
    if bundle.conformal is None:
        return None
    return bundle.conformal.probabilities(objects["predicted_mm"].to_numpy(float))
