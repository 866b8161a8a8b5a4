"""Folds and splits, published and at random, that refuse leakage."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedKFold

from core_gates.errors import GatesError, check_option
from endoscopy.data.frame_table import FrameTable, object_order
from endoscopy.data.readers.tabular import read_csv, require_columns
from endoscopy.metrics.classification import TRUTH

Level = Literal["object", "patient"]
Rows = NDArray[np.int64]


class Split(NamedTuple):
    """Rows of a frame table, ascending; no object is in two parts.

    Attributes:
        train: Rows to learn from.
        validation: Rows to choose by.
        test: Rows to report on.
        calibration: Rows for conformal intervals; often none.
    """

    train: Rows
    validation: Rows
    test: Rows
    calibration: Rows = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Folds:
    """Folds of objects: fold k is for testing, k+1 (cyclic) for validation, the rest for training.

    Attributes:
        name: Name of the split in reports.
        num_folds: Number of folds.
        assignment: Object id to fold.
        level: What is kept together: an object, or all objects of a patient.
        official: Whether this is a published split, read and verified, not a new one.
        notes: Lines for the report: what was verified, what disagrees.

    Raises:
        ValueError: There is no such level.
    """

    name: str
    num_folds: int
    assignment: Mapping[str, int]
    level: Level
    official: bool = False
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_option("level", self.level, get_args(Level))

    def split(self, table: FrameTable, fold: int) -> Split:
        """Return the rows of one fold's experiment, joined by object id.

        Objects without a fold are in no part; `unassigned` names them.

        Raises:
            GatesError: The fold does not exist, no object has a fold, a part is empty, or the split
                leaks.
        """
        if not 0 <= fold < self.num_folds:
            raise GatesError(f"fold {fold} of {self.name}: choose one of 0 to {self.num_folds - 1}")
        codes = np.array([self.assignment.get(name, -1) for name in table.unique_ids])
        folds = codes[table.object_codes]
        if (folds < 0).all():
            raise GatesError(
                f"{self.name} assigns none of the {len(table.unique_ids)} objects, such as "
                f"{table.unique_ids[0]}; choose another split or make folds of these objects"
            )
        test, validation = folds == fold, folds == (fold + 1) % self.num_folds
        train = (folds >= 0) & ~test & ~validation
        parts = Split(*(np.flatnonzero(part) for part in (train, validation, test)))
        check_leakage(table, parts, self.level)
        return parts

    def unassigned(self, table: FrameTable) -> list[str]:
        """Return the objects of the table that have no fold."""
        return [name for name in table.unique_ids if name not in self.assignment]


def check_leakage(table: FrameTable, split: Split, level: Level = "patient") -> None:
    """Refuse a split that shares objects or, at patient level, patients or frames between parts.

    Raises:
        GatesError: A part but calibration is empty, or something is in two parts.
        ValueError: There is no such level.
    """
    check_option("level", level, get_args(Level))
    for name, rows in split._asdict().items():
        if rows.size == 0 and name != "calibration":
            raise GatesError(f"the {name} part of the split is empty; add objects or other folds")
    kinds: dict[str, tuple[Rows, Any]] = {"object": (table.object_codes, table.frames["unique_id"])}
    if level == "patient":
        paths, patients = table.frames["frame_path"], table.patients
        kinds["patient"] = (np.unique(patients, return_inverse=True)[1], patients)
        kinds["frame"] = (paths.factorize()[0], paths)
    for kind, (codes, names) in kinds.items():
        owner = np.full(int(codes.max()) + 1, -1)
        for number, rows in enumerate(split):
            mine = np.unique(codes[rows])
            if (owner[mine] >= 0).any():
                code = mine[owner[mine] >= 0][0]
                row = int(np.flatnonzero(codes == code)[0])
                raise GatesError(
                    f"{kind} {names[row]} is in the {Split._fields[owner[code]]} and "
                    f"the {Split._fields[number]} part, which leaks; keep it in one"
                )
            owner[mine] = number


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
            count = int(((objects["fold"] == fold) & (objects["group"] == group)).sum())
            wanted = int(row[f"objects_{group}"])
            if count != wanted:
                differences.append(
                    f"fold {fold} has {count} {CLASS_NAMES[group]} objects, expected {wanted}"
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
    return Folds(
        name="official HAG 6-fold",
        num_folds=6,
        assignment=dict(zip(objects["unique_id"], objects["fold"], strict=True)),
        level="object",
        official=True,
        notes=(
            f"verified: {len(objects)} objects in the 18 published counts of fold and class",
            f"verified: {len(table)} frames agree with the figure within {FRAME_TOLERANCE} each"
            if has_frames
            else "not verified: frames, objects alone",
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
    check_option("level", level, get_args(Level))
    objects = table.objects
    mm = objects["gt"].to_numpy(np.float64)
    owners = objects["unique_id"]
    if level == "patient":
        owners = owners.map(dict(zip(table.frames["unique_id"], table.patients, strict=True)))
    largest = pd.Series(mm).groupby(owners.to_numpy()).max()
    units = sorted(largest.index, key=object_order)
    if len(units) < num_folds or num_folds < 2:
        raise GatesError(f"{len(units)} {level}s cannot make {num_folds} folds; choose 2 or more")
    classes = TRUTH.classes(largest.loc[units])
    fold_of: dict[str, int] = {}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The least populated class", UserWarning)
            folder = StratifiedKFold(num_folds, shuffle=True, random_state=seed)
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
    require_columns(raw, ["unique_id", "kfold_id"] + ["gt_group"] * groups, path)
    folds = pd.to_numeric(raw["kfold_id"], errors="coerce")
    wrong = folds.isna() | (folds % 1 != 0) | (folds < 0)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
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


def split_by_counts(
    table: FrameTable, train: int, validation: int, test: int, calibration: int = 0, seed: int = 0
) -> Split:
    """Split whole patients at random into parts of given numbers of objects.

    Test, calibration and validation are taken first and stay the same while ``train`` varies; where
    every patient has one object, a larger training part contains a smaller one.

    Raises:
        GatesError: There are too few objects, or no whole patient fits.
    """
    patient = dict(zip(table.frames["unique_id"], table.patients, strict=True))
    groups: dict[str, list[int]] = {}
    for code, name in enumerate(table.unique_ids):
        groups.setdefault(patient[name], []).append(code)
    wanted = {"test": test, "calibration": calibration, "validation": validation, "train": train}
    if sum(wanted.values()) > len(table.unique_ids):
        raise GatesError(
            f"{len(table.unique_ids)} objects cannot give {train} for training, {validation} for "
            f"validation, {calibration} for calibration and {test} for the test; ask for fewer"
        )
    objects = list(groups.values())
    waiting = [objects[k] for k in np.random.default_rng(seed).permutation(len(objects))]
    part_of = np.full(len(table.unique_ids), -1)
    for name, count in wanted.items():
        left: list[list[int]] = []
        for codes in waiting:
            if len(codes) <= count:
                part_of[codes] = Split._fields.index(name)
                count -= len(codes)
            else:
                left.append(codes)
        if count:
            raise GatesError(
                f"the {name} part lacks {count} objects, since patients are kept whole; change its "
                "number by one or two"
            )
        waiting = left
    parts = part_of[table.object_codes]
    split = Split(*(np.flatnonzero(parts == number) for number in range(len(Split._fields))))
    check_leakage(table, split, "patient")
    return split


def draw_objects(
    table: FrameTable, rows: NDArray[np.int64], number: int, seed: int
) -> NDArray[np.int64]:
    """Return the rows of some objects, drawn at random from those of the rows.

    Raises:
        GatesError: There are fewer objects.
    """
    codes = table.object_codes[rows]
    objects = np.unique(codes)
    if not 1 <= number <= len(objects):
        raise GatesError(f"{number} objects cannot be drawn from {len(objects)}; ask for fewer")
    drawn = np.random.default_rng(seed).choice(objects, number, replace=False)
    return rows[np.isin(codes, drawn)]
