"""The frame table: one row for each lesion on each frame, in memory and on disk."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from core_gates.errors import GatesError
from endoscopy.metrics.columns import flags_of, patients_of
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
SYNTHETIC = "synthetic"
"""Scope of rendered frames, as their manifest names it."""

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
        missing = [name for name in REQUIRED if name not in self.frames]
        if missing:
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
        """(N,) position of every row's object in :attr:`unique_ids`."""
        position = {name: code for code, name in enumerate(self.unique_ids)}
        codes = self.frames["unique_id"].map(position)
        return np.asarray(codes, dtype=np.int64)

    @cached_property
    def objects(self) -> pd.DataFrame:
        """The first row of every object, in the order of :attr:`unique_ids`."""
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
