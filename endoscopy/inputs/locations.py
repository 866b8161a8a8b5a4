"""Annotated boxes: a CSV file, or a folder of Pascal VOC files, one for each frame."""

import csv
import math
import re
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from core_gates.errors import GatesError
from endoscopy.data.frame_table import SMALLEST_AREA, SMALLEST_RENDERED, SYNTHETIC, repair_boxes
from endoscopy.data.images import Frame, natural_key, read_mask
from endoscopy.data.readers.real_colon import number_of, read_voc
from endoscopy.data.readers.tabular import ReadReport
from endoscopy.inputs.image_files import (
    ImageFiles,
    InputReport,
    SourceFrame,
    keys_of,
    stated_part,
    stem,
    trim_black,
)
from harness.files.texts import check_cells, unreadable

Box = tuple[float, float, float, float]
Origin = Literal["masks", "boxes", "automatic"]
"""Where locations come from: a drawn outline, a drawn box, or a segmenter."""


@dataclass(frozen=True)
class Lesion:
    """A lesion on a frame.

    Attributes:
        box: xmin, xmax, ymin, ymax in pixels of the frame, edges not centers.
        name: Identity of the lesion over the frames; empty if unknown.
        mask: Boolean (H, W), if it is known.
    """

    box: Box
    name: str = ""
    mask: np.ndarray | None = None

    def on(self, image: np.ndarray) -> Frame:
        """Return the lesion with its frame, (H, W, 3) uint8 without padding, for a network."""
        xmin, xmax, ymin, ymax = self.box
        mask = None if self.mask is None else self.mask.astype(np.uint8)
        return Frame(np.ascontiguousarray(image), (xmin, ymin, xmax, ymax), mask)


@dataclass(frozen=True)
class Annotation:
    """The annotation of a frame: its lesions, and its true width and height if stated."""

    lesions: tuple[Lesion, ...]
    size: tuple[int, int] | None = None


class Located(NamedTuple):
    """A frame without padding.

    Attributes:
        image: (H, W, 3) uint8.
        lesions: In pixels of ``image``.
        left: First column of ``image`` in the frame.
        top: First row.
    """

    image: np.ndarray
    lesions: list[Lesion]
    left: int = 0
    top: int = 0


class Locator(ABC):
    """Finds the lesions of frames, one frame after the other.

    Args:
        path: Where the locations come from, for messages.
        origin: Where they come from; outputs carry it.

    Attributes:
        report: What was found, repaired and left out; a row is a lesion.
    """

    def __init__(self, path: str, origin: Origin) -> None:
        self.path, self.origin = path, origin
        self.report = ReadReport(path)

    @abstractmethod
    def locate(self, frame: SourceFrame, *, trim: bool) -> Located:
        """Return the frame without padding, and its lesions in pixels of that.

        Args:
            frame: A frame.
            trim: Cut black borders where the size of the frame is not stated.
        """

    def begin(self, source: InputReport, scope: str | None = None) -> None:  # noqa: B027
        """Receive the source, and its scope if known, at its first frame."""

    def finish(self, source: InputReport) -> None:  # noqa: B027
        """Check the annotations as a whole, after the last frame."""


class AnnotatedLocations(Locator):
    """Locations from annotations that name their frames.

    A frame finds its annotation by its key, with or without ending, by the last part of its key,
    or, if all names are numbers, by its position (from 0). If no name belongs to a video or DICOM
    source, the annotations are taken in their natural order, one for each frame. No annotation has
    two frames.

    Args:
        path: Where the annotations are, for messages.
        origin: ``boxes`` or ``masks``.
        names: Names of the annotated frames, without endings.
    """

    def __init__(self, path: str, origin: Origin, names: list[str]) -> None:
        super().__init__(path, origin)
        self.names = sorted(names, key=natural_key)
        last = {name: PurePosixPath(name).name for name in self.names}
        count = Counter(last.values())
        self._by_name = {part: name for name, part in last.items() if count[part] == 1}
        self._by_name |= {name: name for name in self.names}
        self._numbered = all(name.isdecimal() for name in self.names)
        self._ordered, self._smallest = False, SMALLEST_AREA
        self._found: dict[str, int] = {}

    @abstractmethod
    def annotation(self, name: str) -> Annotation:
        """Return the annotation of one of the names."""

    def unreadable(self, path: Path, error: GatesError) -> Annotation:
        """Count a file that cannot be read as one row, and return an empty annotation."""
        self.report.found += 1
        self.report.skip_unreadable(path, str(error).removeprefix(str(path)).lstrip(" :"))
        return Annotation(())

    def begin(self, source: InputReport, scope: str | None = None) -> None:
        """Decide whether annotations name their frames or come in order, and which are too small.

        Raises:
            GatesError: They come in order, but their number is not that of the frames.
        """
        self._smallest = SMALLEST_RENDERED if scope == SYNTHETIC else SMALLEST_AREA
        own_name = re.compile(re.escape(source.source) + r"([_#]\d+)?")
        named = any(own_name.fullmatch(PurePosixPath(name).name) for name in self.names)
        self._ordered = source.kind != "images" and not named and not self._numbered
        if self._ordered and source.expected is not None:
            self._check_number(source.source, source.expected)

    def finish(self, source: InputReport) -> None:
        """Check that annotations and frames belong together.

        Raises:
            GatesError: No annotation found a frame, or their numbers differ.
        """
        if self._ordered:
            self._check_number(source.source, source.read + len(source.unreadable))
            self.report.notes.append(f"{self.path}: taken in order, one for each frame")
        if self.report.files and len(self.report.unreadable) == self.report.files:
            _, reason = next(iter(self.report.findings))
            raise GatesError(f"{self.path}: none of its files can be read: {reason}")
        if not self._found:
            example = f" (for one, it names {self.names[0]!r})" if self.names else ""
            raise GatesError(
                f"{self.path}: none of its {len(self.names)} frames is in {source.source}"
                f"{example}; name frames as the source does"
            )
        unused = [name for name in self.names if name not in self._found]
        self.report.add("noted", "annotation without a frame", unused)

    def locate(self, frame: SourceFrame, *, trim: bool) -> Located:
        """Return the frame without padding, and its annotated lesions.

        Raises:
            GatesError: Its annotation was that of another frame already.
        """
        name = self._name_of(frame)
        if name is None:
            self.report.add("noted", "frame without a location", [frame.key])
            return trimmed(frame.image, trim=trim)
        if self._found.setdefault(name, frame.index) != frame.index:
            raise GatesError(
                f"{self.path}: {name!r} names two frames, the second is {frame.key}: name frames"
                " with their folders, and both with their endings where only these differ"
            )
        annotation = self.annotation(name)
        if annotation.size is not None:
            image, (left, top) = stated_part(frame.image, annotation.size)
            part, lesions = Located(image, [], left, top), list(annotation.lesions)
        else:
            part = trimmed(frame.image, trim=trim)
            lesions = [_moved(lesion, -part.left, -part.top) for lesion in annotation.lesions]
        repaired = self._repaired(lesions, annotation.size, part.image.shape, frame.key)
        return part._replace(lesions=repaired)

    def _name_of(self, frame: SourceFrame) -> str | None:
        if self._ordered:
            return self.names[frame.index] if frame.index < len(self.names) else None
        key, last = frame.key, PurePosixPath(frame.key).name
        names = (key, last, stem(key), stem(last))  # where keys have endings
        location = next((self._by_name[name] for name in names if name in self._by_name), None)
        if location is None and self._numbered:
            return {int(name): name for name in self.names}.get(frame.index)
        return location

    def _repaired(
        self,
        lesions: list[Lesion],
        size: tuple[int, int] | None,
        shape: tuple[int, ...],
        key: str,
    ) -> list[Lesion]:
        """Rescale, order, clip and drop boxes, and count each change."""
        self.report.found += len(lesions)
        actual = np.array([[shape[1], shape[0]]], dtype=np.float64)
        annotated = np.full((1, 2), np.nan) if size is None else np.array([size], dtype=np.float64)
        kept = []
        for lesion in lesions:
            repaired = repair_boxes(np.array([lesion.box]), annotated, actual, self._smallest)
            faults = (
                ("repaired", "location rescaled to the size of the frame", repaired.rescaled),
                ("repaired", "box with swapped corners", repaired.swapped),
                ("repaired", "box clipped to the frame", repaired.clipped),
                ("excluded", "box is not finite", repaired.invalid),
                ("excluded", f"box below {self._smallest:g} square pixels", repaired.small),
            )
            for action, reason, flags in faults:
                if flags[0]:
                    self.report.add(action, reason, [key])  # type: ignore[arg-type]
            if not (repaired.invalid[0] or repaired.small[0]):
                xmin, xmax, ymin, ymax = map(float, repaired.boxes[0])
                box, mask = (xmin, xmax, ymin, ymax), _resized(lesion.mask, shape)
                kept.append(Lesion(box, lesion.name, mask))
        return kept

    def _check_number(self, source: str, frames: int) -> None:
        if frames != len(self.names):
            raise GatesError(
                f"{self.path}: names {len(self.names)} frames, none of them of {source}, which has "
                f"{frames}; number the frames from 0, or annotate each of them in order"
            )


def trimmed(image: np.ndarray, *, trim: bool) -> Located:
    """Return a frame without its black borders if ``trim``, and without lesions."""
    if not trim:
        return Located(image, [])
    part, (left, top) = trim_black(image)
    return Located(part, [], left, top)


def _moved(lesion: Lesion, x: int, y: int) -> Lesion:
    xmin, xmax, ymin, ymax = lesion.box
    return replace(lesion, box=(xmin + x, xmax + x, ymin + y, ymax + y))


def _resized(mask: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray | None:
    if mask is None or mask.shape == shape[:2]:
        return mask
    size = (shape[1], shape[0])
    return np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))


ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
MIN_AREA = 16  # pixels; smaller parts are noise, unless nothing else was drawn


class MaskLocations(AnnotatedLocations):
    """Lesions from masks named like their frames; every connected part is a lesion.

    Parts below 16 pixels are left out if there is a larger one: a distant polyp on a small frame
    may have no more pixels.

    A pixel belongs to a lesion if it is above the middle of the range, or, in a file without
    values above 1, if it is 1.

    Args:
        path: Folder of PNG files, searched to any depth; JPEG works too.

    Raises:
        GatesError: It holds no mask. Files that cannot be read are counted, and their frames have
            no location.
    """

    def __init__(self, path: str | Path) -> None:
        files = ImageFiles(path, ENDINGS)
        if not files.names or not Path(path).is_dir():
            raise GatesError(
                f"{path}: holds no mask; name a folder of .png files named like frames"
            )
        self._files = {key: Path(path) / name for name, key in keys_of(files.names).items()}
        super().__init__(str(path), "masks", list(self._files))

    def annotation(self, name: str) -> Annotation:
        """Read the mask of a frame."""
        self.report.files += 1
        try:
            mask = read_mask(self._files[name]) > 0
        except GatesError as error:
            return self.unreadable(self._files[name], error)
        return Annotation(
            tuple(lesions_of(mask, keep_largest=True)), (mask.shape[1], mask.shape[0])
        )


def lesions_of(mask: np.ndarray, *, keep_largest: bool = False) -> list[Lesion]:
    """Return the connected parts (8 neighbors) of at least 16 pixels, the largest first.

    Args:
        mask: Boolean (H, W).
        keep_largest: Keep the largest parts however small they are.
    """
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    areas = np.bincount(labels.ravel())[1:]
    least = min(MIN_AREA, areas.max(initial=0)) if keep_largest else MIN_AREA
    order = [i for i in np.argsort(-areas, kind="stable") if areas[i] >= least]
    slices = ndimage.find_objects(labels)
    return [Lesion(_box(slices[i]), mask=labels == i + 1) for i in order]


def _box(part: tuple[slice, slice]) -> Box:
    rows, columns = part
    return float(columns.start), float(columns.stop), float(rows.start), float(rows.stop)


class DrawnLocations(AnnotatedLocations):
    """One lesion on some frames.

    Args:
        boxes: Key of the frame to xmin, xmax, ymin, ymax in its pixels.
    """

    def __init__(self, boxes: Mapping[str, Box]) -> None:
        super().__init__("drawn boxes", "boxes", list(boxes))
        self.boxes = dict(boxes)

    def annotation(self, name: str) -> Annotation:
        """Return the box of a frame."""
        return Annotation((Lesion(self.boxes[name]),))


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
        keys = keys_of(_frame_name(row[columns["frame"]] or "") for _, row in rows)
        for line, row in rows:
            name = keys[_frame_name(row[columns["frame"]] or "")]
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
        for name, boxes in lesions.items():
            self._annotations[name] = Annotation(tuple(boxes), sizes.get(name))

    def annotation(self, name: str) -> Annotation:
        """Return the lesions of a frame."""
        return self._annotations[name]


def _rows(path: Path) -> tuple[list[tuple[int, dict[str, str]]], dict[str, str]]:
    """Return the numbered rows, and for each column our name to that of the file."""
    try:
        check_cells(path)
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            reader.fieldnames = header = [name.strip() for name in reader.fieldnames or []]
            rows = [(reader.line_num, row) for row in reader]
    except OSError as error:
        raise unreadable(path, error) from error
    columns_of = {"frame": NAMES, "lesion": LESIONS, "width": ("width",), "height": ("height",)}
    columns_of |= {corner: (corner, f"bbox_{corner}") for corner in CORNERS}
    matches = {key: [name for name in names if name in header] for key, names in columns_of.items()}
    columns = {key: names[0] for key, names in matches.items() if names}
    for names in (matches[corner] for corner in CORNERS if len(matches[corner]) > 1):
        raise GatesError(f"{path}: has the columns {' and '.join(names)}; leave one of them")
    if missing := [name for name in ("frame", *CORNERS) if name not in columns]:
        raise GatesError(
            f"{path}: lacks the columns {', '.join(missing)}; found {', '.join(header) or 'none'}"
        )
    return rows, columns


def _frame_name(text: str) -> str:
    """Return the name without leading ``$MACRO/`` or ``./``."""
    name = text.strip().replace("\\", "/").removeprefix("./")
    return name.partition("/")[2] if name.startswith("$") else name


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
