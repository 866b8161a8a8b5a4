"""Differences of losses pair by pair: where gates help, and where they do not."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from harness.figures.style import (
    INCHES_PER_LETTER,
    INK,
    TEXT_SIZE,
    colors_of,
    dress,
    head,
    new_figure,
    place,
    width_of_head,
)

LINE = 0.19  # inches
MARKS = "osD^vP"


def pair_differences_figure(
    pairs: Sequence[str],
    differences: Mapping[str, np.ndarray],
    *,
    title: str = "Differences by pair",
    note: str = "",
) -> Figure:
    """Draw what each pair gains, ordered by the mean over rivals; left of 0, gates are better.

    Args:
        pairs: Names.
        differences: Rival -> logarithm of the loss of gates over its own, (pairs,).
        title: Heading.
        note: Small print below it.

    Raises:
        ValueError: There is nothing to draw, or numbers of pairs differ.
    """
    if not pairs or not differences or any(len(d) != len(pairs) for d in differences.values()):
        raise ValueError(f"expected differences of {len(pairs)} pairs, at least one")
    percent = {name: 100 * np.expm1(np.asarray(d, dtype=float)) for name, d in differences.items()}
    order = np.argsort(np.mean(list(percent.values()), axis=0), kind="stable")
    left = 0.3 + 0.95 * INCHES_PER_LETTER * max(map(len, pairs))
    total = max(left + 5.2, width_of_head(title, note))
    figure = new_figure(total, 1.95 + LINE * len(pairs))
    axes = place(figure, left, 0.6, total - left - 0.35, LINE * len(pairs))
    lines = np.arange(len(pairs))
    for (name, color), mark in zip(colors_of(percent).items(), MARKS * len(percent), strict=False):
        values = percent[name]
        better = float((values < 0).mean())
        axes.scatter(values[order], lines, s=17, color=color, marker=mark, linewidths=0,
                     label=f"than {name} in {100 * better:.0f} %")  # fmt: skip
    axes.axvline(0, color=INK, linewidth=1.0)
    axes.set_yticks(lines, [pairs[place] for place in order])
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    dress(axes, x="loss of gates against the rival, %; left of 0, gates are better")
    axes.tick_params(axis="y", labelsize=TEXT_SIZE - 1.5, length=0)
    axes.legend(frameon=False, title="gates are better", alignment="left",
                title_fontsize=TEXT_SIZE - 0.5, fontsize=TEXT_SIZE - 0.5,
                ncols=min(3, len(percent)), loc="lower left",
                bbox_to_anchor=(0, 1.0), borderaxespad=0.1)  # fmt: skip
    head(figure, title, note)
    return figure
