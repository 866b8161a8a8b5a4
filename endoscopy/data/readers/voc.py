"""Pascal VOC annotations as in REAL-Colon and other data sets, read defensively."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree
from xml.parsers import expat
from xml.sax.saxutils import escape

from core_gates.errors import GatesError
from harness.files.atomic import replacing

LARGEST_FILE = 2**20
DEEPEST = 32


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
        if path.stat().st_size > LARGEST_FILE:
            raise GatesError(f"{path} has {path.stat().st_size} bytes, expected an annotation")
        content = path.read_bytes()
    except OSError as error:
        raise GatesError(f"{path} cannot be read: {error.strerror}; check the path") from error
    root = _parse(content, path)
    if root.tag != "annotation":
        raise GatesError(f"{path} holds <{root.tag}>, expected a Pascal VOC <annotation>")
    return VocAnnotation(
        width=_number(root, "size/width"),
        height=_number(root, "size/height"),
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
        _number(element, f"bndbox/{tag}") for tag in ("xmin", "xmax", "ymin", "ymax")
    )
    return VocObject(
        name=_text(element, "name"),
        unique_id=_text(element, "unique_id"),
        box_id=_text(element, "box_id"),
        box=(xmin, xmax, ymin, ymax),
    )


def _text(element: ElementTree.Element, tag: str) -> str:
    return (element.findtext(tag) or "").strip()


def _number(element: ElementTree.Element, tag: str) -> float:
    try:
        return float(_text(element, tag))
    except ValueError:
        return math.nan
