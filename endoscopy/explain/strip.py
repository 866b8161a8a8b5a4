"""A strip of a track: frames of one lesion, their sizes, and the size of the lesion."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from endoscopy.bundles.scope import NO_CALIBRATION
from harness.figures.style import (
    BLUE,
    GRID,
    INK,
    MUTED,
    ORANGE,
    TEXT_SIZE,
    TITLE_SIZE,
    dress,
    new_figure,
    place,
)

FRAME = 1.3  # inches
GAP = 0.07
MOST_FRAMES = 8


@dataclass(frozen=True)
class Track:
    """The frames of a lesion, in order.

    Attributes:
        images: Frames (H, W, 3) uint8; None where they are not drawn.
        boxes: (T, 4) xmin, xmax, ymin, ymax in pixels of the frames.
        sizes: (T,) in millimeters or as an index.
        reasons: Why each frame abstains; empty where it does not.
        size: Of the lesion.
        low: Lower bound of its interval, NaN without one.
        high: Upper bound.
        calibrated: Whether sizes are millimeters; else they are a size index.
        name: Of the lesion.
        truth: True size, if it is known, in the same unit.
        automatic: Whether boxes come from the segmenter.
    """

    images: Sequence[np.ndarray | None]
    boxes: np.ndarray
    sizes: np.ndarray
    reasons: Sequence[str]
    size: float
    low: float
    high: float
    calibrated: bool
    name: str
    truth: float | None = None
    automatic: bool = False

    def caption(self) -> str:
        """Return the size with its interval, and its unit or the note that there is none."""
        interval = f" ({self.low:.3g} to {self.high:.3g})" if np.isfinite(self.low) else ""
        if self.calibrated:
            return f"{self.size:.1f} mm{interval}"
        return f"size index {self.size:.2f}{interval}, {NO_CALIBRATION}"


def drawn_frames(count: int, most: int = MOST_FRAMES) -> list[int]:
    """Return which of ``count`` frames a strip shows: all, or evenly spaced ones."""
    if count <= most:
        return list(range(count))
    return [round(i) for i in np.linspace(0, count - 1, most)]


def strip_figure(track: Track) -> Figure:
    """Draw up to eight frames with their boxes over the sizes of all frames.

    The line and the band are the size of the lesion and its interval. Frames that abstain are
    crossed, with their first reason below the frame.

    Raises:
        ValueError: The track is empty.
    """
    count = len(track.sizes)
    if not count:
        raise ValueError("a track needs at least one frame")
    shown = drawn_frames(count)
    width = max(0.8 + len(shown) * (FRAME + GAP) + 0.15, 6.0)
    height = FRAME + 3.15
    figure = new_figure(width, height)
    figure.text(0.2 / width, 1 - 0.24 / height, track.name, fontsize=12, fontweight="bold",
                color=INK, va="center")  # fmt: skip
    figure.text(0.2 / width, 1 - 0.5 / height, track.caption(), fontsize=TITLE_SIZE - 0.5,
                color=INK, va="center")  # fmt: skip
    for column, index in enumerate(shown):
        _frame(figure, track, index, 0.75 + column * (FRAME + GAP), height - 0.7 - FRAME)
    _sizes(figure, track, width)
    return figure


def _frame(figure: Figure, track: Track, index: int, left: float, bottom: float) -> None:
    axes = place(figure, left, bottom, FRAME, FRAME)
    image = track.images[index]
    if image is not None:
        axes.imshow(image, interpolation="nearest")
    xmin, xmax, ymin, ymax = track.boxes[index]
    color = ORANGE if track.reasons[index] else BLUE
    style = "--" if track.automatic else "-"
    box = Rectangle((xmin - 0.5, ymin - 0.5), xmax - xmin, ymax - ymin, fill=False,
                    edgecolor="white", linewidth=2.4)  # fmt: skip
    axes.add_patch(box)
    axes.add_patch(Rectangle(box.get_xy(), xmax - xmin, ymax - ymin, fill=False, edgecolor=color,
                             linewidth=1.3, linestyle=style))  # fmt: skip
    axes.set_axis_off()
    note = f"{index + 1}"
    if track.reasons[index]:
        note += f": {track.reasons[index].split(';')[0]}"
    axes.text(0, -0.02, note, transform=axes.transAxes, fontsize=TEXT_SIZE - 2, va="top",
              color=ORANGE if track.reasons[index] else MUTED)  # fmt: skip


def _sizes(figure: Figure, track: Track, width: float) -> None:
    axes = place(figure, 0.75, 0.75, width - 0.95, 1.3)
    frames = np.arange(1, len(track.sizes) + 1)
    abstains = np.array([bool(reason) for reason in track.reasons])
    if np.isfinite(track.low):
        axes.axhspan(track.low, track.high, color=BLUE, alpha=0.12, linewidth=0)
    axes.axhline(track.size, color=BLUE, linewidth=1.2)
    axes.plot(frames[~abstains], track.sizes[~abstains], "o", color=BLUE, markersize=4.5)
    axes.plot(frames[abstains], track.sizes[abstains], "x", color=ORANGE, markersize=5)
    if track.truth is not None:
        axes.axhline(track.truth, color=INK, linewidth=1.0, linestyle=":")
        side = "top" if track.truth < track.size else "bottom"  # away from the predicted size
        axes.annotate("true size", (1, track.truth), xycoords=("axes fraction", "data"),
                      ha="right", va=side, fontsize=TEXT_SIZE - 2, color=INK)  # fmt: skip
    dress(axes, x="frame", y="mm" if track.calibrated else "size index", grid=False)
    axes.grid(True, axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_ylim(0, 1.15 * np.nanmax([track.high, track.sizes.max(), track.truth or 0]))
    axes.set_xlim(0.5, len(track.sizes) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    where = "boxes: automatic segmentation" if track.automatic else "boxes: as given"
    crossed = "; crosses abstain" if abstains.any() else ""
    figure.text(1 - 0.2 / width, 0.16 / figure.get_figheight(), where + crossed, ha="right",
                fontsize=TEXT_SIZE - 1.5, color=MUTED, va="center")  # fmt: skip
