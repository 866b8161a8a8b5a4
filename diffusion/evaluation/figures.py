"""Figures of retrieval and fusion: sheets of images, gates, scores. They write no files."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from diffusion.fusion.baking import GateMap
from harness.figures.style import (
    DIVERGING,
    GRID,
    INCHES_PER_LETTER,
    INK,
    MUTED,
    SHARES,
    TEXT_SIZE,
    colors_of,
    dress,
    head,
    new_figure,
    place,
    width_of_head,
)

SHEET_CELL = 0.52  # inches of an image

SPACE = 2  # pixels between images

APART = 10  # pixels between groups

LETTERS = 26  # of a caption


def sheet_figure(
    rows: Mapping[str, Mapping[str, np.ndarray]],
    captions: Sequence[str] = (),
    *,
    title: str,
    note: str = "",
) -> Figure:
    """Draw images in rows, in groups next to each other.

    Args:
        rows: Name of a row -> name of a group -> images (N, H, W, 3) uint8; all rows have the same
            groups, with the same numbers of images of one size.
        captions: Of the images of a group, above each of them; nothing if empty.
        title: Heading.
        note: Small print below it.

    Raises:
        ValueError: There is no image, or rows have other groups or numbers.
    """
    shapes = {name: {g: images.shape for g, images in row.items()} for name, row in rows.items()}
    first = next(iter(shapes.values()), {})
    if not first or any(shape != first for shape in shapes.values()):
        raise ValueError(f"rows must have the same groups of images, found {shapes}")
    sheet, columns, lines, groups = _montage(rows)
    size = next(iter(first.values()))[1]
    if not captions and any(
        1.2 * INCHES_PER_LETTER * len(n) > SHEET_CELL * s[0] for n, s in first.items()
    ):
        captions, groups = list(first), {"": 0}  # names are wider than what they are of
        columns = [c for c, n in zip(columns, [k == 0 for s in first.values() for k in range(s[0])],
                                     strict=True) if n]  # fmt: skip
    scale = SHEET_CELL / size
    left = 0.3 + INCHES_PER_LETTER * max(map(len, rows))
    top = 0.95 + (0.054 * min(LETTERS, max(map(len, captions))) if captions else 0)
    width, height = sheet.shape[1] * scale, sheet.shape[0] * scale
    total = max(left + width + 0.6, width_of_head(title, note))
    figure = new_figure(total, height + top + 0.15)
    axes = place(figure, left, 0.15, width, height)
    axes.imshow(sheet, interpolation="nearest", aspect="auto")
    axes.set_yticks(lines, list(rows), fontsize=TEXT_SIZE, color=INK)
    axes.xaxis.tick_top()
    short = [
        caption if len(caption) <= LETTERS else f"{caption[: LETTERS - 1]}…" for caption in captions
    ]
    named = [caption.replace("$", r"\$") for caption in short] * len(groups)
    axes.set_xticks(columns if named else [], named, fontsize=TEXT_SIZE - 1.5, color=MUTED,
                    rotation=55, ha="left", rotation_mode="anchor")  # fmt: skip
    axes.tick_params(length=0, pad=3)
    axes.spines[:].set_visible(False)
    for name, start in groups.items():
        figure.text((left + start * scale) / total, 1 - 0.68 / (height + top + 0.15), name,
                    fontsize=TEXT_SIZE + 0.5,
                    fontweight="bold", color=INK, va="top")  # fmt: skip
    head(figure, title, note)
    return figure


def _montage(
    rows: Mapping[str, Mapping[str, np.ndarray]],
) -> tuple[np.ndarray, list[float], list[float], dict[str, int]]:
    """Return one picture, the centers of its columns and rows, and where its groups begin."""
    first = next(iter(rows.values()))
    _, high, wide, _ = next(iter(first.values())).shape
    columns: list[int] = []
    groups: dict[str, int] = {}
    at = 0
    for name, images in first.items():
        groups[name] = at
        columns += [at + number * (wide + SPACE) for number in range(len(images))]
        at += len(images) * (wide + SPACE) - SPACE + APART
    sheet = np.full((len(rows) * (high + SPACE) - SPACE, at - APART, 3), 255, dtype=np.uint8)
    for line, row in enumerate(rows.values()):
        y = line * (high + SPACE)
        for x, image in zip(columns, (i for group in row.values() for i in group), strict=True):
            sheet[y : y + high, x : x + wide] = image
    lines = [line * (high + SPACE) + high / 2 for line in range(len(rows))]
    return sheet, [x + wide / 2 for x in columns], lines, groups


MAP_LINE, STEP = 0.165, 0.13  # inches of a layer, and of a step
NARROWEST = 1.6  # inches of a map


def gate_map_figure(gates: GateMap, *, title: str = "Mean gates", note: str = "") -> Figure:
    """Draw the mean gate by layer (down) and step (right) of every adapter; gray: no change.

    Args:
        gates: Of a run.
        title: Heading.
        note: Small print below it.

    Raises:
        ValueError: No gate was recorded.
    """
    means = np.asarray(gates.means.tolist(), dtype=float).reshape(gates.means.shape)
    steps, layers, adapters = means.shape
    if not means.size:
        raise ValueError(f"gates are empty, found {means.shape}")
    left = 0.3 + 0.9 * INCHES_PER_LETTER * max(map(len, gates.sites))
    letters = max(map(len, gates.adapters)) + 8
    wide = max(NARROWEST, STEP * steps, INCHES_PER_LETTER * letters)
    total = max(left + adapters * (wide + 0.25) + 0.8, width_of_head(title, note))
    figure = new_figure(total, 1.75 + MAP_LINE * layers)
    colors = colormaps[SHARES].with_extremes(bad=GRID)
    for number, name in enumerate(gates.adapters):
        axes = place(figure, left + number * (wide + 0.25), 0.55, wide, MAP_LINE * layers)
        shown = axes.imshow(
            means[:, :, number].T, cmap=colors, vmin=0, vmax=1, aspect="auto",
            interpolation="nearest", extent=(0.5, steps + 0.5, layers, 0),
        )  # fmt: skip
        dress(axes, title=f"{name}: {np.nanmean(means[:, :, number]):.2f}", x="step", grid=False)
        axes.set_yticks(np.arange(layers) + 0.5, list(gates.sites) if number == 0 else [],
                        fontsize=TEXT_SIZE - 2, color=INK)  # fmt: skip
        axes.tick_params(axis="y", length=0)
    at = left + adapters * (wide + 0.25) - 0.05
    bar = figure.colorbar(shown, cax=place(figure, at, 0.55, 0.12, MAP_LINE * layers))
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(labelsize=TEXT_SIZE - 1.5, color=MUTED, labelcolor=INK)
    head(figure, title, note.replace("$", r"\$"))  # a prompt is no formula
    return figure


CELL_WIDE, CELL_HIGH = 1.05, 0.34  # inches of an adapter in `openness_figure`


def openness_figure(
    opened: Mapping[str, Mapping[str, float]], needed: Sequence[Sequence[str]]
) -> Figure:
    """Draw how far adapters are open, prompts down and adapters across, the best suited first.

    Args:
        opened: Prompt -> adapter -> openness, from 0 to 1.
        needed: Of each prompt, the adapters that it needs, which are bold.
    """
    most = max(map(len, opened.values()))
    left = 0.3 + INCHES_PER_LETTER * max(map(len, opened))
    wide, high = most * CELL_WIDE, len(opened) * CELL_HIGH
    title, note = "What a prompt needs", "openness by the gate; bold: the prompt needs it"
    figure = new_figure(max(left + wide + 0.2, width_of_head(title, note)), high + 1.1)
    axes = place(figure, left, 0.15, wide, high)
    values = np.full((len(opened), most), np.nan)
    for row, (own, wanted) in enumerate(zip(opened.values(), needed, strict=True)):
        for column, (name, value) in enumerate(own.items()):
            values[row, column] = value
            axes.text(
                column, row, f"{name} {value:.2f}", ha="center", va="center",
                fontsize=TEXT_SIZE - 1, color="white" if value > 0.5 else INK,
                fontweight="bold" if name in wanted else "normal",
            )  # fmt: skip
    axes.imshow(values, SHARES, vmin=0, vmax=1, aspect="auto")
    dress(axes, grid=False)
    axes.set_yticks(range(len(opened)), list(opened), fontsize=TEXT_SIZE - 1, color=INK)
    axes.set_xticks([])
    axes.tick_params(length=0)
    head(figure, title, note)
    return figure


PAIR_LINE = 0.19  # inches
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
    figure = new_figure(total, 1.95 + PAIR_LINE * len(pairs))
    axes = place(figure, left, 0.6, total - left - 0.35, PAIR_LINE * len(pairs))
    lines = np.arange(len(pairs))
    for (name, color), mark in zip(colors_of(percent).items(), MARKS * len(percent), strict=False):
        values = percent[name]
        axes.scatter(values[order], lines, s=17, color=color, marker=mark, linewidths=0,
                     label=f"than {name} in {100 * float((values < 0).mean()):.0f} %")  # fmt: skip
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


MATRIX_CELL = 0.19  # inches


def retrieval_figure(
    scores: np.ndarray,
    captions: Sequence[str],
    adapters: Sequence[str],
    *,
    title: str = "Captions and adapters",
    note: str = "",
) -> Figure:
    """Draw the mean cosine of the captions of a concept (rows) with every adapter (columns).

    A dot marks the adapter that is closest; it is filled where it is the right one.

    Args:
        scores: (concepts, adapters) mean cosines.
        captions: Names of the concepts.
        adapters: Names of the adapters.
        title: Heading.
        note: Small print below it.

    Raises:
        ValueError: Names and scores have other numbers.
    """
    if scores.shape != (len(captions), len(adapters)) or not scores.size:
        raise ValueError(
            f"scores are {scores.shape}, expected ({len(captions)}, {len(adapters)}), not empty"
        )
    left, below = (0.3 + 0.95 * INCHES_PER_LETTER * max(map(len, n)) for n in (captions, adapters))
    width, height = MATRIX_CELL * len(adapters), MATRIX_CELL * len(captions)
    total = max(left + width + 0.9, width_of_head(title, note))
    figure = new_figure(total, below + height + 0.85)
    axes = place(figure, left, below, width, height)
    most = float(np.nanmax(np.abs(scores)))
    shown = axes.imshow(scores, cmap=DIVERGING, vmin=-most, vmax=most, interpolation="nearest",
                        aspect="auto")  # fmt: skip
    best = scores.argmax(1)
    right = np.array([adapters[b] == name for b, name in zip(best, captions, strict=True)])
    for hit, face in ((True, INK), (False, "white")):
        lines = np.flatnonzero(right == hit)
        axes.scatter(best[lines], lines, s=14, facecolor=face, edgecolor=INK, linewidths=0.8,
                     label="closest, right" if hit else "closest, another one")  # fmt: skip
    axes.set_yticks(range(len(captions)), list(captions))
    axes.set_xticks(range(len(adapters)), list(adapters), rotation=90)
    axes.tick_params(length=0, labelsize=TEXT_SIZE - 1.5, labelcolor=INK)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(shown, cax=place(figure, left + width + 0.15, below, 0.12, height))
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(labelsize=TEXT_SIZE - 1.5, labelcolor=INK)
    summary = f"closest and right: {int(right.sum())} of {len(right)} (filled dots)"
    head(figure, title, f"{note}; {summary}" if note else summary)
    return figure


def retrieval_table(
    scores: np.ndarray, captions: Sequence[str], adapters: Sequence[str]
) -> tuple[tuple[str, ...], list[list[object]]]:
    """Return header and rows of the numbers of the figure."""
    return ("captions of", "adapter", "mean cosine"), [
        [concept, adapter, float(scores[line, column])]
        for line, concept in enumerate(captions)
        for column, adapter in enumerate(adapters)
    ]
