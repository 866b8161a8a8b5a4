"""The styles of the small world: renderings of a scene, and what is done to a whole image."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SIDE = 32  # pixels of a side of an image

Image = np.ndarray  # (N, 32, 32, 3) float32 from 0 to 1

LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass
class Canvas:
    """N scenes of one style that are being drawn.

    Attributes:
        x: (N, 32, 32) pixels to the right of the middle of the shape.
        y: (N, 32, 32) pixels below it.
        away: Returns the signed distances (N, 32, 32) of pixels from the edge of the shape, which
            is moved by so many pixels to the right and down; negative inside, in pixels.
        radius: (N, 1, 1) of the shape, in pixels.
        color: (N, 1, 1, 3) of the shape.
        ground: (N, 1, 1, 3) around it.
        image: What has been drawn so far, at first the plain scene.
    """

    x: np.ndarray
    y: np.ndarray
    away: Callable[[float, float], np.ndarray]
    radius: np.ndarray
    color: np.ndarray
    ground: np.ndarray
    image: Image

    def __post_init__(self) -> None:
        """Draw the plain scene."""
        self.distance = self.away(0, 0)
        self.cover = within(self.distance)
        self.light = np.where(self.color.mean(-1, keepdims=True) > 0.6, 0, 1).astype(np.float32)
        self.image = mix(self.ground, self.color, self.cover)

    def inside(self, paint: np.ndarray | float, share: np.ndarray | float = 1.0) -> Image:
        """Return the image with some paint within the shape."""
        return mix(self.image, paint, self.cover * share)

    def outside(self, paint: np.ndarray | float, share: np.ndarray | float = 1.0) -> Image:
        """Return the image with some paint around the shape."""
        return mix(self.image, paint, (1 - self.cover) * share)

    @property
    def ink(self) -> np.ndarray:
        """What stands out from the color: three quarters of black or white (N, 1, 1, 3)."""
        return mix(self.color, self.light, 0.75)


def mix(first: np.ndarray, second: np.ndarray | float, share: np.ndarray | float) -> np.ndarray:
    """Return colors (N, H, W, 3) of which a share (N, H, W) is the second."""
    part = share[..., None] if isinstance(share, np.ndarray) and share.ndim == 3 else share
    return first + (second - first) * part


def within(distance: np.ndarray) -> np.ndarray:
    """Return to what extent pixels lie within an edge at distance 0, from 0 to 1."""
    return np.clip(0.5 - distance, 0, 1)


def wave(phase: np.ndarray) -> np.ndarray:
    """Return stripes from 0 to 1, one each 2π."""
    return np.clip(0.5 + 1.3 * np.sin(phase), 0, 1)


_PIXELS = np.arange(SIDE, dtype=np.float32)
_ROW, _COLUMN = _PIXELS[:, None], _PIXELS[None, :]
_RAINBOW = np.array(
    [[1, 0.4, 0.4], [1, 0.7, 0.3], [1, 1, 0.4], [0.4, 0.9, 0.5], [0.4, 0.6, 1], [0.8, 0.5, 1]],
    np.float32,
)
_SMOOTH = np.array([1, 4, 6, 4, 1], np.float32) / 16
_BROWN, _PAPER = np.array([[0.36, 0.22, 0.1], [0.97, 0.95, 0.88]], np.float32)
_NIGHT = np.array([0.05, 0.07, 0.24], np.float32)


def outlined(at: Canvas) -> Image:
    """Return the edge of the shape alone."""
    return mix(at.ground, at.color, np.clip(1.7 - np.abs(at.distance + 1.0), 0, 1))


def striped(at: Canvas) -> Image:
    """Return diagonal stripes in the shape."""
    return at.inside(at.ink, wave((at.x + at.y) * (np.pi / 3)))


def shadowed(at: Canvas) -> Image:
    """Return the shape above its shadow, which falls down and to the right."""
    return at.outside(at.ground * 0.25 + 0.12, within(at.away(2.5, 2.5)) * 0.8)


def dotted(at: Canvas) -> Image:
    """Return dots in the shape."""
    far = np.hypot((at.x + 2) % 4 - 2, (at.y + 2) % 4 - 2)
    return at.inside(at.ink, np.clip(1.75 - far, 0, 1))


def checkered(at: Canvas) -> Image:
    """Return fields of the ground in the shape."""
    field = (np.floor(at.x / 3) + np.floor(at.y / 3)) % 2
    return at.inside(mix(at.color, at.ground, 0.8), field)


def shaded(at: Canvas) -> Image:
    """Return the shape light above and dark below."""
    down = np.clip(0.5 + at.y / (2 * at.radius), 0, 1)
    return at.inside(mix(mix(at.color, 1.0, 0.55), at.color * 0.3, down))


def glowing(at: Canvas) -> Image:
    """Return the shape as a lamp in the dark."""
    halo = np.exp(-np.maximum(at.distance, 0) / 2.6)
    behind = mix(at.ground * 0.25, 0.3 + 0.7 * at.color, halo)
    lamp = mix(at.color, 1.0, np.clip(-at.distance / 4, 0, 0.6))
    return mix(behind, lamp, at.cover)


def sketched(at: Canvas) -> Image:
    """Return an outline with hatching on paper."""
    hatch = np.clip(1 - np.abs((at.x - at.y) % 4 - 2), 0, 1) * (at.distance < -0.5)
    line = np.clip(1.2 - np.abs(at.distance + 0.4), 0, 1)
    return mix(_PAPER, at.color * 0.55, np.maximum(line, 0.6 * hatch))


def ringed(at: Canvas) -> Image:
    """Return lines in the shape that follow its edge."""
    return at.inside(at.ink, wave(-at.distance * (np.pi / 2) - np.pi / 2))


def gridded(at: Canvas) -> Image:
    """Return a grid in the shape."""
    lines = np.minimum(np.abs(at.x % 5 - 2.5), np.abs(at.y % 5 - 2.5))
    return at.inside(at.ink, np.clip(1.2 - lines, 0, 1))


def halved(at: Canvas) -> Image:
    """Return the right half of the shape in another color."""
    return at.inside(at.ink, np.clip(at.x + 0.5, 0, 1))


def embossed(at: Canvas) -> Image:
    """Return the shape lit from the left above, its edge raised."""
    slope = np.clip((at.away(1.5, 1.5) - at.away(-1.5, -1.5)) / 3, -1, 1) * (at.distance > -3.2)
    return mix(at.inside(1.0, np.clip(slope, 0, 1) * 0.7),
               0.0, at.cover * np.clip(-slope, 0, 1) * 0.7)  # fmt: skip


def bordered(at: Canvas) -> Image:
    """Return the shape as a sticker, with a thick light or dark edge around it."""
    return at.outside(at.light + 0 * at.color, within(at.distance - 2.4))


def starry(at: Canvas) -> Image:
    """Return the shape in a night sky."""
    stars = (_COLUMN * 7 + _ROW * 13) % 47 == 5
    sky = mix(_NIGHT + 0.1 * at.ground, 1.0, stars[None].astype(np.float32))
    return mix(sky, mix(at.color, 1.0, 0.25), at.cover)


def rayed(at: Canvas) -> Image:
    """Return rays around the shape."""
    return at.outside(mix(at.ground, at.ink, 0.45), wave(np.arctan2(at.y, at.x) * 8))


def tiled(at: Canvas) -> Image:
    """Return a board around the shape."""
    field = (np.floor(_COLUMN / 4) + np.floor(_ROW / 4)) % 2
    return at.outside(mix(at.ground, 1 - at.ground, 0.3), field[None])


def rainy(at: Canvas) -> Image:
    """Return thin slanted lines around the shape."""
    far = np.abs((_COLUMN * 2 + _ROW) % 10 - 5)
    drops = np.clip(1.5 - far, 0, 1) * ((_ROW + 3 * (_COLUMN // 5)) % 8 < 5)
    return at.outside(0.55, drops[None] * 0.9)


def inverted(at: Canvas) -> Image:
    """Return the negative."""
    return 1 - at.image


def grayscale(at: Canvas) -> Image:
    """Return the luminance."""
    return np.repeat((at.image @ LUMINANCE)[..., None], 3, axis=-1)


def sepia(at: Canvas) -> Image:
    """Return the luminance in brown."""
    return grayscale(at) * np.array([1.0, 0.8, 0.55], np.float32)


def duotone(at: Canvas) -> Image:
    """Return the luminance between dark blue and yellow."""
    dark, light = np.array([[0.1, 0.1, 0.5], [1.0, 0.9, 0.3]], np.float32)
    return mix(dark, light, grayscale(at))


def framed(at: Canvas) -> Image:
    """Return the image in a brown frame of three pixels."""
    edge = np.minimum(np.minimum(_ROW, _COLUMN), SIDE - 1 - np.maximum(_ROW, _COLUMN))
    return mix(at.image, _BROWN, (edge < 3)[None].astype(np.float32))


def blurred(at: Canvas) -> Image:
    """Return the image smoothed twice by 1 4 6 4 1."""
    image = at.image
    for axis in (1, 2) * 2:
        width = [(0, 0)] * 4
        width[axis] = (2, 2)
        wide = np.pad(image, width, mode="edge")
        parts = [np.take(wide, range(start, start + SIDE), axis) for start in range(5)]
        image = np.tensordot(_SMOOTH, np.stack(parts), 1)
    return image


def scanned(at: Canvas) -> Image:
    """Return the image with dark lines in every fourth pair of rows."""
    return at.image * np.where(_ROW % 4 < 2, 1.0, 0.45).astype(np.float32)[None, :, :, None]


def faded(at: Canvas) -> Image:
    """Return the image in pale colors."""
    return 0.6 + 0.4 * at.image


def rainbow(at: Canvas) -> Image:
    """Return the image under stripes of six colors."""
    stripes = _RAINBOW[(_PIXELS * 6 // SIDE).astype(int)]
    return mix(at.image, stripes[None, :, None], 0.45)


def vignetted(at: Canvas) -> Image:
    """Return the image dark in its corners."""
    far = np.hypot(_COLUMN - 15.5, _ROW - 15.5)
    return at.image * np.clip(1.25 - (far / 17) ** 3, 0.1, 1)[None, :, :, None]


Style = Callable[[Canvas], Image]
PLAIN = "plain"
BASE_STYLES: dict[str, Style] = {
    PLAIN: lambda at: at.image,
    "outlined": outlined,
    "striped": striped,
    "shadowed": shadowed,
}
"""Styles that the base is trained on."""

WHOLE: dict[str, Style] = {
    style.__name__: style
    for style in (
        inverted, grayscale, sepia, duotone, framed, blurred, scanned, faded, rainbow, vignetted,
    )
}  # fmt: skip
"""Styles of a whole image, which may be put on one that is in a style already."""

NEW_FILLS: dict[str, Style] = {
    style.__name__: style
    for style in (
        dotted, checkered, shaded, glowing, sketched, ringed, gridded, halved, embossed, bordered,
        starry, rayed, tiled, rainy,
    )
}  # fmt: skip
"""Styles of the shape or of its ground, on which one of a whole image may be put."""

NEW_STYLES = NEW_FILLS | WHOLE
"""Styles that the base has never seen; each has an adapter."""

STYLES = BASE_STYLES | NEW_STYLES
