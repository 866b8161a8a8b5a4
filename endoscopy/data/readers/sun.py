"""The SUN Colonoscopy Video Database (Misawa et al., GIE 2021), original and renamed frames."""

import os
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd

from core_gates.errors import GatesError
from endoscopy.data.frame_table import FrameTable
from endoscopy.data.images import natural_key
from endoscopy.data.readers.tabular import ReadReport, clean, read_csv, require_columns
from harness.files.texts import read_utf8

IMAGES = {".jpg", ".jpeg", ".png"}


def read_sun(
    root: str | os.PathLike[str],
    sizes: str | os.PathLike[str] | None = None,
    *,
    check_images: bool = True,
    decode: bool = False,
) -> tuple[FrameTable, ReadReport]:
    """Read the polyp frames of all cases.

    Expected are ``annotation_txt/case{N}.txt``, with a line ``FILENAME xmin,ymin,xmax,ymax,class``
    for each frame, and the frames as ``case{N}/FILENAME`` or, numbered in the order of the file
    names, as ``renamed/case{N}/image_{k:03d}.jpg``. A case is one polyp; which two cases share a
    patient is not published, so each counts as a patient.

    Args:
        root: Folder that holds all this.
        sizes: CSV with ``case`` and ``size_raw``, by default the published table; ``15mm-`` means
            15 mm or more and is kept as a lower bound.
        check_images: Read the header and the end of every image.
        decode: Decode every image too.

    Returns:
        The table and what was excluded or repaired.

    Raises:
        GatesError: One line with the path, what was found and expected, and how to fix it.
    """
    root = Path(root)
    objects = _read_objects(sizes)
    report = ReadReport(str(root))
    rows: list[dict[str, Any]] = []
    for path in _annotations(root):
        case = path.stem.removeprefix("case")
        for row in _read_case(root, path, case, report):
            if case in objects.index:
                rows.append(row)
            else:
                place = f"case {case} frame {row['frame_id']}"
                report.add("excluded", "case is not in the table of sizes", [place])
    if not rows:
        raise GatesError(f"{root} holds no frame of a case of known size; check the layout")
    report.notes.append("two of the 100 cases are of one patient; which ones is not published")
    frames = pd.DataFrame(rows).join(objects, on="unique_id")
    frames["database"], frames["patient"] = "SUN", "SUN " + frames["unique_id"]
    return clean(
        frames, report, {"SUN_DATA_PATH": str(root)}, check_images=check_images, decode=decode
    ), report


def _read_objects(path: str | os.PathLike[str] | None) -> pd.DataFrame:
    asset = files("endoscopy.data") / "assets" / "sun_objects.csv"
    table = read_csv(Path(path if path is not None else str(asset)))
    require_columns(table, ("case", "size_raw"), path)
    if table["case"].duplicated().any():
        raise GatesError(
            f"{path} lists case {table['case'][table['case'].duplicated()].iloc[0]} twice"
        )
    objects = pd.DataFrame({"gt": table["size_raw"]})
    for name, column in (("shape", "shape"), ("location", "site"), ("pathology", "histology")):
        if name in table:
            objects[column] = table[name]
    return objects.set_index(table["case"].str.strip())


def _annotations(root: Path) -> list[Path]:
    annotations = [p for p in (root / "annotation_txt").glob("case*.txt") if p.stem[4:].isdigit()]
    if not annotations:
        raise GatesError(
            f"{root} holds no annotation_txt/case*.txt, expected the layout of SUN; name its root"
        )
    return sorted(annotations, key=lambda path: int(path.stem[4:]))


def _read_case(root: Path, path: Path, case: str, report: ReadReport) -> Iterator[dict[str, Any]]:
    """Yield a raw row for each box, frames in the numerical order of their names."""
    lines = read_utf8(path).splitlines()
    entries = sorted(filter(None, map(str.split, lines)), key=lambda entry: natural_key(entry[0]))
    frames = {name: number for number, name in enumerate(dict.fromkeys(e[0] for e in entries))}
    folder, mapping = _frames(root, case, list(frames))
    for name, *boxes in entries:
        for text in boxes or [""]:
            report.found += 1
            numbers = _numbers(text)
            fault = ""
            if len(numbers) not in (4, 5):
                fault = "line of the annotation cannot be read"
            elif len(numbers) == 5 and numbers[4] != 0:
                fault = "box is of another class than 0, polyp"
            if fault:
                report.add("excluded", fault, [f"{path}: {name} {text}".rstrip()])
                continue
            yield {
                "unique_id": case,
                "frame_id": frames[name],
                "frame_path": f"$SUN_DATA_PATH/{folder}/{mapping.get(name, name)}",
                "width": float("nan"),
                "height": float("nan"),
                "bbox_xmin": numbers[0],
                "bbox_ymin": numbers[1],
                "bbox_xmax": numbers[2],
                "bbox_ymax": numbers[3],
            }


def _frames(root: Path, case: str, names: list[str]) -> tuple[str, dict[str, str]]:
    """Return the folder of a case and the file name of every annotated frame in it."""
    original, renamed = f"case{case}", f"renamed/case{case}"
    if (root / original).is_dir():
        return original, {}
    if not (root / renamed).is_dir():
        raise GatesError(f"{root} holds neither {original} nor {renamed}; unpack the frames there")
    files = [p.name for p in (root / renamed).iterdir() if p.suffix.lower() in IMAGES]
    if set(names) <= set(files):
        return renamed, {}
    if len(files) != len(names):
        raise GatesError(
            f"{root / renamed} holds {len(files)} frames and its annotation {len(names)}, so that "
            "renamed frames cannot be assigned; copy the case again"
        )
    return renamed, dict(zip(names, sorted(files, key=natural_key), strict=True))


def _numbers(text: str) -> list[float]:
    try:
        return [float(value) for value in text.split(",")]
    except ValueError:
        return []
