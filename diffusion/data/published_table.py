"""The published table of adapters, with the images that were made with them and their captions."""

import csv
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from core_gates.errors import GatesError
from diffusion.lora_file import LoraBundle, load_lora
from diffusion.lora_file.container import LoraFileError, clean, label
from harness.files.texts import check_cells

COLUMNS = ("model_file", "image_file", "text", "text_short", "text_medium")
FORMS = ("text", "text_short", "text_medium")
DESCRIPTION, CONCEPT = "description_en", "concept"
DESCRIBED = 0.5
"""How often a description of the adapter precedes the short caption, where there is one."""


class TableRow(NamedTuple):
    """An image with what made it.

    Attributes:
        line: In the file.
        model_file: Of the adapter.
        image_file: Of the image; may be empty.
        forms: Long, short and medium caption, as far as they are there.
        captions: Each caption and how often it is drawn.
        concept: What the adapter was trained for; its file where nothing is said.
    """

    line: int
    model_file: str
    image_file: str
    forms: tuple[str, ...]
    captions: dict[str, float]
    concept: str


class Example(NamedTuple):
    """An adapter with what describes images that are made with it.

    Attributes:
        bundle: The adapter.
        captions: Texts, at least one.
        concept: What it was trained for; adapters of one concept are no negatives of each other.
        weights: How often each caption is drawn, relative to the others; equally often if None.
    """

    bundle: LoraBundle
    captions: Sequence[str]
    concept: str
    weights: Sequence[float] | None = None


def read_rows(path: Path) -> list[TableRow]:
    """Read a CSV with a row per image.

    Args:
        path: UTF-8, with the columns ``model_file``, ``image_file``, ``text``, ``text_short`` and
            ``text_medium``; ``description_en`` and ``concept`` are optional.

    Raises:
        LoraFileError: It cannot be read, has no row, or lacks a column, an adapter or a caption.
    """
    rows = []
    for number, row in _lines(path):
        name, captions = row["model_file"], _weighted(row)
        if not name or not captions:
            what = "caption" if name else "model_file"
            raise LoraFileError(f"line {number} of {label(path)} has no {what}: fill it in")
        forms = tuple(row[form] for form in FORMS if row[form])
        concept = row.get(CONCEPT) or name
        rows.append(TableRow(number, name, row["image_file"], forms, captions, concept))
    if not rows:
        raise LoraFileError(f"{label(path)} has no rows: give one per image")
    return rows


def held_out_rows(rows: Sequence[TableRow], share: float) -> tuple[list[TableRow], list[TableRow]]:
    """Return the rows of training, and those that are held out.

    Of each adapter with two rows or more a share is held out, at least one, which depends on the
    content of its rows alone; a row that is there twice counts once, so that it is in one part.

    Args:
        rows: Of a table.
        share: From 0, for none, to below 1.
    """
    by_file: dict[str, list[TableRow]] = {}
    for row in dict(zip(map(_key, rows), rows, strict=True)).values():
        by_file.setdefault(row.model_file, []).append(row)
    kept: list[TableRow] = []
    held: list[TableRow] = []
    for group in by_file.values():
        count = min(len(group) - 1, max(1, round(share * len(group)))) if share else 0
        order = sorted(group, key=_key)
        held += order[:count]
        chosen = {id(row) for row in order[:count]}
        kept += [row for row in group if id(row) not in chosen]
    return kept, held


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file that a table names.

    Raises:
        LoraFileError: It lies outside of the folder.
    """
    try:
        path = (folder / name).resolve()
    except (OSError, ValueError) as error:
        raise LoraFileError(f"{clean(name, 200)!r} is not the name of a file") from error
    if not path.is_relative_to(folder.resolve()):
        raise LoraFileError(f"{clean(name, 200)} lies outside of {label(folder)}: move it there")
    return path


def _key(row: TableRow) -> str:
    text = "\0".join([row.model_file, row.image_file, *row.forms])
    return hashlib.sha256(text.encode()).hexdigest()


def _lines(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Return the rows with their lines.

    Raises:
        LoraFileError: The table cannot be read, or lacks a column.
    """
    try:
        check_cells(path)
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            lines = [
                (reader.line_num, {k: (v or "").strip() for k, v in row.items()}) for row in reader
            ]
    except (OSError, csv.Error, GatesError) as error:
        reason = getattr(error, "strerror", None) or str(error).removeprefix(f"{path}, ")
        raise LoraFileError(f"{label(path)} cannot be read: {clean(reason, 200)}") from error
    if missing:
        raise LoraFileError(
            f"{label(path)} lacks the columns {', '.join(missing)}: expected {', '.join(COLUMNS)}"
        )
    return lines


def _weighted(row: dict[str, str]) -> dict[str, float]:
    """Return the captions of an image and how often each is drawn."""
    forms = [row[name] for name in FORMS if row[name]]
    description = row.get(DESCRIPTION, "")
    weights: dict[str, float] = {}
    if description:
        text = f"{description} {row['text_short']}".strip()
        weights[text] = DESCRIBED if forms else 1.0
    for text in forms:
        share = (1 - DESCRIBED if description else 1.0) / len(forms)
        weights[text] = weights.get(text, 0.0) + share
    return weights


Load = Callable[[Path], LoraBundle]


def split_table(
    path: str | Path,
    held_out: float,
    *,
    root: str | Path | None = None,
    load: Load = load_lora,
) -> tuple[list[Example], list[Example]]:
    """Return the adapters of a table with the captions of training, and with those held out.

    The table is a CSV with a row per image; its rows are grouped by adapter. A caption is drawn by
    image first, then from its long, short and medium form; half of the time it is the description
    of the adapter with the short form, if there is one.

    Args:
        path: See `read_rows`. An adapter without concept is its own.
        held_out: Fraction of the rows of each adapter that is held out.
        root: Folder that ``model_file`` is relative to; that of the table if None. No file outside
            of it is read.
        load: Reads an adapter, each once.

    Raises:
        LoraFileError: The table cannot be read, lacks a column or a caption, or names a file
            outside of the folder.
    """
    path = Path(path)
    folder = (Path(root) if root is not None else path.parent).resolve()
    rows = read_rows(path)
    bundles: dict[str, LoraBundle] = {}
    for row in rows:
        if row.model_file not in bundles:
            bundles[row.model_file] = load(inside(folder, row.model_file))
    parts = held_out_rows(rows, held_out)
    return _examples(parts[0], bundles), _examples(parts[1], bundles)


def _examples(rows: Sequence[TableRow], bundles: dict[str, LoraBundle]) -> list[Example]:
    """Return adapters, with what describes them."""
    captions: dict[str, list[dict[str, float]]] = {}
    concepts: dict[str, str] = {}
    for row in rows:
        captions.setdefault(row.model_file, []).append(row.captions)
        concepts.setdefault(row.model_file, row.concept)
    return [
        Example(bundles[name], *_joined(images, concepts[name]))
        for name, images in captions.items()
    ]


def _joined(images: list[dict[str, float]], concept: str) -> tuple[list[str], str, list[float]]:
    """Return the captions of an adapter, its concept, and how often each caption is drawn."""
    total: dict[str, float] = {}
    for weighted in images:
        for text, weight in weighted.items():
            total[text] = total.get(text, 0.0) + weight / len(images)
    return list(total), concept, list(total.values())
