"""Splits by folds: published ones, read and verified, and new ones."""

from __future__ import annotations

import os
import warnings
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedKFold

from core_gates.errors import GatesError
from endoscopy.data.options import check_option
from endoscopy.data.readers.table import read_csv
from endoscopy.data.splits.folds import Folds, Level
from endoscopy.data.tables.frame_table import FrameTable, object_order
from endoscopy.metrics.size_classes import TRUTH

CLASSES = ("D", "S", "L")
CLASS_NAMES = {"D": "diminutive", "S": "small", "L": "large"}
FRAME_TOLERANCE = 100
AUDIT_COUNTS = (147, 85)
HAG_COUNTS = (177, 55)


def official_hag6(path: str | os.PathLike[str]) -> Folds:
    """Read the published 6-fold split of the hard-attention-gate experiments and verify it.

    Args:
        path: ``kfold_polypsizing_lists_per_object.csv`` of the authors, with ``unique_id``,
            ``gt_group`` and ``kfold_id``; one row per frame, or per object.

    Returns:
        Object-level folds, official only because all published counts hold; two polyps of one
        patient may be in different folds.

    Raises:
        GatesError: A column is missing, an object is in two folds or classes, or a count differs,
            as it does if the split was recomputed from the sizes.
    """
    path = Path(path)
    table = _read_folds(path)
    expected = pd.read_csv(str(files("endoscopy.data") / "assets/hag6_official_fold_counts.csv"))
    objects = table.drop_duplicates("unique_id")
    has_frames = len(table) > len(objects)
    differences = []
    for fold, row in expected.set_index("fold").iterrows():
        for group in CLASSES:
            mine = (objects["fold"] == fold) & (objects["group"] == group)
            found, wanted = int(mine.sum()), int(row[f"objects_{group}"])
            if found != wanted:
                differences.append(
                    f"fold {fold} has {found} {CLASS_NAMES[group]} objects, expected {wanted}"
                )
            frames = int(((table["fold"] == fold) & (table["group"] == group)).sum())
            drawn = int(row[f"frames_{group}_approx"])
            if has_frames and abs(frames - drawn) > FRAME_TOLERANCE:
                differences.append(
                    f"fold {fold} has {frames} {CLASS_NAMES[group]} frames, expected about {drawn}"
                )
    if differences or set(objects["fold"]) != set(expected["fold"]):
        what = differences[0] if differences else f"it has {objects['fold'].nunique()} folds"
        raise GatesError(
            f"{path} is not the official split: {what} ({len(differences)} counts differ); get the "
            "authors' file, or read it as your folds with read_folds"
        )
    frames_note = f"{len(table)} frames agree with the figure within {FRAME_TOLERANCE} each"
    return Folds(
        name="official HAG 6-fold",
        num_folds=6,
        assignment=dict(zip(objects["unique_id"], objects["fold"], strict=True)),
        level="object",
        official=True,
        notes=(
            f"verified: {len(objects)} objects in the 18 published counts of fold and class",
            f"verified: {frames_note}" if has_frames else "not verified: frames, objects alone",
            "object-level: polyps of one patient may be in different folds",
        ),
    )


def read_folds(path: str | os.PathLike[str], level: Level = "object") -> Folds:
    """Read a user's folds, ``unique_id`` and ``kfold_id``; never called official.

    Raises:
        GatesError: A column is missing or an object is in two folds.
        ValueError: There is no such level.
    """
    table = _read_folds(Path(path), groups=False).drop_duplicates("unique_id")
    assignment = dict(zip(table["unique_id"], table["fold"], strict=True))
    return Folds(f"folds of {Path(path).name}", int(table["fold"].max()) + 1, assignment, level)


def audit5(table: FrameTable) -> Folds:
    """Return the public patient-level 5-fold split of the polyp-sizing audit (arXiv 2605.20461).

    REAL-Colon objects are in the fold of their video, SUN objects in that of their case.

    Raises:
        GatesError: The table holds neither data set.
    """
    public = read_csv(Path(str(files("endoscopy.data") / "assets/audit5_fold_assignments.csv")))
    keys = list(zip(public["dataset"], public["video_id"], strict=True))
    folds = dict(zip(keys, public["fold"].astype(int), strict=True))
    above = dict(zip(keys, public["label_gt5mm"] == "1", strict=True))
    objects = table.objects
    assignment, differing = {}, 0
    for name, database, mm in zip(
        objects["unique_id"], objects["database"], objects["gt"], strict=True
    ):
        if database == "SUN":
            key = ("sun", name)
            differing += key in above and above[key] != (mm > 5.0)
        else:
            key = ("real_colon", name.rpartition("_")[0]) if database == "REALC" else ("", "")
        if key in folds:
            assignment[name] = folds[key]
    if not assignment:
        raise GatesError(
            "the audit's 5-fold split covers REAL-Colon and SUN, found "
            f"{', '.join(sorted(set(objects['database'])))}; make folds or split by counts"
        )
    large = int((objects["gt"] > 5.0).sum())
    notes = [
        f"the audit counts {AUDIT_COUNTS[0]} polyps of at most 5 mm and {AUDIT_COUNTS[1]} above, "
        f"the HAG figures {HAG_COUNTS[0]} and {HAG_COUNTS[1]}; this table has "
        f"{len(objects) - large} and {large}"
    ]
    if differing:
        notes.append(f"{differing} SUN cases are on the other side of 5 mm than in the audit")
    if missing := len(objects) - len(assignment):
        notes.append(f"{missing} objects are in no fold and left out")
    return Folds("audit 5-fold", 5, assignment, "patient", official=True, notes=tuple(notes))


def make_folds(
    table: FrameTable, num_folds: int = 6, level: Level = "patient", seed: int = 1
) -> Folds:
    """Make stratified folds of the objects, or of the patients by their largest polyp.

    At object level this is the algorithm that the hard-attention-gate experiments name
    (StratifiedKFold, shuffled, on three size classes); on the public sizes it does not give their
    split, and is never called official.

    Args:
        table: Objects with sizes.
        num_folds: Number of folds.
        level: What is kept together.
        seed: Of the shuffling.

    Raises:
        GatesError: There are fewer units than folds.
        ValueError: There is no such level.
    """
    check_option("level", level, Level)
    objects = table.objects
    mm = objects["gt"].to_numpy(np.float64)
    owners = objects["unique_id"]
    if level == "patient":
        patient = dict(zip(table.frames["unique_id"], table.patients, strict=True))
        owners = owners.map(patient)
    largest = pd.Series(mm).groupby(owners.to_numpy()).max()
    units = sorted(largest.index, key=object_order)
    if len(units) < num_folds or num_folds < 2:
        raise GatesError(f"{len(units)} {level}s cannot make {num_folds} folds; choose 2 or more")
    classes = TRUTH.classes(largest.loc[units])
    folder = StratifiedKFold(num_folds, shuffle=True, random_state=seed)
    fold_of: dict[str, int] = {}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The least populated class", UserWarning)
            for fold, (_, test) in enumerate(folder.split(classes, classes)):
                fold_of |= {units[position]: fold for position in test}
    except ValueError as error:
        raise GatesError(
            f"{len(units)} {level}s cannot be stratified into {num_folds} folds; choose fewer"
        ) from error
    scarce = [
        f"only {count} {level}s are {name}, so some folds have none"
        for name, count in zip(CLASS_NAMES.values(), np.bincount(classes, minlength=3), strict=True)
        if count < num_folds
    ]
    assignment = {n: fold_of[o] for n, o in zip(objects["unique_id"], owners, strict=True)}
    name = f"{num_folds} folds of {level}s, made with seed {seed}"
    return Folds(name, num_folds, assignment, level, notes=tuple(scarce))


def _read_folds(path: Path, groups: bool = True) -> pd.DataFrame:
    """Return ``unique_id``, ``fold`` and, if asked, the letter of the class as ``group``."""
    raw = read_csv(path)
    needed = ["unique_id", "kfold_id"] + ["gt_group"] * groups
    missing = [name for name in needed if name not in raw]
    if missing:
        raise GatesError(f"{path} lacks the columns {', '.join(missing)}; add them")
    folds = pd.to_numeric(raw["kfold_id"], errors="coerce")
    if folds.isna().any() or (folds % 1 != 0).any() or (folds < 0).any():
        row = int(np.flatnonzero(folds.isna() | (folds % 1 != 0) | (folds < 0))[0])
        raise GatesError(f"{path}: kfold_id {raw['kfold_id'][row]!r} is no fold; correct row {row}")
    ids = raw["unique_id"].str.strip().str.replace(r"^(\d+)\.0+$", r"\1", regex=True)
    table = pd.DataFrame({"unique_id": ids, "fold": folds.astype(np.int64)})
    if groups:
        table["group"] = raw["gt_group"].str.strip().str[:1].str.upper()
    for column in table.columns[1:]:
        values = table.groupby("unique_id")[column].nunique()
        if (values > 1).any():
            name = values.index[values > 1][0]
            what = "folds" if column == "fold" else "size classes"
            raise GatesError(f"{path}: object {name} is in two {what}; correct its rows")
    return table
