"""Images as files: a PNG with its parameters, and a JSON file with all that decided it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from PIL import Image

from apps.diffusion.generation.studio import Studio
from core_gates.errors import GatesError
from diffusion.data.contact_sheet import contact_sheet
from diffusion.data.pictures import save_picture
from diffusion.fusion.pipeline import Generated
from harness.files import short_digest

SAMPLER = "Euler"
LETTERS = 40  # of a prompt, in the name of a file


def record_of(studio: Studio, found: Generated, mode: str) -> dict[str, Any]:
    """Return all that decided an image, as plain values.

    Args:
        studio: What made it.
        found: The image.
        mode: How adapters were combined, as it was asked for.
    """
    record = found.record()
    gates = record["gates"] or {}
    adapters = [
        {
            **one,
            **studio.finder.described(one["name"], found.prompt),
            "mean_gate": gates.get(one["name"], {}).get("mean"),
        }
        for one in record["adapters"]
    ]
    named = {} if found.mode in ("gated", "sum", "none") else {"mode": mode}
    if studio.dtype is not None:
        named["dtype"] = studio.dtype
    return {
        **record,
        **named,
        "adapters": adapters,
        "model": studio.model,
        "sampler": SAMPLER,
        "hashes": studio.hashes,
    }


def save(image: Image.Image, record: dict[str, Any], folder: Path) -> Path:
    """Write an image and its record, under a name that prompt, seed and all else decide."""
    return save_picture(image, folder / f"{name_of(record)}.png", record)


def save_sheet(images: list[Image.Image], records: list[dict[str, Any]], folder: Path) -> Path:
    """Write many images on one sheet, with the names of their files."""
    first = records[0]
    record = {
        **first,
        "seeds": [one["seed"] for one in records],
        "files": [f"{name_of(one)}.png" for one in records],
    }
    return save_picture(contact_sheet(images), folder / f"{name_of(record)}-sheet.png", record)


def name_of(record: dict[str, Any]) -> str:
    """Return the stem of the files of an image: equal records have equal names."""
    words = re.sub(r"[^a-z0-9]+", "-", record["prompt"].lower()).strip("-")[:LETTERS].strip("-")
    return f"{words or 'image'}-s{record['seed']}-{short_digest(_settled(record), 8)}"


def _settled(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record without what its other fields decide, which rounding may change."""
    results = ("weights", "metadata", "mean_gate", "score", "why")
    adapters = [{n: v for n, v in one.items() if n not in results} for one in record["adapters"]]
    return {n: v for n, v in record.items() if n not in ("gates", "skipped")} | {
        "adapters": adapters
    }


def require_writable(folder: Path) -> None:
    """Refuse a folder for outputs that cannot be written, before anything expensive is done.

    Raises:
        GatesError: It is a file, lies below one, or may not be written.
    """
    place = next((one for one in (folder, *folder.parents) if one.exists()), folder)
    if not place.is_dir():
        raise GatesError(f"{folder} cannot be written, {place} is a file: choose another --output")
    if not os.access(place, os.W_OK):
        raise GatesError(f"{folder} cannot be written: choose another --output")
