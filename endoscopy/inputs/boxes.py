"""Annotated boxes: a CSV file, or a folder of Pascal VOC files, one for each frame."""

import csv
import math
from collections import defaultdict
from pathlib import Path

from core_gates.errors import GatesError
from endoscopy.data.readers.real_colon import number_of, read_voc
from endoscopy.inputs.image_files import stem
from endoscopy.inputs.locations import AnnotatedLocations, Annotation, Lesion, MaskLocations

NAMES = ("frame", "frame_id", "file", "filename", "frame_path")
CORNERS = ("xmin", "xmax", "ymin", "ymax")
LESIONS = ("lesion", "unique_id", "object")
SIZES = ("width", "height")


class CsvLocations(AnnotatedLocations):
    """Boxes from a CSV file with a header, a row for each lesion on each frame.

    Columns: ``frame`` (or ``frame_id``, ``file``, ``filename``, ``frame_path``): name, with or
    without ending, or number from 0; ``xmin, xmax, ymin, ymax`` (also as ``bbox_xmin`` …) in
    pixels; optional ``lesion`` (or ``unique_id``, ``object``), which identifies lesions over the
    frames, and ``width, height`` of the frame that the box refers to.

    Args:
        path: The file.

    Raises:
        GatesError: The file cannot be read, or lacks a column or all rows.
    """

    def __init__(self, path: str | Path) -> None:
        self._annotations: dict[str, Annotation] = {}
        rows, columns = _rows(Path(path))
        lesions: dict[str, list[Lesion]] = defaultdict(list)
        sizes: dict[str, tuple[int, int]] = {}
        faults = []
        for line, row in rows:
            name = _frame_name(row[columns["frame"]] or "")
            box = tuple(number_of(row[columns[corner]]) for corner in CORNERS)
            if not name or not all(map(math.isfinite, box)):
                faults.append(f"line {line}")
                continue
            label = (row.get(columns["lesion"]) or "").strip() if "lesion" in columns else ""
            lesions[name].append(Lesion((box[0], box[1], box[2], box[3]), label))
            width, height = (number_of(row.get(columns.get(size, ""))) for size in SIZES)
            if width > 0 and height > 0:
                sizes[name] = (round(width), round(height))
        super().__init__(str(path), "boxes", list(lesions))
        self.report.found += len(faults)
        fault = "row without a frame or with a corner that is no number"
        self.report.add("excluded", fault, faults)
        if not lesions:
            raise GatesError(f"{path}: none of its {len(rows)} rows is a box; correct the numbers")
        for name, found in lesions.items():
            self._annotations[name] = Annotation(tuple(found), sizes.get(name))

    def annotation(self, name: str) -> Annotation:
        """Return the lesions of a frame."""
        return self._annotations[name]


def _rows(path: Path) -> tuple[list[tuple[int, dict[str, str]]], dict[str, str]]:
    """Return the numbered rows, and for each column our name to that of the file."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            reader.fieldnames = header = [name.strip() for name in reader.fieldnames or []]
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise GatesError(f"{path}: cannot be read as CSV: {error}; save it as UTF-8") from error
    known = {"frame": NAMES, "lesion": LESIONS, "width": ("width",), "height": ("height",)}
    known |= {corner: (corner, f"bbox_{corner}") for corner in CORNERS}
    matches = {key: [name for name in names if name in header] for key, names in known.items()}
    columns = {key: names[0] for key, names in matches.items() if names}
    if missing := [name for name in ("frame", *CORNERS) if name not in columns]:
        raise GatesError(
            f"{path}: lacks the columns {', '.join(missing)}; found {', '.join(header) or 'none'}"
        )
    return rows, columns


def _frame_name(text: str) -> str:
    """Return the name without a known ending and without leading ``$MACRO/`` or ``./``."""
    name = text.strip().replace("\\", "/").removeprefix("./")
    if name.startswith("$"):
        name = name.partition("/")[2]
    ending = name.rpartition(".")[2].lower()
    return stem(name) if ending in ("jpg", "jpeg", "png", "bmp", "tif", "tiff", "dcm") else name


class VocLocations(AnnotatedLocations):
    """Boxes from Pascal VOC files named like their frames.

    Args:
        path: Folder, searched to any depth.

    Raises:
        GatesError: The folder holds no XML file. Files that are not annotations are counted,
            and their frames have no location.
    """

    def __init__(self, path: str | Path) -> None:
        folder = Path(path)
        files = folder.rglob("*.xml")
        self._files = {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}
        if not self._files:
            raise GatesError(f"{path}: holds no .xml file; expected Pascal VOC annotations")
        super().__init__(str(path), "boxes", list(self._files))

    def annotation(self, name: str) -> Annotation:
        """Read the file of a frame."""
        self.report.files += 1
        try:
            content = read_voc(self._files[name])
        except GatesError as error:
            return self.unreadable(self._files[name], error)
        sides = (content.width, content.height)
        stated = all(math.isfinite(side) and side > 0 for side in sides)
        size = (round(content.width), round(content.height)) if stated else None
        return Annotation(tuple(Lesion(item.box, item.unique_id) for item in content.objects), size)


def annotated_locations(
    boxes: str | Path | None = None, masks: str | Path | None = None
) -> AnnotatedLocations | None:
    """Return the locations that a user gives, None if there are none.

    Args:
        boxes: A CSV file, or a folder of Pascal VOC files.
        masks: A folder of mask images, or of Pascal VOC files.

    Raises:
        GatesError: Both are given, or they cannot be read.
    """
    if boxes is not None and masks is not None:
        raise GatesError(f"found boxes {boxes} and masks {masks}, expected one of them; drop one")
    given = Path(boxes or masks or "")
    if boxes is None and masks is None:
        return None
    if not given.exists():
        raise GatesError(f"{given}: does not exist; check the path")
    if boxes is not None and given.is_file():
        return CsvLocations(given)
    if boxes is not None or (given.is_dir() and next(given.rglob("*.xml"), None) is not None):
        return VocLocations(given)
    return MaskLocations(given)
