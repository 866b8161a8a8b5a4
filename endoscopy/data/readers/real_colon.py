"""The layout of REAL-Colon (Biffi et al., Scientific Data 2024), which rendered data shares.

Its Pascal VOC annotations are read defensively.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree
from xml.parsers import expat
from xml.sax.saxutils import escape

import numpy as np
import pandas as pd

from core_gates.errors import GatesError
from endoscopy.data.frame_table import BOX, MACROS, RENDERED, SYNTHETIC, FrameTable
from endoscopy.data.readers.tabular import ReadReport, clean, read_csv
from harness.files.atomic import replacing

DEEPEST = 32  # nested elements of an annotation


class VocObject(NamedTuple):
    """A lesion on a frame.

    Attributes:
        name: Class, ``lesion`` in REAL-Colon.
        unique_id: The lesion over all frames; empty if the file gives none.
        box_id: The box over all files; empty if the file gives none.
        box: xmin, xmax, ymin, ymax in pixels; NaN where the file holds no number.
    """

    name: str
    unique_id: str
    box_id: str
    box: tuple[float, float, float, float]


class VocAnnotation(NamedTuple):
    """One file.

    Attributes:
        width: Pixels; NaN if not stated.
        height: Pixels; NaN if not stated.
        objects: In the order of the file; none on a frame without lesions.
        filename: Name of the image; may be empty.
        database: ``source/database``; may be empty.
    """

    width: float
    height: float
    objects: tuple[VocObject, ...]
    filename: str = ""
    database: str = ""


def read_voc(path: str | os.PathLike[str]) -> VocAnnotation:
    """Read an annotation by the names of its tags, whatever their order.

    Raises:
        GatesError: The file is absent, above 1 MB, not well-formed, has a document type (which
            could define entities that expand without limit), or is not an annotation.
    """
    path = Path(path)
    try:
        if path.stat().st_size > 2**20:
            raise GatesError(f"{path} has {path.stat().st_size} bytes, expected an annotation")
        content = path.read_bytes()
    except OSError as error:
        raise GatesError(f"{path} cannot be read: {error.strerror}; check the path") from error
    root = _parse(content, path)
    if root.tag != "annotation":
        raise GatesError(f"{path} holds <{root.tag}>, expected a Pascal VOC <annotation>")
    return VocAnnotation(
        width=number_of(root.findtext("size/width")),
        height=number_of(root.findtext("size/height")),
        objects=tuple(_object(element) for element in root.iterfind("object")),
        filename=_text(root, "filename"),
        database=_text(root, "source/database"),
    )


def write_voc(path: str | os.PathLike[str], annotation: VocAnnotation) -> None:
    """Write an annotation in the layout of REAL-Colon; it is complete or absent."""
    objects = [
        "  <object>\n"
        f"    <name>{escape(item.name)}</name>\n"
        f"    <unique_id>{escape(item.unique_id)}</unique_id>\n"
        f"    <box_id>{escape(item.box_id)}</box_id>\n"
        "    <bndbox>\n"
        + "".join(
            f"      <{tag}>{value:.10g}</{tag}>\n"
            for tag, value in zip(("xmin", "xmax", "ymin", "ymax"), item.box, strict=True)
        )
        + "    </bndbox>\n  </object>\n"
        for item in annotation.objects
    ]
    text = (
        "<annotation>\n"
        f"  <filename>{escape(annotation.filename)}</filename>\n"
        f"  <source><database>{escape(annotation.database)}</database></source>\n"
        f"  <size><width>{annotation.width:.10g}</width><height>{annotation.height:.10g}</height>"
        f"<depth>3</depth></size>\n{''.join(objects)}</annotation>\n"
    )
    with replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _parse(content: bytes, path: Path) -> ElementTree.Element:
    """Build the tree with a parser that refuses any document type."""
    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate()
    depth = 0

    def refuse(*_: object) -> None:
        raise GatesError(f"{path} declares a document type, which no annotation needs; remove it")

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > DEEPEST:
            raise GatesError(f"{path} nests {depth} elements, expected an annotation")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(content, True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise GatesError(f"{path} is no XML: {error}; copy it again") from error
    return builder.close()


def _object(element: ElementTree.Element) -> VocObject:
    xmin, xmax, ymin, ymax = (
        number_of(element.findtext(f"bndbox/{tag}")) for tag in ("xmin", "xmax", "ymin", "ymax")
    )
    return VocObject(
        name=_text(element, "name"),
        unique_id=_text(element, "unique_id"),
        box_id=_text(element, "box_id"),
        box=(xmin, xmax, ymin, ymax),
    )


def _text(element: ElementTree.Element, tag: str) -> str:
    return (element.findtext(tag) or "").strip()


def number_of(text: str | None) -> float:
    """Return the number that a text holds, NaN if it holds none."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


DOWNLOAD = ", or get it with `gates endoscopy prepare --config real_colon --download FOLDER`"
LESIONS = "lesion_info.csv"
SIZE = "size [mm]"
OBJECT_COLUMNS = {
    "site": "site",
    "histology_class": "histology",
    "shape": "shape",
    "exposure": "exposure",
}
"""Column of lesion_info.csv to that of the frame table."""


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
                place = f"{row['unique_id']} of {row['place']}"
                report.add("excluded", "object is not in lesion_info.csv", [place])
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
        has_file = frames[column] != ""
        frames.loc[has_file, column] = f"${MACROS[database]}/" + frames.loc[has_file, column]
    roots = {MACROS[database]: str(root)}
    frames["database"] = database
    return clean(frames, report, roots, check_images=check_images, decode=decode), report


def _read_lesions(path: Path) -> pd.DataFrame:
    """Return one row for each object, by id, with the columns of the frame table."""
    table = read_csv(path)
    needed = ("unique_object_id", "unique_video_name", SIZE)
    if missing := [name for name in needed if name not in table]:
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
    for name in ("gt_minor", "distance_mm"):
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
        scope = json.loads(manifest.read_text(encoding="utf-8")).get("scope")
    except (OSError, ValueError, AttributeError) as error:
        raise GatesError(f"{manifest} is no JSON object: {error}; render the data again") from error
    return RENDERED if scope == SYNTHETIC else "REALC"


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
            report.skip_unreadable(path, "annotation cannot be read")
            continue
        report.found += len(annotation.objects)
        image = f"{stem}.png"
        for names, kind in ((masks, "mask"), (depths, "depth")):
            if names and image not in names:
                report.add("noted", f"frame has no {kind}", [stem] * len(annotation.objects))
        common = {
            "frame_path": f"{video}_frames/{stem}.jpg",
            "mask_path": f"{video}_masks/{image}" if image in masks else "",
            "depth_path": f"{video}_depths/{image}" if image in depths else "",
            "frame_id": number,
            "place": str(path),
            "width": annotation.width,
            "height": annotation.height,
        }
        for item in annotation.objects:
            yield common | {"unique_id": item.unique_id} | dict(zip(BOX, item.box, strict=True))


def _names(folder: Path) -> frozenset[str]:
    return frozenset(path.name for path in folder.iterdir()) if folder.is_dir() else frozenset()
