"""Maps and boxes over frames."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from harness.figures.style import INK, MUTED, TEXT_SIZE, new_figure, place

COLORS = "inferno"
STRENGTH = 0.6  # opacity where the map is 1
FRAME = 1.55  # inches


def overlay(image: np.ndarray, heat: np.ndarray, strength: float = STRENGTH) -> np.ndarray:
    """Overlay a map on a frame, opaque in proportion to its values.

    Args:
        image: (H, W, 3) uint8.
        heat: (h, w) in [0, 1]; is enlarged to the frame.
        strength: Opacity where the map is 1.

    Returns:
        (H, W, 3) uint8.
    """
    height, width = image.shape[:2]
    scaled = Image.fromarray(np.clip(heat, 0, 1).astype(np.float32))
    large = np.asarray(scaled.resize((width, height), Image.Resampling.BILINEAR))
    colors = mpl.colormaps[COLORS](large)[..., :3]
    opacity = strength * large[..., None]
    mixed = (1 - opacity) * image / 255.0 + opacity * colors
    return np.rint(255 * mixed).astype(np.uint8)


def attention_figure(
    images: Sequence[np.ndarray],
    heats: Sequence[np.ndarray],
    *,
    captions: Sequence[str] = (),
    title: str = "What the network looks at",
) -> Figure:
    """Draw frames above their overlays.

    Args:
        images: Frames (H, W, 3) uint8.
        heats: A map (h, w) in [0, 1] for each.
        captions: A line for each frame.
        title: Heading.

    Raises:
        ValueError: There is no frame, or not one map per frame.
    """
    if not images or len(images) != len(heats):
        raise ValueError(f"found {len(images)} frames and {len(heats)} maps, expected one each")
    gap = 0.08
    width, height = 0.4 + len(images) * (FRAME + gap), 2 * FRAME + 1.05
    figure = new_figure(max(width, 3.6), height)
    figure.text(0.2 / figure.get_figwidth(), 1 - 0.25 / height, title, fontsize=12,
                fontweight="bold", color=INK, va="center")  # fmt: skip
    for column, (image, heat) in enumerate(zip(images, heats, strict=True)):
        left = 0.2 + column * (FRAME + gap)
        for row, picture in enumerate((overlay(image, heat), image)):
            axes = place(figure, left, 0.35 + row * (FRAME + gap), FRAME, FRAME)
            axes.imshow(picture, interpolation="nearest")
            axes.set_axis_off()
        if column < len(captions):
            axes.set_title(captions[column], fontsize=TEXT_SIZE - 1, color=INK, pad=3, loc="left")
    figure.text(
        0.2 / figure.get_figwidth(), 0.16 / height, "above: frame; below: with the map",
        fontsize=TEXT_SIZE - 1.5, color=MUTED, va="center",
    )  # fmt: skip
    return figure
