"""Reading a frame table from Parquet, from one CSV file or from the parts of a preprocessor."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from core_gates.errors import GatesError
from endoscopy.data.frame_table import BOX, REQUIRED, FrameTable
from endoscopy.data.readers.cleaning import ReadReport, clean

PATHS = ("frame_path", "mask_path", "depth_path")
NUMBERS = (*BOX, "width", "height", "gt_minor", "distance_mm")


def read_frame_table(
    path: str | os.PathLike[str],
    roots: Mapping[str, str] | None = None,
    *,
    check_images: bool | None = None,
    decode: bool = False,
) -> tuple[FrameTable, ReadReport]:
    """Read a table and check every row of it.

    Args:
        path: ``*.parquet``, ``*.csv``, or a folder with ``polypsizing_*_part{k}.csv``. Relative
            paths in it begin in its folder.
        roots: Variable such as ``SUN_DATA_PATH`` to its folder; else the environment is asked.
        check_images: Check every image; by default for CSV only, since a Parquet file was
            written from a checked table.
        decode: Decode every image too.

    Returns:
        The table and what was excluded or repaired.

    Raises:
        GatesError: One line with the path, what was found and expected, and how to fix it.
    """
    path = Path(path)
    if path.is_dir():
        parts = sorted(path.glob("polypsizing_*_part*.csv"), key=_part_order)
        if not parts:
            raise GatesError(f"{path} holds no polypsizing_*_part*.csv; name a folder with parts")
        frames = pd.concat([read_csv(part) for part in parts], ignore_index=True)
    elif path.suffix == ".parquet":
        frames = read_parquet(path)
    else:
        frames = read_csv(path)
    missing = [name for name in REQUIRED if name not in frames]
    if missing:
        raise GatesError(f"{path} lacks the columns {', '.join(missing)}; add them")
    for name in NUMBERS:
        if name in frames:
            frames[name] = pd.to_numeric(frames[name], errors="coerce").astype(np.float64)
    if check_images is None:
        check_images = path.suffix != ".parquet"
    report = ReadReport(str(path), found=len(frames))
    _resolve(frames, path if path.is_dir() else path.parent, report)
    table = clean(frames, report, roots or {}, check_images=check_images, decode=decode)
    return table, report


def read_csv(path: Path) -> pd.DataFrame:
    """Read a CSV file as text, without guessing which values are missing.

    Raises:
        GatesError: The file is missing, empty or not CSV.
    """
    try:
        frames = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
        raise GatesError(f"{path} cannot be read: {what}; check the path and the file") from error
    return frames.rename(columns=lambda name: str(name).strip())


def read_parquet(path: Path) -> pd.DataFrame:
    """Read a Parquet file, dictionaries as text.

    Raises:
        GatesError: The file is missing or not Parquet.
    """
    try:
        frames = pd.read_parquet(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        what = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
        raise GatesError(f"{path} cannot be read: {what}; prepare it again") from error
    for name in frames.select_dtypes("category"):
        frames[name] = frames[name].astype(str)
    return frames


def _resolve(frames: pd.DataFrame, folder: Path, report: ReadReport) -> None:
    """Resolve relative paths in the folder of the table, which the report notes."""
    for name in PATHS:
        if name not in frames:
            continue
        values = frames[name].astype("string").fillna("").str.strip()
        relative = (values != "") & ~values.str.match(r"[$/]")
        if relative.any():
            report.base = str(folder.absolute())
            frames[name] = values.where(~relative, f"{report.base}/" + values).astype(object)


def _part_order(path: Path) -> tuple[str, int]:
    numbers = re.findall(r"\d+", path.stem)
    return (re.sub(r"\d+", "", path.stem), int(numbers[-1]) if numbers else 0)
