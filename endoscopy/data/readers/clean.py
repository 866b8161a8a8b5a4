"""From raw rows to rows of the frame table: what is excluded, what is repaired."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from core_gates.errors import GatesError
from endoscopy.data.images import probe, read_rgb
from endoscopy.data.readers.report import ReadReport
from endoscopy.data.tables.boxes import SMALLEST_AREA, SMALLEST_RENDERED, repair_boxes
from endoscopy.data.tables.frame_table import BOX, OPTIONAL, REQUIRED, TEXT, FrameTable, expand
from endoscopy.data.tables.sizes import Size, look_like_centimeters, parse_size
from endoscopy.metrics.columns import flags_of

RESCALED = "box rescaled, the image has another size than its annotation"
SWAPPED = "corners of the box were swapped"
CLIPPED = "box clipped to the frame"
SMALL = f"less than {SMALLEST_AREA:g} square pixels of the box are inside the frame"
INVALID = "a corner of the box is no number"
NO_ID = "object has no id"
DEEP = "more than 8 bits a channel, scaled to 8"


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
    frames["unique_id"] = _ids(frames["unique_id"])
    frames["frame_id"] = _frame_numbers(frames["frame_id"])
    for name in TEXT & set(frames.columns) - {"unique_id"}:
        frames[name] = frames[name].astype(object).where(frames[name].notna(), "").astype(str)
    named = frames["unique_id"] != ""
    report.add("excluded", NO_ID, frames.loc[~named, "frame_path"])
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


def _ids(values: pd.Series) -> pd.Series:
    """Strip the ids; a whole number that was read as floating point is written without decimals."""
    text = values.astype("string").fillna("").str.strip()
    text = text.str.replace(r"^(\d+)\.0+$", r"\1", regex=True)
    return text.where(~text.str.lower().isin(["nan", "none", "<na>"]), "").astype(str)


def _frame_numbers(values: pd.Series) -> pd.Series:
    numbers = pd.to_numeric(values, errors="coerce")
    if numbers.notna().all() and (numbers % 1 == 0).all():
        return numbers.astype(np.int64)
    return values.astype(str).str.strip()


def _places(frames: pd.DataFrame) -> pd.Series:
    return frames["unique_id"].astype(str) + " frame " + frames["frame_id"].astype(str)


def _refuse_duplicates(frames: pd.DataFrame, source: str) -> None:
    keys = ["database", "unique_id", "frame_id"]
    twice = frames[frames.duplicated(keys, keep=False)]
    if not twice.empty:
        first, count = twice.iloc[0], twice[keys].drop_duplicates().shape[0]
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
            found = frames.loc[frames["unique_id"] == name, column].unique()[:2]
            raise GatesError(
                f"{source}: object {name} has two {what}, {found[0]} and {found[1]}; correct one"
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
    parsed: dict[object, Size] = {}
    sizes = []
    for value in frames["gt"].astype(object):
        key = str(value)
        if key not in parsed:
            parsed[key] = parse_size(value)
        sizes.append(parsed[key])
    censored = np.array([size.censored for size in sizes], dtype=bool)
    censored |= flags_of(frames, "censored")
    frames = frames.assign(gt=[size.mm for size in sizes], censored=censored)
    faults = pd.Series([size.fault for size in sizes], index=frames.index, dtype=object)
    for reason in [fault for fault in faults.unique() if fault]:
        report.add("excluded", reason, _places(frames[faults == reason]))
    unitless = np.array([not size.has_unit for size in sizes], dtype=bool) & (faults == "")
    _refuse_centimeters(frames[unitless].drop_duplicates("unique_id")["gt"].tolist(), report.source)
    return frames[faults == ""].reset_index(drop=True)


def _refuse_centimeters(sizes: list[float], source: str) -> None:
    if look_like_centimeters(sizes):
        raise GatesError(
            f"{source}: the sizes of {len(sizes)} objects lie between {min(sizes):g} and "
            f"{max(sizes):g}, which is plausible in centimeters and not in millimeters: add the "
            "unit, as in '0.6 cm', or multiply them by 10"
        )


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
            why = _why(error) if Path(full).exists() else "image does not exist"
            report.skip_unreadable(full, why, len(rows))
            kept[rows] = False
            continue
        sizes[rows] = header.width, header.height
        if header.bits > 8:
            report.add("repaired", DEEP, [full] * len(rows))
    frames = frames.assign(actual_width=sizes[:, 0], actual_height=sizes[:, 1])
    return frames[kept].reset_index(drop=True)


def _why(error: GatesError) -> str:
    return "image is truncated" if "truncated" in str(error) else "image cannot be read"


def _with_boxes(frames: pd.DataFrame, report: ReadReport) -> pd.DataFrame:
    annotated = frames[["width", "height"]].to_numpy(np.float64)
    actual = annotated
    if "actual_width" in frames:
        actual = frames[["actual_width", "actual_height"]].to_numpy(np.float64)
    boxes = frames[list(BOX)].to_numpy(np.float64)
    smallest = np.where(frames["database"] == "SYNTH", SMALLEST_RENDERED, SMALLEST_AREA)
    repaired = repair_boxes(boxes, annotated, actual, smallest)
    frames = frames.assign(width=actual[:, 0], height=actual[:, 1])
    frames[list(BOX)] = repaired.boxes
    kept = ~(repaired.invalid | repaired.small)
    places = _places(frames)
    for reason, flags in ((RESCALED, repaired.rescaled), (SWAPPED, repaired.swapped)):
        report.add("repaired", reason, places[flags & kept])
    report.add("repaired", CLIPPED, places[repaired.clipped & kept])
    report.add("excluded", INVALID, places[repaired.invalid])
    report.add("excluded", SMALL, places[repaired.small & ~repaired.invalid])
    return frames[kept].reset_index(drop=True).astype({"width": np.int64, "height": np.int64})
