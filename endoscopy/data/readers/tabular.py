"""Frame tables from files: raw rows are cleaned, and what is excluded or repaired is reported."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import pyarrow as pa

from core_gates.errors import GatesError
from endoscopy.data.frame_table import (
    BOX,
    OPTIONAL,
    PATHS,
    RENDERED,
    REQUIRED,
    SMALLEST_AREA,
    SMALLEST_RENDERED,
    TEXT,
    FrameTable,
    expand,
    look_like_centimeters,
    parse_size,
    repair_boxes,
)
from endoscopy.data.images import probe, read_rgb
from endoscopy.metrics.size_errors import flags_of
from harness.files.texts import check_cells

Action = Literal["excluded", "repaired", "noted"]
SHOWN = 3  # places of a reason that a line names


@dataclass
class ReadReport:
    """Counts and places of everything unusual; nothing is dropped silently.

    Attributes:
        source: What was read.
        found: Rows that the source holds, before any was excluded.
        findings: (action, reason) to the places, one entry for each row: paths, or keys such
            as ``003-001_2 frame 17``.
        unreadable: Files that could not be read; more than 1 % of all is an error.
        files: Files that were looked at.
        base: Folder to which relative paths of the source refer; empty if it has none.
        notes: Lines about the source as a whole.
    """

    source: str
    found: int = 0
    findings: dict[tuple[Action, str], list[str]] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    files: int = 0
    base: str = ""
    notes: list[str] = field(default_factory=list)

    def add(self, action: Action, reason: str, places: Iterable[object]) -> None:
        """Record rows; an excluded row is one that the table does not hold.

        Raises:
            ValueError: The action is unknown.
        """
        if action not in get_args(Action):
            raise ValueError(f"action must be one of {get_args(Action)}, got {action!r}")
        if places := [str(place) for place in places]:
            self.findings.setdefault((action, reason), []).extend(places)

    def skip_unreadable(self, path: object, reason: str, rows: int = 1) -> None:
        """Record a damaged or missing file and the rows that go with it."""
        self.unreadable.append(str(path))
        self.add("excluded", reason, [path] * rows)

    def require_readable(self) -> None:
        """Refuse a source of which more than 1 % cannot be read.

        Raises:
            GatesError: Too many files are unreadable.
        """
        bad = len(self.unreadable)
        if bad > 0.01 * max(self.files, 1):
            first = self.unreadable[0]
            why = [reason for (_, reason), places in self.findings.items() if first in places]
            why += [f"relative paths begin in {self.base}"] if self.base else []
            raise GatesError(
                f"{self.source}: {bad} of {self.files} files cannot be read, more than 1 %, the "
                f"first is {first} ({'; '.join(why)}); copy or download them again"
            )

    def count(self, reason: str) -> int:
        """Return how often a reason occurred, under any action."""
        return sum(
            len(places)
            for (_, finding_reason), places in self.findings.items()
            if finding_reason == reason
        )

    def total(self, action: Action) -> int:
        """Return how many rows were excluded, repaired or noted."""
        return sum(
            len(places)
            for (finding_action, _), places in self.findings.items()
            if finding_action == action
        )

    def reasons(self, action: Action) -> list[str]:
        """Return every reason of an action and how often it occurred, such as ``2: no size``."""
        return [
            f"{len(places)}: {reason}"
            for (finding_action, reason), places in self.findings.items()
            if finding_action == action
        ]

    def merge(self, other: ReadReport) -> None:
        """Add another report, for example of a second data set."""
        self.source = f"{self.source}, {other.source}" if self.source else other.source
        self.found += other.found
        self.files += other.files
        self.unreadable += other.unreadable
        self.notes += other.notes
        for (action, reason), places in other.findings.items():
            self.add(action, reason, places)

    def lines(self) -> list[str]:
        """Return one line for each note and each reason, with the first places."""
        summary = f"{self.source}: {self.found} rows, {self.found - self.total('excluded')} kept"
        rows = [
            f"{action} {len(places)}: {reason} ({', '.join(dict.fromkeys(places[:SHOWN]))}"
            f"{', ...' if len(places) > SHOWN else ''})"
            for (action, reason), places in self.findings.items()
        ]
        return [summary, *rows, *self.notes]

    def to_dict(self) -> dict[str, Any]:
        """Return everything, all places included, for a JSON file."""
        return {
            "source": self.source,
            "found": self.found,
            "kept": self.found - self.total("excluded"),
            "files": self.files,
            "unreadable": self.unreadable,
            "findings": [
                {"action": action, "reason": reason, "count": len(places), "places": places}
                for (action, reason), places in self.findings.items()
            ],
            "notes": self.notes,
        }


UNKNOWN = ("nan", "na", "n/a", "none", "<na>", "-")
"""What stands for a missing object or patient, in any case."""
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
    require_columns(frames, REQUIRED, path)
    for name in NUMBERS:
        if name in frames:
            frames[name] = pd.to_numeric(frames[name], errors="coerce").astype(np.float64)
    if check_images is None:
        check_images = path.suffix != ".parquet"
    report = ReadReport(str(path), found=len(frames))
    _resolve(frames, path if path.is_dir() else path.parent, report)
    return clean(frames, report, roots or {}, check_images=check_images, decode=decode), report


def read_csv(path: Path) -> pd.DataFrame:
    """Read a CSV file as text, without guessing which values are missing.

    Raises:
        GatesError: The file is missing, empty or not CSV, two columns have one name, or a row has
            more cells than the header.
    """
    try:
        check_cells(path)
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


def require_columns(
    frames: pd.DataFrame, names: Iterable[str], path: str | os.PathLike[str] | None
) -> None:
    """Refuse a table that lacks columns.

    Raises:
        GatesError: It does; the message names them and the file.
    """
    if missing := [name for name in names if name not in frames]:
        raise GatesError(f"{path} lacks the columns {', '.join(missing)}; add them")


def clean(
    frames: pd.DataFrame,
    report: ReadReport,
    roots: Mapping[str, str],
    *,
    check_images: bool = True,
    decode: bool = False,
) -> FrameTable:
    """Exclude what cannot be used, repair what can be, and record both in the report.

    Args:
        frames: Raw rows with the columns of the frame table. ``gt`` is a number or text such as
            ``15mm-``; width and height are those of the annotation and may be NaN. An object of
            REAL-Colon without a patient gets the video that its id begins with.
        report: Its ``found`` already counts these rows.
        roots: Folders of variables in paths.
        check_images: Read the header and the end of every image.
        decode: Decode every image too, which finds damage in the middle.

    Returns:
        The table; ``report.found`` less the excluded rows are its length.

    Raises:
        GatesError: An (object, frame) occurs twice, an object has two sizes or two data sets,
            more than 1 % of the images cannot be read, or no row is left.
    """
    frames = frames.reset_index(drop=True)
    ids = frames["unique_id"].astype("string").fillna("").str.strip()
    ids = ids.str.replace(r"^(\d+)\.0+$", r"\1", regex=True)  # read as floating point
    frames["unique_id"] = ids.where(~ids.str.lower().isin(UNKNOWN), "").astype(str)
    numbers = pd.to_numeric(frames["frame_id"], errors="coerce")
    whole = numbers.notna().all() and (numbers % 1 == 0).all()
    frames["frame_id"] = (
        numbers.astype(np.int64) if whole else frames["frame_id"].astype(str).str.strip()
    )
    for name in TEXT & set(frames.columns) - {"unique_id"}:
        frames[name] = frames[name].astype(object).where(frames[name].notna(), "").astype(str)
    if "patient" in frames:
        known = ~frames["patient"].str.strip().str.lower().isin(UNKNOWN)
        frames["patient"] = frames["patient"].where(known, "")
    named = frames["unique_id"] != ""
    report.add("excluded", "object has no id", frames.loc[~named, "frame_path"])
    frames = frames[named].reset_index(drop=True)
    _refuse_duplicates(frames, report.source)
    frames = _with_patients(frames)
    frames = _with_sizes(frames, report)
    if check_images:
        frames = _with_images(frames, report, roots, decode)
        report.require_readable()
    frames = _with_boxes(frames, report)
    if frames.empty:
        reasons = ", ".join(dict.fromkeys(reason for _, reason in report.findings)) or "it is empty"
        raise GatesError(f"{report.source}: none of {report.found} rows can be used: {reasons}")
    _refuse_contradictions(frames, report.source)
    columns = [name for name in (*REQUIRED, *OPTIONAL) if name in frames]
    return FrameTable(frames[columns].reset_index(drop=True), dict(roots))


def _places(frames: pd.DataFrame) -> pd.Series:
    return frames["unique_id"].astype(str) + " frame " + frames["frame_id"].astype(str)


def _refuse_duplicates(frames: pd.DataFrame, source: str) -> None:
    keys = ["database", "unique_id", "frame_id"]
    twice = frames[frames.duplicated(keys, keep=False)]
    if not twice.empty:
        first, count = twice.iloc[0], len(twice[keys].drop_duplicates())
        raise GatesError(
            f"{source}: object {first['unique_id']} has two rows of frame {first['frame_id']} "
            f"({count} such pairs), expected one box of an object on a frame; remove the others"
        )


def _refuse_contradictions(frames: pd.DataFrame, source: str) -> None:
    for column, what in (("database", "data sets"), ("gt", "sizes"), ("patient", "patients")):
        if column not in frames:
            continue
        values = frames.groupby("unique_id", sort=False)[column].nunique()
        if (values > 1).any():
            name = values.index[values > 1][0]
            readings = frames.loc[frames["unique_id"] == name, column].unique()[:2]
            raise GatesError(
                f"{source}: object {name} has two {what}, {readings[0]} and {readings[1]}; "
                "correct one"
            )


def _with_patients(frames: pd.DataFrame) -> pd.DataFrame:
    """Name the patient of REAL-Colon objects that have none: the video, before the last ``_``."""
    unnamed = frames["database"] == "REALC"
    if "patient" in frames:
        unnamed &= frames["patient"] == ""
    if not unnamed.any():
        return frames
    patients = frames["patient"].copy() if "patient" in frames else pd.Series("", frames.index)
    patients[unnamed] = frames.loc[unnamed, "unique_id"].str.rpartition("_")[0]
    return frames.assign(patient=patients)


def _with_sizes(frames: pd.DataFrame, report: ReadReport) -> pd.DataFrame:
    """Parse ``gt``, each distinct value once, and keep a flag of censored sizes."""
    texts = [str(value) for value in frames["gt"].astype(object)]
    parsed = {text: parse_size(text) for text in dict.fromkeys(texts)}
    sizes = [parsed[text] for text in texts]
    censored = np.array([size.censored for size in sizes], dtype=bool)
    censored |= flags_of(frames, "censored")
    frames = frames.assign(gt=[size.mm for size in sizes], censored=censored)
    faults = pd.Series([size.fault for size in sizes], index=frames.index, dtype=object)
    for reason in filter(None, faults.unique()):
        report.add("excluded", reason, _places(frames[faults == reason]))
    unitless = np.array([not size.has_unit for size in sizes], dtype=bool) & (faults == "")
    plain = frames[unitless].drop_duplicates("unique_id")["gt"].tolist()
    if look_like_centimeters(plain):
        raise GatesError(
            f"{report.source}: the sizes of {len(plain)} objects lie between {min(plain):g} and "
            f"{max(plain):g}, which is plausible in centimeters and not in millimeters: add the "
            "unit, as in '0.6 cm', or multiply them by 10"
        )
    return frames[faults == ""].reset_index(drop=True)


def _with_images(
    frames: pd.DataFrame, report: ReadReport, roots: Mapping[str, str], decode: bool
) -> pd.DataFrame:
    """Check every image once; rows of an unreadable one are excluded with its path."""
    kept = np.ones(len(frames), dtype=bool)
    sizes = np.zeros((len(frames), 2))
    for path, rows in frames.groupby("frame_path", sort=False).indices.items():
        report.files += 1
        full = expand(str(path), roots)
        try:
            header = probe(full)
            if decode:
                read_rgb(full)
        except GatesError as error:
            fault = "is truncated" if "truncated" in str(error) else "cannot be read"
            fault = fault if Path(full).exists() else "does not exist"
            report.skip_unreadable(full, f"image {fault}", len(rows))
            kept[rows] = False
            continue
        sizes[rows] = header.width, header.height
        if header.bits > 8:
            deep = "more than 8 bits a channel, scaled to 8"
            report.add("repaired", deep, [full] * len(rows))
    frames = frames.assign(actual_width=sizes[:, 0], actual_height=sizes[:, 1])
    return frames[kept].reset_index(drop=True)


def _with_boxes(frames: pd.DataFrame, report: ReadReport) -> pd.DataFrame:
    annotated = frames[["width", "height"]].to_numpy(np.float64)
    actual = annotated
    if "actual_width" in frames:
        actual = frames[["actual_width", "actual_height"]].to_numpy(np.float64)
    boxes = frames[list(BOX)].to_numpy(np.float64)
    smallest = np.where(frames["database"] == RENDERED, SMALLEST_RENDERED, SMALLEST_AREA)
    repaired = repair_boxes(boxes, annotated, actual, smallest)
    frames = frames.assign(width=actual[:, 0], height=actual[:, 1])
    frames[list(BOX)] = repaired.boxes
    kept = ~(repaired.invalid | repaired.small)
    places = _places(frames)
    for reason, flags in (
        ("box rescaled, the image has another size than its annotation", repaired.rescaled),
        ("corners of the box were swapped", repaired.swapped),
        ("box clipped to the frame", repaired.clipped),
    ):
        report.add("repaired", reason, places[flags & kept])
    report.add("excluded", "a corner of the box is no number", places[repaired.invalid])
    small = f"less than {SMALLEST_AREA:g} square pixels of the box are inside the frame"
    report.add("excluded", small, places[repaired.small & ~repaired.invalid])
    return frames[kept].reset_index(drop=True).astype({"width": np.int64, "height": np.int64})


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
