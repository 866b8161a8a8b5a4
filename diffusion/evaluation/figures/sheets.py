"""Sheets of images: a row per style or caption, real drawings next to made ones."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from harness.figures.style import (
    INCHES_PER_LETTER,
    INK,
    MUTED,
    TEXT_SIZE,
    head,
    new_figure,
    place,
    width_of_head,
)

CELL = 0.52
"""Inches of an image."""

SPACE = 2
"""Pixels between images."""

APART = 10
"""Pixels between groups."""

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
        1.2 * INCHES_PER_LETTER * len(n) > CELL * s[0] for n, s in first.items()
    ):
        captions, groups = list(first), {"": 0}  # names are wider than what they are of
        columns = [c for c, n in zip(columns, [k == 0 for s in first.values() for k in range(s[0])],
                                     strict=True) if n]  # fmt: skip
    scale = CELL / size
    left = 0.3 + INCHES_PER_LETTER * max(map(len, rows))
    top = 0.95 + (0.054 * min(LETTERS, max(map(len, captions))) if captions else 0)
    width, height = sheet.shape[1] * scale, sheet.shape[0] * scale
    total = max(left + width + 0.6, width_of_head(title, note))
    figure = new_figure(total, height + top + 0.15)
    axes = place(figure, left, 0.15, width, height)
    axes.imshow(sheet, interpolation="nearest", aspect="auto")
    axes.set_yticks(lines, list(rows), fontsize=TEXT_SIZE, color=INK)
    axes.xaxis.tick_top()
    named = [_short(caption) for caption in captions] * len(groups)
    axes.set_xticks(columns if named else [], named, fontsize=TEXT_SIZE - 1.5, color=MUTED,
                    rotation=55, ha="left", rotation_mode="anchor")  # fmt: skip
    axes.tick_params(length=0, pad=3)
    axes.spines[:].set_visible(False)
    for name, start in groups.items():
        x = (left + start * scale) / total
        figure.text(x, 1 - 0.68 / (height + top + 0.15), name, fontsize=TEXT_SIZE + 0.5,
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


def _short(caption: str) -> str:
    text = caption if len(caption) <= LETTERS else f"{caption[: LETTERS - 1]}…"
    return text.replace("$", r"\$")
