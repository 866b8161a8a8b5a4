"""Which fold each object is in; splits that leak are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from core_gates.errors import GatesError
from endoscopy.data.options import check_option
from endoscopy.data.tables.frame_table import FrameTable

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
        check_option("level", self.level, Level)

    def split(self, table: FrameTable, fold: int) -> Split:
        """Return the rows of one fold's experiment, joined by object id.

        Objects without a fold are in no part; :meth:`unassigned` names them.

        Raises:
            GatesError: The fold does not exist, no object has a fold, a part is empty, or the split
                leaks.
        """
        if not 0 <= fold < self.num_folds:
            raise GatesError(f"fold {fold} of {self.name}: choose one of 0 to {self.num_folds - 1}")
        folds = self._rows(table)
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

    def _rows(self, table: FrameTable) -> Rows:
        codes = np.array([self.assignment.get(name, -1) for name in table.unique_ids])
        return codes[table.object_codes].astype(np.int64)


def check_leakage(table: FrameTable, split: Split, level: Level = "patient") -> None:
    """Refuse a split that shares objects or, at patient level, patients or frames between parts.

    Raises:
        GatesError: A part but calibration is empty, or something is in two parts.
        ValueError: There is no such level.
    """
    check_option("level", level, Level)
    for name, rows in split._asdict().items():
        if rows.size == 0 and name != "calibration":
            raise GatesError(f"the {name} part of the split is empty; add objects or other folds")
    kinds = {"object": table.object_codes}
    if level == "patient":
        kinds["patient"] = np.unique(table.patients, return_inverse=True)[1]
        kinds["frame"] = table.frames["frame_path"].factorize()[0]
    for kind, codes in kinds.items():
        owner = np.full(int(codes.max()) + 1, -1)
        for number, rows in enumerate(split):
            mine = np.unique(codes[rows])
            if (owner[mine] >= 0).any():
                code = mine[owner[mine] >= 0][0]
                row = int(np.flatnonzero(codes == code)[0])
                raise GatesError(
                    f"{kind} {_name(table, kind, row)} is in the {Split._fields[owner[code]]} and "
                    f"the {Split._fields[number]} part, which leaks; keep it in one"
                )
            owner[mine] = number


def _name(table: FrameTable, kind: str, row: int) -> str:
    if kind == "patient":
        return str(table.patients[row])
    column = "unique_id" if kind == "object" else "frame_path"
    return str(table.frames[column].iat[row])
