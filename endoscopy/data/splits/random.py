"""Splits and draws at random, of given numbers of objects."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from core_gates.errors import GatesError
from endoscopy.data.splits.folds import Split, check_leakage
from endoscopy.data.tables.frame_table import FrameTable


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
    order = np.random.default_rng(seed).permutation(len(groups))
    waiting = [list(groups.values())[position] for position in order]
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
