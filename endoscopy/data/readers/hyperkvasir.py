"""The official 2- and 5-fold splits of HyperKvasir's labeled images (Borgli et al. 2020)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from core_gates.errors import GatesError
from endoscopy.data.readers.report import ReadReport
from endoscopy.data.readers.table import read_csv, read_parquet

IMAGES, CLASSES = 10_662, 23


class ClassificationFold(NamedTuple):
    """One fold tests, the others train.

    Attributes:
        train: Paths to learn from.
        train_labels: (N,) positions in ``classes``.
        test: Paths to report on.
        test_labels: (M,) positions in ``classes``.
        classes: Names in alphabetical order.
    """

    train: list[Path]
    train_labels: NDArray[np.int64]
    test: list[Path]
    test_labels: NDArray[np.int64]
    classes: tuple[str, ...]


def read_hyperkvasir(
    splits: str | os.PathLike[str],
    images: str | os.PathLike[str],
    fold: int,
    folds: Literal[2, 5] = 5,
) -> tuple[ClassificationFold, ReadReport]:
    """Read an official split and find its images, at any depth below a folder.

    Args:
        splits: Parquet or CSV with ``file-name``, ``class-name``, ``split2`` and ``split5``.
        images: Folder of the labeled images.
        fold: The fold that tests.
        folds: Which of the two splits.

    Returns:
        The fold, and the images that are listed and not there.

    Raises:
        GatesError: The list has not the 10,662 images of 23 classes of the official one, an image
            is listed twice, the fold does not exist, or more than 1 % of the images are absent.
    """
    path = Path(splits)
    table = read_parquet(path) if path.suffix == ".parquet" else read_csv(path)
    column = f"split{folds}"
    missing = [n for n in ("file-name", "class-name", column) if n not in table]
    if missing:
        raise GatesError(f"{path} lacks the columns {', '.join(missing)}; get the official list")
    if not 0 <= fold < folds:
        raise GatesError(f"fold {fold}: choose one of 0 to {folds - 1}")
    classes = tuple(sorted(set(table["class-name"])))
    if len(table) != IMAGES or len(classes) != CLASSES or table["file-name"].duplicated().any():
        raise GatesError(
            f"{path} lists {table['file-name'].nunique()} images of {len(classes)} classes in "
            f"{len(table)} rows, expected {IMAGES} images of {CLASSES}; get the official list"
        )
    there = {found.name: found for found in Path(images).rglob("*.jpg")}
    report = ReadReport(str(path), found=len(table), files=len(table))
    for name in table["file-name"][~table["file-name"].isin(list(there))]:
        report.skip_unreadable(Path(images) / name, "image is absent")
    report.require_readable()
    table = table[table["file-name"].isin(list(there))]
    tests = pd.to_numeric(table[column]) == fold
    labels = np.searchsorted(classes, table["class-name"].to_numpy(str)).astype(np.int64)
    paths = [there[name] for name in table["file-name"]]
    flags = tests.to_numpy(bool)
    found = ClassificationFold(
        [p for p, test in zip(paths, flags, strict=True) if not test],
        labels[~flags],
        [p for p, test in zip(paths, flags, strict=True) if test],
        labels[flags],
        classes,
    )
    return found, report
