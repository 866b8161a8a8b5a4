"""Folders of captioned images: those of kohya's scripts, and those with a ``metadata.jsonl``."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from core_gates.errors import GatesError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
TABLE = "metadata.jsonl"
LARGEST = 64 * 2**20
"""Pixels of an image that is read."""

REPEATS = re.compile(r"(\d+)_.*")


class Captioned(NamedTuple):
    """An image with its caption.

    Attributes:
        path: Of the image.
        caption: May be empty.
        repeats: How often it is seen in an epoch.
    """

    path: Path
    caption: str
    repeats: int = 1


def captioned_images(folder: str | Path) -> list[Captioned]:
    """Return the images of a folder with their captions, in order.

    A ``metadata.jsonl`` names images as ``file_name`` with ``text`` or ``prompt``. Without one,
    each image has its caption in a ``.txt`` file of its name, and images in a folder such as
    ``10_fruit`` are seen ten times in an epoch.

    Raises:
        GatesError: There is no image, an image has no caption, or a line of the table is damaged.
    """
    place = Path(folder)
    if not place.is_dir():
        raise GatesError(f"{place} is no folder: give one of images with captions")
    table = place / TABLE
    found = list(_of_table(place, table) if table.is_file() else _of_texts(place))
    if not found:
        raise GatesError(
            f"{place} holds no image ({', '.join(SUFFIXES)}): give images with .txt files of the "
            f"same name, or a {TABLE}"
        )
    return found


def read_image(path: Path, size: int) -> Tensor:
    """Return an image (3, size, size) from -1 to 1, its middle square, on white.

    Raises:
        GatesError: It is not an image, damaged or too large.
    """
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > LARGEST:
                raise ValueError(f"{opened.width} by {opened.height} pixels are too many")
            image = opened.convert("RGBA")
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise GatesError(f"{path} cannot be read as an image: {error}") from error
    white = Image.new("RGBA", image.size, "white")
    flat = Image.alpha_composite(white, image).convert("RGB")
    side = min(flat.size)
    left, top = (flat.width - side) // 2, (flat.height - side) // 2
    square = flat.crop((left, top, left + side, top + side)).resize(
        (size, size), Image.Resampling.BOX
    )
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1


def _of_table(place: Path, table: Path) -> Iterator[Captioned]:
    for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row.get("text", row.get("prompt"))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise GatesError(
                f'{table}, line {number} is no {{"file_name": ..., "text": ...}}: fix or remove it'
            ) from error
        path = (place / str(name)).resolve()
        if not path.is_relative_to(place.resolve()) or not path.is_file():
            raise GatesError(f"{table}, line {number} names {name!r}, which is not in the folder")
        if not isinstance(text, str):
            raise GatesError(f"{table}, line {number} has no text: give the caption of {name!r}")
        yield Captioned(path, text)


def _of_texts(place: Path) -> Iterator[Captioned]:
    for path in sorted(p for p in place.rglob("*") if p.suffix.lower() in SUFFIXES):
        if any(part.startswith(".") for part in path.relative_to(place).parts):
            continue
        text = path.with_suffix(".txt")
        if not text.is_file():
            raise GatesError(f"{path} has no caption: write one to {text.name}, empty if need be")
        match = REPEATS.fullmatch(path.parent.name) if path.parent != place else None
        caption = " ".join(text.read_text(encoding="utf-8", errors="replace").split())
        yield Captioned(path, caption, max(1, int(match[1])) if match else 1)
