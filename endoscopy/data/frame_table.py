"""The frame table: one row for each lesion on each frame, in memory and on disk."""

from __future__ import annotations

import hashlib
import math
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from core_gates.errors import GatesError
from endoscopy.metrics.size_errors import flags_of, patients_of
from harness.files.atomic import replacing

REQUIRED = (
    "database",
    "unique_id",
    "frame_id",
    "bbox_xmin",
    "bbox_xmax",
    "bbox_ymin",
    "bbox_ymax",
    "width",
    "height",
    "frame_path",
    "gt",
)
OPTIONAL = (
    "mask_path",
    "depth_path",
    "patient",
    "censored",
    "brand",
    "shape",
    "site",
    "distance_mm",
    "exposure",
    "gt_minor",
    "histology",
)
TEXT = frozenset(
    {"database", "unique_id", "frame_path", "mask_path", "depth_path", "patient"}
    | {"brand", "shape", "site", "exposure", "histology"}
)
BOX = ("bbox_xmin", "bbox_xmax", "bbox_ymin", "bbox_ymax")
PATHS = ("frame_path", "mask_path", "depth_path")
SYNTHETIC, RENDERED = "synthetic", "SYNTH"
"""Scope of rendered frames, as their manifest names it, and their database."""

MACROS = {"SUN": "SUN_DATA_PATH", "REALC": "REAL_COLON_PATH", "SYNTH": "SYNTHETIC_PATH"}
"""Database to the variable for its folder in paths."""


@dataclass(frozen=True)
class FrameTable:
    """Frames of lesions of known size; build one with a reader, which repairs and reports faults.

    Attributes:
        frames: Columns ``REQUIRED`` and any of ``OPTIONAL``, index 0 to N-1. Boxes are edges in
            pixels of the image; ``gt`` is the diameter in mm, a lower bound where ``censored``.
        roots: Variable, such as ``REAL_COLON_PATH``, to its folder; any other is read from the
            environment.

    Raises:
        ValueError: A required column is missing, or there are no rows.
    """

    frames: pd.DataFrame
    roots: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if missing := [name for name in REQUIRED if name not in self.frames]:
            raise ValueError(f"frames lack the columns {', '.join(missing)}; add them")
        if self.frames.empty:
            raise ValueError("frames hold no row, expected at least one")
        if not self.frames.index.equals(pd.RangeIndex(len(self.frames))):
            object.__setattr__(self, "frames", self.frames.reset_index(drop=True))

    def __len__(self) -> int:
        return len(self.frames)

    @cached_property
    def unique_ids(self) -> tuple[str, ...]:
        """The objects, numbers first in ascending order, then names."""
        return tuple(sorted(set(self.frames["unique_id"]), key=object_order))

    @cached_property
    def object_codes(self) -> NDArray[np.int64]:
        """(N,) position of every row's object in `unique_ids`."""
        position = {name: code for code, name in enumerate(self.unique_ids)}
        return np.asarray(self.frames["unique_id"].map(position), dtype=np.int64)

    @cached_property
    def objects(self) -> pd.DataFrame:
        """The first row of every object, in the order of `unique_ids`."""
        first = self.frames.drop_duplicates("unique_id").set_index("unique_id", drop=False)
        return first.loc[list(self.unique_ids)].reset_index(drop=True)

    @cached_property
    def patients(self) -> NDArray[np.str_]:
        """(N,) patient of every row; an object without one counts as a separate patient."""
        return patients_of(self.frames)

    @cached_property
    def censored(self) -> NDArray[np.bool_]:
        """(N,) whether the size is a lower bound; false where unknown."""
        return flags_of(self.frames, "censored")

    def digest(self) -> str:
        """Return the hexadecimal SHA-256 of all rows, but not of the images that they name."""
        rows = pd.util.hash_pandas_object(self.frames, index=False)
        return hashlib.sha256(rows.to_numpy().tobytes()).hexdigest()

    def take(self, rows: Iterable[int] | NDArray[np.int64]) -> FrameTable:
        """Return the table of some rows, in the order given."""
        return FrameTable(self.frames.iloc[np.asarray(rows)].reset_index(drop=True), self.roots)

    def path(self, row: int, column: str = "frame_path") -> Path | None:
        """Return where a frame, mask or depth lies; None if the row has none.

        Raises:
            GatesError: A variable in the path has no value.
        """
        if column not in self.frames:
            return None
        value = self.frames[column].iat[row]
        if not isinstance(value, str) or not value:
            return None
        return Path(expand(value, self.roots))

    def write_parquet(self, path: str | os.PathLike[str]) -> Path:
        """Write all columns, text as dictionaries; the file is complete or absent."""
        path = Path(path)
        table = pa.Table.from_pandas(self.frames, preserve_index=False)
        texts = [name for name in self.frames if name in TEXT]
        for name in texts:
            column = table[name].cast(pa.string()).dictionary_encode()
            table = table.set_column(table.column_names.index(name), name, column)
        with replacing(path) as temporary:
            pq.write_table(table, temporary, compression="zstd", use_dictionary=texts)
        return path


def concatenate(tables: Iterable[FrameTable]) -> FrameTable:
    """Join the rows of several tables.

    Raises:
        GatesError: Two tables share the name of an object, or give one variable two folders.
    """
    tables = list(tables)
    roots: dict[str, str] = {}
    seen: set[str] = set()
    for table in tables:
        if shared := seen & set(table.unique_ids):
            raise GatesError(f"object {min(shared)} is in two tables; read one of them only")
        seen |= set(table.unique_ids)
        for name, folder in table.roots.items():
            if roots.setdefault(name, folder) != folder:
                raise GatesError(
                    f"${name} is {roots[name]} in one table and {folder} in another; prepare "
                    "them under one folder"
                )
    return FrameTable(pd.concat([t.frames for t in tables], ignore_index=True), roots)


def expand(path: str, roots: Mapping[str, str]) -> str:
    """Replace ``$NAME`` or ``${NAME}`` at the start of a path.

    Raises:
        GatesError: The variable has no value.
    """
    match = re.match(r"\$(?:\{(\w+)\}|(\w+))", path)
    if match is None:
        return path
    name = match[1] or match[2]
    folder = roots.get(name) or os.environ.get(name)
    if not folder:
        raise GatesError(f"path {path} needs ${name}, which has no value; set it to the folder")
    return folder + path[match.end() :]


def object_order(unique_id: str) -> tuple[int, int, str]:
    """Sort key that puts numbers first, in numerical order, then names."""
    number = unique_id.isascii() and unique_id.isdigit()
    return (0, int(unique_id), "") if number else (1, 0, unique_id)


def object_key(database: str, unique_id: str, size_mm: float) -> str:
    """Return a short hash that identifies an object without naming it.

    Names of rendered objects repeat from set to set, so their sizes are hashed too; sizes of real
    ones are left out, since the hash of a whole number of millimeters reveals the number.
    """
    size = f"/{size_mm:.4f}" if database == RENDERED else ""
    return hashlib.sha256(f"{database}/{unique_id}{size}".encode()).hexdigest()[:12]


def object_keys(frames: pd.DataFrame) -> list[str]:
    """Return the keys of the objects of a frame table, sorted; see `object_key`."""
    first_frames = frames.drop_duplicates("unique_id")
    columns = zip(
        first_frames["database"], first_frames["unique_id"], first_frames["gt"], strict=True
    )
    return sorted(object_key(*values) for values in columns)


LARGEST_MM = 200.0
FEWEST = 5  # objects whose sizes reveal their unit
IMPOSSIBLE = f"size is not between 0 and {LARGEST_MM:g} mm"
MISSING = frozenset({"", "nan", "na", "n/a", "none", "null", "-", "?", "unknown"})
_PATTERN = re.compile(
    r"(?P<above>>=|>|≥)?\s*(?P<number>\d+(?:[.,]\d+)?)\s*(?P<unit>mm|cm)?\s*(?P<open>-|–|\+)?"
)


class Size(NamedTuple):
    """A size, or the reason why there is none.

    Attributes:
        mm: Diameter in millimeters; NaN without one.
        censored: Whether the polyp has this size or a larger one.
        fault: Empty, or why the row has to be excluded.
        has_unit: Whether the unit is stated.
    """

    mm: float
    censored: bool = False
    fault: str = ""
    has_unit: bool = False


def parse_size(value: object) -> Size:
    """Parse a size in millimeters, or in centimeters if that is the unit.

    Args:
        value: A number or text such as ``6``, ``6mm``, ``15mm-``, ``>=15``, ``0.6 cm``.

    Returns:
        The size. A missing value is not a separate class, and never "large".
    """
    text = str(value).strip().lower() if value is not None else ""
    if text in MISSING or text == "<na>":
        return Size(math.nan, fault="size is missing")
    match = _PATTERN.fullmatch(text)
    if match is None and text.startswith("-") and _PATTERN.fullmatch(text[1:]):
        return Size(math.nan, fault=IMPOSSIBLE)
    if match is None:
        return Size(math.nan, fault="size cannot be read")
    mm = float(match["number"].replace(",", ".")) * (10.0 if match["unit"] == "cm" else 1.0)
    if not 0.0 < mm <= LARGEST_MM:
        return Size(math.nan, fault=IMPOSSIBLE)
    return Size(mm, bool(match["open"] or match["above"]), has_unit=match["unit"] is not None)


def look_like_centimeters(mm: Sequence[float]) -> bool:
    """Return whether sizes of objects, read as millimeters, would fit polyps in centimeters.

    Half of them at most 1.5 and none above 6: implausible for polyps in millimeters, common in
    centimeters.
    """
    return len(mm) >= FEWEST and max(mm) <= 6.0 and statistics.median(mm) <= 1.5


SMALLEST_AREA = 16.0
SMALLEST_RENDERED = 1.0  # boxes of rendered frames are not drawn by hand: small ones are right

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


class RepairedBoxes(NamedTuple):
    """N boxes and what was done to each.

    Attributes:
        boxes: (N,4) float64 xmin, xmax, ymin, ymax in pixels of the image, edges not centers.
        rescaled: (N,) the annotation gives another image size than the image has.
        swapped: (N,) a minimum was above its maximum.
        clipped: (N,) the box left the frame.
        invalid: (N,) a corner is not a finite number; to be excluded.
        small: (N,) less than 16 square pixels, or ``smallest``, are inside the frame; to be
            excluded.
    """

    boxes: Floats
    rescaled: Flags
    swapped: Flags
    clipped: Flags
    invalid: Flags
    small: Flags


def repair_boxes(
    boxes: Floats, annotated: Floats, actual: Floats, smallest: float | Floats = SMALLEST_AREA
) -> RepairedBoxes:
    """Bring boxes into the frame of their images.

    Args:
        boxes: (N,4) xmin, xmax, ymin, ymax as annotated.
        annotated: (N,2) width and height that the annotation gives; not above 0 or NaN where it
            gives none.
        actual: (N,2) width and height of the image.
        smallest: Smallest area in square pixels, of all or (N,) of each.
    """
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    stated = np.nan_to_num(annotated, nan=0.0) > 0
    rescaled = (stated & (annotated != actual)).any(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.where(stated, actual / annotated, 1.0)
    boxes *= np.repeat(scale, 2, axis=1)

    invalid = np.asarray(~np.isfinite(boxes).all(axis=1))
    boxes[invalid] = 0.0
    low, high = boxes[:, 0::2].copy(), boxes[:, 1::2].copy()
    swapped = np.asarray((low > high).any(axis=1))
    low, high = np.minimum(low, high), np.maximum(low, high)
    inside_low, inside_high = np.clip(low, 0.0, actual), np.clip(high, 0.0, actual)
    clipped = (inside_low != low).any(axis=1) | (inside_high != high).any(axis=1)
    small = ~invalid & ((inside_high - inside_low).prod(axis=1) < smallest)

    boxes[:, 0::2], boxes[:, 1::2] = inside_low, inside_high
    return RepairedBoxes(boxes, rescaled, swapped, clipped, invalid, small)
