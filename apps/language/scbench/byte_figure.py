"""Accuracy over the bytes that a cache holds."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from apps.language.scbench.asking import FULL
from apps.language.scbench.verdicts import Verdict
from harness.figures.style import TEXT_SIZE, colors_of, dress, head, new_figure, place
from harness.report.page import Page

WIDE, TALL, GAP = 3.6, 2.6, 0.95  # inches of a panel
LINE = 0.2  # inches of a name
MARKERS = "osD^vP"
COLUMNS = ("task", "policy", "bytes held of full", "accuracy", "low", "high", "ranked")


def add_bytes(page: Page, verdicts: Sequence[Verdict]) -> None:
    """Add a section with accuracy over bytes to a page; the CSV has every number."""
    table = [
        [verdict.title, row.method, verdict.bytes_of(row.method), row.value, row.low, row.high,
         verdict.ranked]
        for verdict in verdicts for row in verdict.accuracy if not row.versus
    ]  # fmt: skip
    page.section("Accuracy over bytes").figure(
        byte_figure(verdicts),
        "Accuracy over the fraction of the bytes of full that the cache holds of the context, with "
        "95 % intervals over rows. Policies that read less and drop nothing hold everything.",
        name="accuracy-over-bytes",
        table=(COLUMNS, table),
    )


def byte_figure(verdicts: Sequence[Verdict]) -> Figure:
    """Draw accuracy over bytes, a panel for each task and mode."""
    labels = list(dict.fromkeys(label for one in verdicts for label in one.figures))
    columns = min(2, len(verdicts))
    lines = -(-len(verdicts) // columns)
    names = 0.3 + 0.075 * max(map(len, labels))
    tall = max(lines * (TALL + GAP), LINE * len(labels))
    figure = new_figure(0.2 + columns * (WIDE + GAP) + names, 0.75 + tall)
    colors = colors_of(labels, muted=[FULL])
    for number, verdict in enumerate(verdicts):
        line, column = divmod(number, columns)
        bottom = 0.5 + tall - (line + 1) * (TALL + GAP) + 0.25
        axes = place(figure, 0.7 + column * (WIDE + GAP), bottom, WIDE, TALL)
        for row in (one for one in verdict.accuracy if not one.versus):
            marker = MARKERS[labels.index(row.method) // 8 % len(MARKERS)]  # where colors repeat
            x, color = verdict.bytes_of(row.method), colors[row.method]
            axes.vlines(x, row.low, row.high, color=color, linewidth=1, alpha=0.5)
            axes.scatter([x], [row.value], s=30, color=color, marker=marker, label=row.method)
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlim(0, None)
        title = verdict.title if verdict.ranked else f"{verdict.title}, not ranked"
        dress(axes, title=title, x="bytes held, of full", y="" if column else "accuracy")
    figure.axes[columns - 1].legend(
        loc="upper left", bbox_to_anchor=(1.03, 1.0), frameon=False, fontsize=TEXT_SIZE
    )
    head(figure, "Accuracy over bytes")
    return figure
