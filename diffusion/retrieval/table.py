"""The table of adapters, images and captions that the published retriever is trained from."""

import csv
from collections.abc import Callable
from pathlib import Path

from diffusion.lora_file import LoraBundle, load_lora
from diffusion.lora_file.container.text import clean
from diffusion.lora_file.errors import LoraFileError
from diffusion.retrieval.captions import Example

COLUMNS = ("model_file", "image_file", "text", "text_short", "text_medium")
DESCRIPTION, CONCEPT = "description_en", "concept"
DESCRIBED = 0.5
"""How often a description of the adapter precedes the short caption, where there is one."""


def read_table(
    path: str | Path,
    *,
    root: str | Path | None = None,
    load: Callable[[Path], LoraBundle] = load_lora,
) -> list[Example]:
    """Read a CSV with a row per image and group its rows by adapter.

    A caption is drawn by image first, then from its long, short and medium form; half of the time
    it is the description of the adapter with the short form, if there is one.

    Args:
        path: UTF-8, with the columns ``model_file``, ``image_file``, ``text``, ``text_short`` and
            ``text_medium``; ``description_en`` and ``concept`` are optional. An adapter without
            concept is its own.
        root: Folder that ``model_file`` is relative to; that of the table if None. No file outside
            of it is read.
        load: Reads an adapter.

    Raises:
        LoraFileError: The table cannot be read, lacks a column or a caption, or names a file
            outside of the folder.
    """
    path = Path(path)
    folder = (Path(root) if root is not None else path.parent).resolve()
    captions: dict[str, list[dict[str, float]]] = {}
    concepts: dict[str, str] = {}
    for number, row in _rows(path):
        name = row["model_file"]
        weighted = _weighted(row)
        if not name or not weighted:
            what = "caption" if name else "model_file"
            raise LoraFileError(f"line {number} of {_label(path)} has no {what}: fill it in")
        captions.setdefault(name, []).append(weighted)
        concepts.setdefault(name, row.get(CONCEPT) or name)
    if not captions:
        raise LoraFileError(f"{_label(path)} has no rows: give one per image")
    return [
        Example(load(_inside(folder, name)), *_joined(images, concepts[name]))
        for name, images in captions.items()
    ]


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Return the rows with their lines.

    Raises:
        LoraFileError: The table cannot be read, or lacks a column.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise LoraFileError(
                    f"{_label(path)} lacks the columns {', '.join(missing)}: expected "
                    f"{', '.join(COLUMNS)}"
                )
            return [
                (reader.line_num, {k: (v or "").strip() for k, v in row.items() if k is not None})
                for row in reader
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise LoraFileError(f"{_label(path)} cannot be read: {clean(reason, 200)}") from error


def _weighted(row: dict[str, str]) -> dict[str, float]:
    """Return the captions of an image and how often each is drawn."""
    forms = [row[name] for name in ("text", "text_short", "text_medium") if row[name]]
    description = row.get(DESCRIPTION, "")
    found: dict[str, float] = {}
    if description:
        text = f"{description} {row['text_short']}".strip()
        found[text] = DESCRIBED if forms else 1.0
    for text in forms:
        share = (1 - DESCRIBED if description else 1.0) / len(forms)
        found[text] = found.get(text, 0.0) + share
    return found


def _joined(images: list[dict[str, float]], concept: str) -> tuple[list[str], str, list[float]]:
    """Return the captions of an adapter, its concept, and how often each caption is drawn."""
    total: dict[str, float] = {}
    for weighted in images:
        for text, weight in weighted.items():
            total[text] = total.get(text, 0.0) + weight / len(images)
    return list(total), concept, list(total.values())


def _inside(folder: Path, name: str) -> Path:
    """Return the path of an adapter.

    Raises:
        LoraFileError: It lies outside of the folder.
    """
    try:
        path = (folder / name).resolve()
    except (OSError, ValueError) as error:
        raise LoraFileError(f"{clean(name, 200)!r} is not the name of a file") from error
    if not path.is_relative_to(folder):
        raise LoraFileError(f"{clean(name, 200)} lies outside of {_label(folder)}: move it there")
    return path


def _label(path: Path) -> str:
    return clean(str(path), 200)
