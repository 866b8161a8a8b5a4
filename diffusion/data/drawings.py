"""The drawings of OpenMoji with captions, in 24 styles: by other hands, or computed."""

import csv
import zipfile
from collections.abc import Callable
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from core_gates.errors import GatesError
from harness.files.digest import sha256, short_digest

IMAGES, CAPTIONS = "emoji32.npz", "captions.csv"
DRAWN = ("openmoji_color", "openmoji_black", "noto", "twemoji")
EXTRAS = ("extras-openmoji", "extras-unicode", "component")  # groups outside of the standard

SIZE = 32


class Drawings(NamedTuple):
    """Emoji of the Unicode standard, drawn in four ways, row by row.

    Attributes:
        hexcodes: Code points, such as ``1F600``.
        captions: English names.
        subgroups: Such as ``food-fruit``.
        images: ``openmoji_color``, ``openmoji_black``, ``noto``, ``twemoji`` -> (N, 32, 32, 3)
            uint8.
        whole: (N,) whether all four drawings exist.
        digest: 16 hexadecimal digits that distinguish the files.
    """

    hexcodes: np.ndarray
    captions: np.ndarray
    subgroups: np.ndarray
    images: dict[str, np.ndarray]
    whole: np.ndarray
    digest: str

    def __len__(self) -> int:
        return len(self.hexcodes)

    @classmethod
    def load(cls, folder: str | Path | None = None) -> Self:
        """Read the drawings.

        Args:
            folder: Of ``emoji32.npz`` and ``captions.csv``; those of the package if None.

        Raises:
            GatesError: A file is missing or damaged.
        """
        place = Path(str(files("diffusion.data") / "openmoji")) if folder is None else Path(folder)
        paths = (place / IMAGES, place / CAPTIONS)
        changed = [path.stat().st_mtime_ns if path.is_file() else None for path in paths]
        return cls._read(place, *changed)

    @classmethod
    @lru_cache(maxsize=1)
    def _read(cls, place: Path, *changed: int | None) -> Self:  # noqa: ARG003
        """Read them from a folder, once until its files change."""
        try:
            with (
                (place / IMAGES).open("rb") as images,
                np.load(images, allow_pickle=False) as arrays,
            ):
                found = {name: arrays[name] for name in arrays.files}
            with (place / CAPTIONS).open(encoding="utf-8", newline="") as stream:
                rows = list(csv.DictReader(stream))
            hexcodes = found["hexcode"]
            if [row["hexcode"] for row in rows] != hexcodes.tolist():
                raise ValueError(f"the rows of {CAPTIONS} are not those of {IMAGES}")
            shape = (len(rows), SIZE, SIZE, 3)
            for name in DRAWN:
                if found[name].shape != shape or found[name].dtype != np.uint8:
                    raise ValueError(
                        f"{name} is {found[name].dtype} {found[name].shape}, not {shape}"
                    )
            kept = np.array([row["group"] not in EXTRAS for row in rows])
            return cls(
                hexcodes[kept],
                np.array([row["annotation"] for row in rows])[kept],
                np.array([row["subgroup"] for row in rows])[kept],
                {name: found[name][kept] for name in DRAWN},
                (found["noto_valid"] & found["twemoji_valid"])[kept],
                short_digest([sha256(place / name) for name in (IMAGES, CAPTIONS)]),
            )
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise GatesError(
                f"{place} holds no whole set of drawings ({type(error).__name__}: {error}): give a "
                f"folder with {IMAGES} and {CAPTIONS}, or none for those of the package"
            ) from error


Image = np.ndarray  # (..., 32, 32, 3) float32 from 0 to 1; white is the background

LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)
NAVY = np.array([0.07, 0.09, 0.25], dtype=np.float32)


class Style(NamedTuple):
    """A style.

    Attributes:
        phrase: What a caption calls it.
        source: Which drawing it begins with.
        change: What is done to that; None for nothing.
    """

    phrase: str
    source: str = "openmoji_color"
    change: Callable[[Image], Image] | None = None


def grey(image: Image) -> Image:
    """Return the luminance in all three channels."""
    return np.repeat((image @ LUMINANCE)[..., None], 3, axis=-1)


def ink(image: Image) -> Image:
    """Return (..., 32, 32, 1) how much a pixel differs from the white background, 0 to 1."""
    return np.clip((1 - image.min(-1, keepdims=True)) * 4, 0, 1)


def over(image: Image, background: Image) -> Image:
    """Return a drawing on another background."""
    cover = ink(image)
    return cover * image + (1 - cover) * background


def blurred(image: Image) -> Image:
    """Return a drawing smoothed twice by 1 4 6 4 1."""
    for axis in (-3, -2) * 2:
        rolled = [np.roll(image, shift, axis) for shift in (-2, -1, 0, 1, 2)]
        image = sum(w * r for w, r in zip((1, 4, 6, 4, 1), rolled, strict=True)) / 16  # type: ignore[assignment]
    return image


def edges(image: Image) -> Image:
    """Return (..., 32, 32, 1) the steepness of the luminance, 0 to 1."""
    down, right = np.gradient(image @ LUMINANCE, axis=(-2, -1))
    return np.clip(np.hypot(down, right) * 3, 0, 1)[..., None]


def framed(image: Image) -> Image:
    """Return a drawing within a red frame of three pixels."""
    framed = image.copy()
    inside = np.zeros((32, 32, 1), dtype=bool)
    inside[3:-3, 3:-3] = True
    return np.where(inside, framed, np.array([0.8, 0.1, 0.1], dtype=np.float32))


def pixelated(image: Image) -> Image:
    """Return a drawing in blocks of 4 by 4 pixels."""
    blocks = image.reshape(*image.shape[:-3], 8, 4, 8, 4, 3).mean((-4, -2))
    return blocks.repeat(4, axis=-3).repeat(4, axis=-2)


def halved(image: Image) -> Image:
    """Return a drawing at half the size (..., 16, 16, 3)."""
    return image.reshape(*image.shape[:-3], 16, 2, 16, 2, 3).mean((-4, -2))


def tiled(image: Image) -> Image:
    """Return four small copies of a drawing."""
    return np.tile(halved(image), (2, 2, 1))


def shrunk(image: Image) -> Image:
    """Return one small copy of a drawing in the middle."""
    made = np.ones_like(image)
    made[..., 8:24, 8:24, :] = halved(image)
    return made


def duotone(image: Image) -> Image:
    """Return the luminance between dark blue and yellow."""
    light = grey(image)[..., :1]
    return light * np.array([1.0, 0.9, 0.3], np.float32) + (1 - light) * np.array(
        [0.1, 0.1, 0.5], np.float32
    )


def sepia(image: Image) -> Image:
    """Return the luminance in brown."""
    return np.clip(grey(image) * np.array([1.0, 0.82, 0.6], np.float32), 0, 1)


def silhouette(image: Image) -> Image:
    """Return the covered pixels in black."""
    return np.repeat(1 - ink(image), 3, axis=-1)


def neon(image: Image) -> Image:
    """Return bright green edges on black."""
    return edges(image) * np.array([0.3, 1.0, 0.6], np.float32)


def scanned(image: Image) -> Image:
    """Return a drawing with dark lines in every fourth pair of rows."""
    rows = np.where(np.arange(32) % 4 < 2, 1.0, 0.45).astype(np.float32)
    return image * rows[:, None, None]


def rainbow(image: Image) -> Image:
    """Return a drawing under stripes of six colors."""
    colors = np.array(
        [[1, 0.4, 0.4], [1, 0.7, 0.3], [1, 1, 0.4], [0.4, 0.9, 0.5], [0.4, 0.6, 1], [0.8, 0.5, 1]],
        np.float32,
    )
    return image * colors[np.arange(32) * 6 // 32][:, None, :]


def shadowed(image: Image) -> Image:
    """Return a drawing above its grey shadow, three pixels down and right."""
    shadow = np.roll(ink(image), (3, 3), (-3, -2))
    return over(image, np.repeat(1 - 0.55 * shadow, 3, axis=-1))


def checkered(image: Image) -> Image:
    """Return a drawing on a board of light blue fields."""
    place = np.arange(32) // 4
    field = ((place[:, None] + place) % 2)[..., None].astype(np.float32)
    return over(image, 1 - field * np.array([0.5, 0.25, 0.0], np.float32))


STYLES: dict[str, Style] = {
    "noto": Style("Noto style", "noto"),
    "twemoji": Style("Twemoji style", "twemoji"),
    "outline": Style("black outline", "openmoji_black"),
    "inverted": Style("inverted colors", change=lambda image: 1 - image),
    "swapped": Style("red and blue swapped", change=lambda image: image[..., ::-1]),
    "upside_down": Style("upside down", change=lambda image: image[..., ::-1, :, :]),
    "rotated": Style("rotated sideways", change=lambda image: np.rot90(image, axes=(-3, -2))),
    "grey": Style("grayscale", change=grey),
    "posterized": Style("posterized", change=lambda image: np.round(image * 2) / 2),
    "blurred": Style("blurred", change=blurred),
    "framed": Style("thick red frame", change=framed),
    "sepia": Style("sepia", change=sepia),
    "pixelated": Style("pixel art", change=pixelated),
    "tiled": Style("tiled four times", change=tiled),
    "shrunk": Style("very small", change=shrunk),
    "night": Style("dark background", change=lambda image: over(image, NAVY)),
    "neon": Style("neon lines", change=neon),
    "duotone": Style("blue and yellow duotone", change=duotone),
    "pastel": Style("pastel", change=lambda image: 0.55 + 0.45 * image),
    "silhouette": Style("silhouette", change=silhouette),
    "scanned": Style("scan lines", change=scanned),
    "rainbow": Style("rainbow stripes", change=rainbow),
    "shadowed": Style("drop shadow", change=shadowed),
    "checkered": Style("checkered background", change=checkered),
}  # name -> style; each has an adapter in the zoo


def drawn(drawings: Drawings, rows: np.ndarray, styles: tuple[str, ...] = ()) -> Image:
    """Return drawings in a style, or in several, one after the other.

    Args:
        drawings: All.
        rows: (n,) of them.
        styles: Names, of which the first alone may be one by another hand; none for the colored
            drawing of OpenMoji.

    Returns:
        (n, 32, 32, 3) float32 from 0 to 1.
    """
    found = [STYLES[name] for name in styles]
    if any(style.change is None for style in found[1:]):
        raise ValueError(f"only the first of {styles} may be drawn by another hand")
    source = found[0].source if found else "openmoji_color"
    image = drawings.images[source][rows].astype(np.float32) / 255
    for style in found:
        if style.change is not None:
            image = style.change(image)
    return np.ascontiguousarray(image, dtype=np.float32)
