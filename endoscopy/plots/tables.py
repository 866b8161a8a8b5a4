"""Forest plots of the tables of the evaluation: the ladder of cues, and subgroups."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from harness.figures.forest import Estimate, Panel, forest_figure
from harness.figures.style import BLUE, ORANGE

NAMES = {
    "macro_f1": "macro F1",
    "mape": "relative error (MAPE)",
}


def ladder_figure(table: pd.DataFrame, *, title: str = "Which cues determine the size") -> Figure:
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
