"""Loss over seconds of prompts, of block gates and their rivals."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from apps.language.seer.prompt_losses import DENSE, LOSS, SECONDS
from harness.evidence import Row
from harness.figures.style import MUTED, TEXT_SIZE, colors_of, dress, head, new_figure, place

WIDE, TALL, GAP = 2.9, 3.0, 0.75  # inches of a panel, and between two
MARKERS = {"o": "●", "s": "■", "D": "◆", "^": "▲"}  # of fractions in a panel, and as letters


def loss_figure(rows: Mapping[Any, Sequence[Row]]) -> Figure:
    """Draw loss over seconds, a panel for each length of prompts and a marker for each fraction.

    Args:
        rows: By prompts, which have a length and a fraction of the blocks.
    """
    panels: dict[int, dict[float, Sequence[Row]]] = {}
    for prompts, found in rows.items():
        panels.setdefault(prompts.length, {})[prompts.fraction] = found
    methods = [row.method for found in rows.values() for row in found if row.metric == SECONDS]
    colors = colors_of(dict.fromkeys(methods), muted=[DENSE])
    figure = new_figure(0.9 + len(panels) * (WIDE + GAP) + 1.2, TALL + 1.5)
    for number, (length, of) in enumerate(panels.items()):
        axes = place(figure, 0.7 + number * (WIDE + GAP), 0.55, WIDE, TALL)
        for marker, found in zip(MARKERS, of.values(), strict=False):
            of_metric = {(r.metric, r.method): r for r in found if not r.versus}
            for method, color in colors.items():
                x, y = (of_metric.get((metric, method)) for metric in (SECONDS, LOSS))
                if x is None:
                    continue
                if y is None:  # reads everything
                    axes.axvline(x.value, color=MUTED, linewidth=0.9, linestyle="--")
                    continue
                axes.hlines(y.value, x.low, x.high, color=color, linewidth=1, alpha=0.5)
                axes.vlines(x.value, y.low, y.high, color=color, linewidth=1, alpha=0.5)
                axes.scatter([x.value], [y.value], s=26, color=color, marker=marker, label=method)
        axes.axhline(0, color=MUTED, linewidth=0.9)
        marked = zip(MARKERS.values(), of, strict=False)
        title = f"{length:,} tokens: " + ", ".join(f"{m} {part:.0%}" for m, part in marked)
        dress(axes, title=title, x="CPU seconds", y="" if number else "nats over dense")
    points, labels = figure.axes[0].get_legend_handles_labels()
    names = [*dict.fromkeys(labels)]  # of the points of the first fraction
    figure.axes[-1].legend(
        [points[labels.index(name)] for name in names], names, loc="upper left",
        bbox_to_anchor=(1.03, 1.0), frameon=False, fontsize=TEXT_SIZE,
    )  # fmt: skip
    head(figure, "Loss over seconds of prompts", "dashed: the model as it comes, which reads all")
    return figure
