"""Forest plots of the tables of the evaluation: ladder, honest table, subgroups, audits."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from harness.figures.forest import Estimate, Panel, forest_figure
from harness.figures.style import BLUE, GREEN, MUTED, ORANGE

NAMES = {
    "macro_f1": "macro F1",
    "mape": "relative error (MAPE)",
    "mae_mm": "absolute error (mm)",
    "bias_mm": "bias (mm)",
    "sensitivity_large": "large ones found",
    "accuracy": "accuracy",
    "ranking_auc": "ranking AUC",
}
LOWER_IS_BETTER = ("mape", "mae_mm")


def ladder_figure(table: pd.DataFrame, *, title: str = "What tells the size") -> Figure:
    """Plot MAPE and macro F1 of every rung of :func:`endoscopy.evaluation.ladder.ladder`."""
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


def honest_figure(
    table: pd.DataFrame,
    *,
    scores: Sequence[str] = ("macro_f1", "mape"),
    title: str = "Do gates help?",
) -> Figure:
    """Plot the differences of the honest table from the plain network.

    Args:
        table: Of :func:`endoscopy.evaluation.honest_table.honest_table`.
        scores: Panels.
        title: Heading.
    """
    panels = []
    for score in scores:
        estimates = []
        for size, group in table[table["score"] == score].groupby("train_objects", sort=True):
            base = group.loc[group["difference"].isna(), "value"].iloc[0]
            estimates.append(
                Estimate(f"{size} training objects", note=f"plain {base:.3f}", heading=True)
            )
            estimates += [
                Estimate(
                    row["variant"], row["difference"], row["difference_low"],
                    row["difference_high"], _verdict_color(row["verdict"]),
                )
                for _, row in group[group["difference"].notna()].iterrows()
            ]  # fmt: skip
        better = "left" if score in LOWER_IS_BETTER else "right"
        panels.append(Panel(estimates, f"{NAMES.get(score, score)}: difference, {better} is better",
                            zero=0.0, signed=True))  # fmt: skip
    note = (
        f"difference from plain, {int(table['seeds'].min())} seeds,"
        f" {int(table['test_objects'].iloc[0])} test objects, 95 % intervals; green better,"
        " orange worse after Holm correction"
    )
    return forest_figure(panels, title=title, note=note, width=2.9)


def subgroup_figure(
    table: pd.DataFrame,
    *,
    scores: Sequence[str] = ("macro_f1", "mape"),
    title: str = "Subgroups",
) -> Figure:
    """Plot scores of subgroups; the line is the score of all objects.

    Args:
        table: Of :func:`endoscopy.evaluation.subgroups.subgroup_table`.
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


def audit_figure(
    table: pd.DataFrame,
    *,
    scores: Sequence[str] = ("macro_f1", "mape"),
    title: str = "Audit",
) -> Figure:
    """Plot the conditions of an audit; the line is the condition that the others compare with.

    Args:
        table: Of an audit in :mod:`endoscopy.evaluation.audits`.
        scores: Panels.
        title: Heading.
    """
    panels = []
    for score in scores:
        change = table[f"{score}_change"]
        reference = float(table.loc[change.isna(), score].iloc[0])
        estimates = [
            Estimate(
                row["condition"], row[score], row[f"{score}_low"], row[f"{score}_high"],
                MUTED if pd.isna(row[f"{score}_change"]) else BLUE,
            )
            for _, row in table.iterrows()
        ]  # fmt: skip
        panels.append(Panel(estimates, NAMES.get(score, score), zero=reference))
    return forest_figure(panels, title=title, note="95 % intervals; line: the reference in gray")


def study_figure(table: pd.DataFrame, *, score: str, names: str, title: str) -> Figure:
    """Plot one score of a study over its methods or variants.

    Args:
        table: One row a method: ``score``, with ``_low`` and ``_high``.
        score: Column.
        names: Column of the labels.
        title: Heading.
    """
    estimates = [
        Estimate(str(row[names]), row[score], row[f"{score}_low"], row[f"{score}_high"])
        for _, row in table.iterrows()
    ]
    zero = 0.5 if score.endswith("auc") else None
    note = f"{int(table['seeds'].min())} seeds, 95 % intervals" + ("; line: chance" if zero else "")
    return forest_figure(
        [Panel(estimates, NAMES.get(score, score), zero=zero)], title=title, note=note, width=3.4
    )


def _verdict_color(verdict: str) -> str:
    return {"better": GREEN, "worse": ORANGE}.get(verdict, BLUE)
