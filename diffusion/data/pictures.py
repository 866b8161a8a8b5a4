"""Images as files: folders of captioned ones, images with what made them, and contact sheets."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from core_gates.errors import GatesError
from harness.files.atomic import finite, replacing
from harness.files.texts import read_utf8

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
TABLE = "metadata.jsonl"
UNREAD = (".gif", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl")
"""Images that are not read, and named where a folder holds them."""

LARGEST = 64 * 2**20  # pixels of an image that is read

MOST_LEVELS = 2**16 - 1  # white of an image of 16 bits

REPEATS = re.compile(r"([0-9]+)_.*")
MOST_DIGITS = 4  # of repeats: a longer number, such as that of a day, was not meant so


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
    images = list(_of_table(place, table) if table.is_file() else _of_texts(place))
    if not images:
        raise GatesError(
            f"{place} holds no image ({', '.join(SUFFIXES)}): give images with .txt files of the "
            f"same name, or a {TABLE}"
        )
    return images


def read_image(path: Path, size: int) -> Tensor:
    """Return an image (3, size, size) from -1 to 1, its middle square, upright and on white.

    Raises:
        GatesError: It is not an image, damaged or too large, or its levels have no known white.
    """
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > LARGEST:
                raise ValueError(f"{opened.width} by {opened.height} pixels are too many")
            image = _eight_bits(ImageOps.exif_transpose(opened)).convert("RGBA")
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise GatesError(f"{path} cannot be read as an image: {error}") from error
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    side = min(flat.size)
    left, top = (flat.width - side) // 2, (flat.height - side) // 2
    square = flat.crop((left, top, left + side, top + side)).resize(
        (size, size), Image.Resampling.BOX
    )
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return an image with levels from 0 to 255; those of 16 bits would be cut off otherwise.

    Raises:
        ValueError: Its levels are floating-point numbers, or integers beyond 16 bits.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    levels = np.asarray(image)
    if image.mode == "F" or levels.min() < 0 or levels.max() > MOST_LEVELS:
        raise ValueError("its levels are no integers of 8 or 16 bits: save it as one of these")
    return Image.fromarray((levels / (MOST_LEVELS / 255)).round().astype(np.uint8))


def _of_table(place: Path, table: Path) -> Iterator[Captioned]:
    for number, line in enumerate(read_utf8(table).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row.get("text", row.get("prompt"))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise GatesError(
                f'{table}, line {number} is no {{"file_name": ..., "text": ...}}: fix or remove it'
            ) from error
        path = place / str(name)
        inside = "\0" not in str(name) and path.resolve().is_relative_to(place.resolve())
        if not inside or not path.is_file():
            raise GatesError(f"{table}, line {number} names {name!r}, which is not in the folder")
        if not isinstance(text, str):
            raise GatesError(f"{table}, line {number} has no text: give the caption of {name!r}")
        yield Captioned(path.resolve(), text)


def _of_texts(place: Path) -> Iterator[Captioned]:
    for path in sorted(p for p in place.rglob("*") if p.suffix.lower() in SUFFIXES + UNREAD):
        if any(part.startswith(".") for part in path.relative_to(place).parts):
            continue
        if path.suffix.lower() in UNREAD:
            raise GatesError(f"{path} is not read, only {', '.join(SUFFIXES)}: convert or move it")
        text = path.with_suffix(".txt")
        if not text.is_file():
            raise GatesError(f"{path} has no caption: write one to {text.name}, empty if need be")
        match = REPEATS.fullmatch(path.parent.name) if path.parent != place else None
        if match and len(match[1].lstrip("0")) > MOST_DIGITS:
            raise GatesError(
                f"{path.parent} would be seen {match[1]} times in an epoch: give it another name"
            )
        caption = " ".join(read_utf8(text).split())
        yield Captioned(path, caption, max(1, int(match[1])) if match else 1)


GAP = 4  # pixels between images

LEAST = 128  # pixels of the shorter side of an image on a sheet, which smaller ones are enlarged to


def enlarged(image: Image.Image, least: int = LEAST) -> Image.Image:
    """Return an image enlarged by a whole factor, without smoothing.

    Args:
        image: Of any size.
        least: Pixels that the shorter side has at least.
    """
    factor = max(1, -(-least // min(image.size)))
    size = (image.width * factor, image.height * factor)
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST)


def contact_sheet(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Return images of one size in rows, on white.

    Args:
        images: At least one.
        columns: Images in a row; as many as make the sheet about square if None.

    Raises:
        ValueError: There is no image.
    """
    if not images:
        raise ValueError("images are empty, expected at least one")
    large = [enlarged(image) for image in images]
    columns = columns or round(len(large) ** 0.5 + 0.49)
    columns = min(columns, len(large))
    rows = -(-len(large) // columns)
    width, height = large[0].size
    size = (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP)
    sheet = Image.new("RGB", size, "white")
    for number, image in enumerate(large):
        row, column = divmod(number, columns)
        sheet.paste(image, (column * (width + GAP), row * (height + GAP)))
    return sheet


LABELS = {
    "steps": "Steps",
    "sampler": "Sampler",
    "guidance": "CFG scale",
    "seed": "Seed",
    "size": "Size",
    "model": "Model",
}  # field of a record -> its name in the text of a PNG, in order


def save_picture(image: Image.Image | Tensor, path: str | Path, record: Mapping[str, Any]) -> Path:
    """Write an image as PNG and its record as JSON under the same name, each whole or not at all.

    The PNG holds a chunk ``parameters`` as AUTOMATIC1111 writes it, see `parameters_of`. The
    same pixels and record give the same bytes.

    Args:
        image: An image, or a tensor (3, H, W) from 0 to 1.
        path: Ends in ``.png``.
        record: Plain values by name, such as ``prompt``, ``seed``, ``steps`` and ``adapters``.

    Returns:
        Path of the PNG.

    Raises:
        GatesError: The path has another suffix or cannot be written, or the record holds what JSON
            cannot.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise GatesError(f"{path} is to be a picture: give a name that ends in .png")
    picture = image if isinstance(image, Image.Image) else _picture_of(image)
    record = {"size": f"{picture.width}x{picture.height}", **record}
    try:
        text = json.dumps(finite(record), indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise GatesError(f"the record of {path.name} cannot be written: {error}") from error
    chunks = PngInfo()
    chunks.add_text("parameters", parameters_of(record).replace("\0", ""))
    with replacing(path) as png, replacing(path.with_suffix(".json")) as sidecar:
        picture.save(png, format="PNG", pnginfo=chunks, compress_level=6)
        sidecar.write_text(text + "\n", encoding="utf-8")
    return path


def parameters_of(record: Mapping[str, Any]) -> str:
    """Return a record as AUTOMATIC1111 writes it into images: prompts, then settings in one line.

    Args:
        record: Of it are written ``prompt``, ``negative_prompt``, the fields of `LABELS` and
            ``adapters``, a list of ``name`` and ``strength``. Adapters stand in the prompt, as
            ``<lora:name:strength>``.
    """
    adapters = "".join(
        f" <lora:{adapter['name']}:{adapter.get('strength', 1.0):g}>"
        for adapter in record.get("adapters", ())
    )
    lines = [f"{record.get('prompt', '')}{adapters}"]
    if record.get("negative_prompt"):
        lines.append(f"Negative prompt: {record['negative_prompt']}")
    settings = [
        f"{label}: {_quoted(record[field])}"
        for field, label in LABELS.items()
        if record.get(field) is not None
    ]
    return "\n".join([*lines, ", ".join([*settings, "Version: gatesuite"])])


def _quoted(value: object) -> str:
    """Return a value as text, in quotes where a comma or a colon in it would be misread."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:"\n') else text


def _picture_of(image: Tensor) -> Image.Image:
    if image.ndim != 3 or len(image) != 3:
        raise GatesError(f"a picture has the shape (3, height, width), found {tuple(image.shape)}")
    levels = image.detach().cpu().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())
