"""Figures of ``gates study evomoe``: curves while training, and what experts read."""

import json
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from apps.study.evomoe_pieces import KINDS
from core_gates.errors import GatesError
from harness.experiment import Run
from harness.figures.curves import draw_seeds, name_lines
from harness.figures.style import SHARES, colors_of, dress, head, new_figure, place
from harness.report.page import Page
from studies.evomoe import budget_training

FILE, SECONDS = "curves.json", "CPU seconds of training"
COLUMNS = (*budget_training.COLUMNS, SECONDS)  # of a curve
PANELS = {
    "EvoMoE and its rivals": ("evomoe", "dense", "switch", "base", "hash", "top2", "stable"),
    "EvoMoE without one of its parts": ("evomoe", "no-spawn", "no-mask", "no-anneal"),
}
AXES = {"FLOPs": "GFLOPs of training", "updates": "updates", SECONDS: "CPU seconds"}
PER_ROW = 3


def draw(page: Page, run: Run) -> None:
    """Add curves, and what experts read, to the report.

    Args:
        page: The report.
        run: Of the study.

    Raises:
        GatesError: The file of the curves is missing or damaged.
    """
    path = run.folder / FILE
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        curves = {name: np.array(points, dtype=float) for name, points in kept["curves"].items()}
        kinds = {name: np.array(counts, dtype=float) for name, counts in kept["kinds"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise GatesError(f"{path} is damaged ({error!r}): run the study again") from error
    rows = [[name, seed, *row] for name, curve in curves.items()
            for seed, points in enumerate(curve.tolist()) for row in points]  # fmt: skip
    page.section("Curves").figure(
        curve_figure(curves),
        "Bits of held-out bytes while training; median and range over seeds.",
        name="curves",
        table=(("method", "seed", *COLUMNS), rows),
    )
    if kinds:
        page.section("What experts read").figure(
            kinds_figure(kinds),
            "First layer with experts, first seed: of the bytes of a kind, the fraction that each "
            "expert computes, in evaluation.",
            name="kinds",
        )


def curve_figure(curves: Mapping[str, np.ndarray]) -> Figure:
    """Draw held-out bits over FLOPs, over updates and over seconds.

    Args:
        curves: Method -> (seeds, points, 5).
    """
    groups = {title: [n for n in names if n in curves] for title, names in PANELS.items()}
    groups = {title: names for title, names in groups.items() if names and names != ["evomoe"]} or {
        "EvoMoE": list(curves)
    }
    figure = new_figure(11.2, 0.5 + 3.1 * len(groups))
    bits = COLUMNS.index("held-out bits")
    for row, (title, names) in enumerate(groups.items()):
        colors = colors_of(names)
        for k, (column, label) in enumerate(AXES.items()):
            bottom = 3.1 * (len(groups) - 1 - row) + 0.55
            axes, ends = place(figure, 0.65 + 3.15 * k, bottom, 2.7, 2.1), {}
            for name in names:
                x = curves[name][..., COLUMNS.index(column)].mean(0)
                x = x / 1e9 if column == "FLOPs" else x
                ends[name] = draw_seeds(axes, x, curves[name][..., bits], colors[name])
            dress(axes, title=title if k == 0 else "", x=label, y="" if k else "bits")
            axes.margins(x=0)
        name_lines(axes, ends, colors)
    head(figure, "Held-out bits while training")
    return figure


def kinds_figure(kinds: Mapping[str, np.ndarray]) -> Figure:
    """Draw which experts compute bytes of which kind.

    Args:
        kinds: Method -> tokens (E, 6).
    """
    names: Sequence[str] = list(kinds)
    rows, columns = -(-len(names) // PER_ROW), min(PER_ROW, len(names))
    figure = new_figure(1.0 + 2.7 * columns, 0.6 + 2.9 * rows)
    for position, name in enumerate(names):
        row, column = divmod(position, PER_ROW)
        axes = place(figure, 0.75 + 2.7 * column, 0.95 + 2.9 * (rows - 1 - row), 2.1, 1.6)
        total = np.maximum(kinds[name].sum(0), 1)
        axes.imshow(kinds[name] / total, SHARES, vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(KINDS)), KINDS, rotation=45, ha="right")
        dress(axes, title=name, y="expert" if column == 0 else "", grid=False)
    head(figure, "What experts read")
    return figure
