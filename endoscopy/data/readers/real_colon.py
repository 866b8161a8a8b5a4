"""The layout of REAL-Colon (Biffi et al., Scientific Data 2024), which rendered data shares."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from core_gates.errors import GatesError
from endoscopy.data.readers.clean import clean
from endoscopy.data.readers.report import ReadReport
from endoscopy.data.readers.table import read_csv
from endoscopy.data.readers.voc import VocAnnotation, read_voc
from endoscopy.data.tables.frame_table import MACROS, SYNTHETIC, FrameTable

DOWNLOAD = ", or get it with `gates endoscopy prepare --config real_colon --download FOLDER`"
LESIONS = "lesion_info.csv"
SIZE = "size [mm]"
OBJECT_COLUMNS = {
    "site": "site",
    "histology_class": "histology",
    "shape": "shape",
    "exposure": "exposure",
}
OBJECT_NUMBERS = ("gt_minor", "distance_mm")
LESION_COLUMNS = ("unique_object_id", "unique_video_name", SIZE)
UNKNOWN_LESION = "object is not in lesion_info.csv"
BAD_ANNOTATION = "annotation cannot be read"
NO_MASK, NO_DEPTH = "frame has no mask", "frame has no depth"


def read_real_colon(
    root: str | os.PathLike[str], *, check_images: bool = True, decode: bool = False
) -> tuple[FrameTable, ReadReport]:
    """Read the lesions of all frames, with masks and depths where their folders exist.

    Expected are ``lesion_info.csv``, usually ``video_info.csv``, and for each video the folders
    ``{video}_frames`` and ``{video}_annotations`` with one JPEG and one Pascal VOC file per frame;
    optionally ``{video}_masks`` (PNG, 0 and 255) and ``{video}_depths`` (PNG, 16 bits, 1/256 mm).
    Frames come in numerical order. The patient is the video. A ``manifest.json`` whose ``scope`` is
    ``synthetic`` makes the database SYNTH instead of REALC.

    Args:
        root: Folder that holds all this.
        check_images: Read the header and the end of every image.
        decode: Decode every image too.

    Returns:
        The table and what was excluded or repaired.

    Raises:
        GatesError: One line with the path, what was found and expected, and how to fix it.
    """
    root = Path(root)
    if not (root / LESIONS).exists():
        raise GatesError(
            f"{root} holds no {LESIONS}, expected the layout of REAL-Colon: name its folder with "
            f"--data.real_colon FOLDER{DOWNLOAD}"
        )
    lesions = _read_lesions(root / LESIONS)
    brands = _read_brands(root / "video_info.csv")
    database = _database(root)
    report = ReadReport(str(root))
    rows: list[dict[str, Any]] = []
    for video in _videos(root):
        for row in _read_video(root, video, report):
            if row["unique_id"] not in lesions.index:
                report.add("excluded", UNKNOWN_LESION, [f"{row['unique_id']} of {row['place']}"])
                continue
            rows.append(row | {"brand": brands.get(video, ""), "patient": video})
    report.require_readable()
    if not rows:
        raise GatesError(f"{root} holds no annotated lesion of lesion_info.csv; check the layout")
    seen = {row["unique_id"] for row in rows}
    report.add("noted", "object has no frame", [name for name in lesions.index if name not in seen])
    if not brands:
        report.notes.append("video_info.csv is absent, so brands are unknown")
    frames = pd.DataFrame(rows).join(lesions, on="unique_id")
    frames["frame_path"] = f"${MACROS[database]}/" + frames["frame_path"]
    for column in ("mask_path", "depth_path"):
        found = frames[column] != ""
        frames.loc[found, column] = f"${MACROS[database]}/" + frames.loc[found, column]
    roots = {MACROS[database]: str(root)}
    frames["database"] = database
    return clean(frames, report, roots, check_images=check_images, decode=decode), report


def _read_lesions(path: Path) -> pd.DataFrame:
    """Return one row for each object, by id, with the columns of the frame table."""
    table = read_csv(path)
    missing = [name for name in LESION_COLUMNS if name not in table]
    if missing:
        raise GatesError(
            f"{path} lacks {', '.join(missing)}, found {', '.join(table.columns)}; name the "
            "columns as REAL-Colon does"
        )
    table["unique_object_id"] = table["unique_object_id"].str.strip()
    twice = table.loc[table["unique_object_id"].duplicated(), "unique_object_id"]
    if not twice.empty:
        raise GatesError(f"{path} lists object {twice.iloc[0]} twice; remove one of the rows")
    lesions = pd.DataFrame({"gt": table[SIZE]})
    for name, column in OBJECT_COLUMNS.items():
        if name in table:
            lesions[column] = table[name].str.strip()
    for name in OBJECT_NUMBERS:
        if name in table:
            lesions[name] = pd.to_numeric(table[name], errors="coerce").astype(np.float64)
    return lesions.set_index(table["unique_object_id"])


def _read_brands(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    table = read_csv(path)
    if not {"unique_video_name", "endoscope_brand"} <= set(table.columns):
        raise GatesError(f"{path} lacks unique_video_name or endoscope_brand; add the columns")
    return dict(
        zip(
            table["unique_video_name"].str.strip(),
            table["endoscope_brand"].str.strip(),
            strict=True,
        )
    )


def _database(root: Path) -> str:
    manifest = root / "manifest.json"
    if not manifest.exists():
        return "REALC"
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        scope = content.get("scope")
    except (OSError, ValueError, AttributeError) as error:
        raise GatesError(f"{manifest} is no JSON object: {error}; render the data again") from error
    return "SYNTH" if scope == SYNTHETIC else "REALC"


def _videos(root: Path) -> list[str]:
    suffix = "_annotations"
    videos = sorted(path.name.removesuffix(suffix) for path in root.glob(f"*{suffix}"))
    if not videos:
        raise GatesError(
            f"{root} holds no folder *{suffix}, expected the layout of REAL-Colon; name its root"
        )
    return videos


def _read_video(root: Path, video: str, report: ReadReport) -> Iterator[dict[str, Any]]:
    """Yield a raw row for each lesion on each frame, frames in numerical order."""
    pattern = re.compile(re.escape(video) + r"_(\d+)\.xml")
    folder = root / f"{video}_annotations"
    numbers = sorted(int(m[1]) for name in _names(folder) if (m := pattern.fullmatch(name)))
    masks, depths = _names(root / f"{video}_masks"), _names(root / f"{video}_depths")
    for number in numbers:
        stem = f"{video}_{number}"
        path = folder / f"{stem}.xml"
        report.files += 1
        try:
            annotation = read_voc(path)
        except GatesError:
            report.found += 1
            report.skip_unreadable(path, BAD_ANNOTATION)
            continue
        report.found += len(annotation.objects)
        if not annotation.objects:
            continue
        image = f"{stem}.png"
        for names, reason in ((masks, NO_MASK), (depths, NO_DEPTH)):
            if names and image not in names:
                report.add("noted", reason, [stem] * len(annotation.objects))
        paths = {
            "frame_path": f"{video}_frames/{stem}.jpg",
            "mask_path": f"{video}_masks/{image}" if image in masks else "",
            "depth_path": f"{video}_depths/{image}" if image in depths else "",
            "frame_id": number,
            "place": str(path),
        }
        yield from (paths | row for row in _rows(annotation))


def _rows(annotation: VocAnnotation) -> Iterator[dict[str, Any]]:
    for item in annotation.objects:
        xmin, xmax, ymin, ymax = item.box
        yield {
            "unique_id": item.unique_id,
            "width": annotation.width,
            "height": annotation.height,
            "bbox_xmin": xmin,
            "bbox_xmax": xmax,
            "bbox_ymin": ymin,
            "bbox_ymax": ymax,
        }


def _names(folder: Path) -> frozenset[str]:
    return frozenset(path.name for path in folder.iterdir()) if folder.is_dir() else frozenset()
