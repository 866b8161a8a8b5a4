"""Images with what made them: a PNG that other programs understand, and a JSON file next to it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from core_gates.errors import GatesError
from harness.files.atomic import finite, replacing

LABELS = {
    "steps": "Steps",
    "sampler": "Sampler",
    "guidance": "CFG scale",
    "seed": "Seed",
    "size": "Size",
    "model": "Model",
}
"""Field of a record -> its name in the text of a PNG, in order."""


def save_picture(image: Image.Image | Tensor, path: str | Path, record: Mapping[str, Any]) -> Path:
    """Write an image as PNG and its record as JSON under the same name, each whole or not at all.

    The PNG holds a chunk ``parameters`` as AUTOMATIC1111 writes it, see :func:`parameters_of`. The
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
        record: Of it are written ``prompt``, ``negative_prompt``, the fields of :data:`LABELS` and
            ``adapters``, a list of ``name`` and ``strength``. Adapters stand in the prompt, as
            ``<lora:name:strength>``.
    """
    adapters = "".join(
        f" <lora:{one['name']}:{one.get('strength', 1.0):g}>" for one in record.get("adapters", ())
    )
    lines = [f"{record.get('prompt', '')}{adapters}"]
    if record.get("negative_prompt"):
        lines.append(f"Negative prompt: {record['negative_prompt']}")
    found = [
        f"{label}: {_quoted(record[field])}"
        for field, label in LABELS.items()
        if record.get(field) is not None
    ]
    return "\n".join([*lines, ", ".join([*found, "Version: gatesuite"])])


def _quoted(value: object) -> str:
    """Return a value as text, in quotes where a comma or a colon in it would be misread."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:"\n') else text


def _picture_of(image: Tensor) -> Image.Image:
    if image.ndim != 3 or len(image) != 3:
        raise GatesError(f"a picture has the shape (3, height, width), found {tuple(image.shape)}")
    levels = image.detach().cpu().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())
