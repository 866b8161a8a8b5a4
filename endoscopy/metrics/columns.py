"""What columns of tables mean, also where they have gaps: flags, patients, class probabilities."""

import numpy as np
import pandas as pd

from core_gates.errors import GatesError

PROBABILITIES = ("p_diminutive", "p_small", "p_large")
"""Probabilities of the three size classes."""

_TRUE, _FALSE = frozenset({"true", "1", "1.0", "yes"}), frozenset({"false", "0", "0.0", "no", ""})


def flags_of(table: pd.DataFrame, name: str) -> np.ndarray:
    """Return a column of flags (N,) as booleans; False where it has no value or is absent.

    Text is parsed: ``true``, ``1``, ``yes``, or ``false``, ``0``, ``no``.

    Raises:
        GatesError: A value is neither.
    """
    if name not in table:
        return np.zeros(len(table), dtype=bool)
    column = table[name]
    if pd.api.types.is_bool_dtype(column) and not column.isna().any():
        return column.to_numpy(dtype=bool)
    text = column.astype("object").where(column.notna(), "").astype(str).str.strip().str.lower()
    known = text.isin([*_TRUE, *_FALSE]).to_numpy(dtype=bool)
    if not known.all():
        row = int(np.flatnonzero(~known)[0])
        raise GatesError(f"{name} is {column.iloc[row]!r} in row {row}: write true or false")
    return text.isin(list(_TRUE)).to_numpy(dtype=bool)


def has_patient(table: pd.DataFrame) -> np.ndarray:
    """Return (N,) whether the patient of each row is known: neither missing nor blank."""
    if "patient" not in table:
        return np.zeros(len(table), dtype=bool)
    column = table["patient"]
    blank = column.astype("object").where(column.notna(), "").astype(str).str.strip() == ""
    return ~blank.to_numpy(dtype=bool)


def patients_of(table: pd.DataFrame) -> np.ndarray:
    """Return the patient (N,) of each row; an object without one is a separate patient.

    Such a patient is named by the ``unique_id``, after ``object`` where a patient has that name
    already.
    """
    own, known = table["unique_id"].astype(str).to_numpy(dtype=object), has_patient(table)
    if not known.any():
        return own.astype(str)
    patients = np.where(known, table["patient"].astype(str).to_numpy(dtype=object), "")
    taken = set(patients[known])
    own = np.array([f"object {name}" if name in taken else name for name in own], dtype=object)
    return np.where(known, patients, own).astype(str)


def clusters_of(table: pd.DataFrame) -> np.ndarray:
    """Return what samples (N,) depend on: the patient where known, else the object."""
    return patients_of(table)
