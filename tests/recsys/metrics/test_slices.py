from itertools import pairwise

import numpy as np
import pytest

from core_gates.errors import GatesError
from recsys.metrics import counts_of, quantile_slices, standard_slices


def test_standard_slices():
    users = np.array([1, 1, 2, 9, 3])
    items = np.array(["a", "b", "a", "c", "z"])
    found = standard_slices(
        users,
        items,
        train_users=[1, 1, 1, 2, 3, 3],
        train_items=["a"] * 5 + ["b"] + ["c"] * 2,
        random=[0, 0, 1, 0, 0],
        parts=2,
    )
    where = {name: np.flatnonzero(rows).tolist() for name, rows in found.items()}
    assert where == {
        "new users": [3],
        "known users": [0, 1, 2, 4],
        "new items": [4],
        "known items": [0, 1, 2, 3],
        "activity 1/2": [2, 4],
        "activity 2/2": [0, 1],
        "exposure 1/2": [1, 3],
        "exposure 2/2": [0, 2],
        "random exposure": [2],
        "ranked exposure": [0, 1, 3, 4],
    }


def test_parts_without_rows_are_left_out():
    found = standard_slices([1, 1], [2, 2], train_users=[1], train_items=[2])
    assert "new users" not in found
    assert sum(name.startswith("activity") for name in found) == 1


def test_quantiles_divide_rows_and_keep_ties_together():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 30, 1000)
    parts = quantile_slices("rows", values, parts=4)
    assert list(parts) == ["rows 1/4", "rows 2/4", "rows 3/4", "rows 4/4"]
    assert (sum(part.astype(int) for part in parts.values()) == 1).all()
    assert all(200 < part.sum() < 300 for part in parts.values())
    masks = list(parts.values())
    for low, high in pairwise(masks):
        assert values[low].max() < values[high].min()


def test_counts():
    assert counts_of([3, 1, 7], [1, 3, 3, 5]).tolist() == [2, 1, 0]
    assert counts_of(["b", "x"], []).tolist() == [0, 0]


def test_faults():
    with pytest.raises(GatesError, match="2 users and 1 items"):
        standard_slices([1, 2], [1], train_users=[], train_items=[])
    with pytest.raises(GatesError, match=r"random has shape \(1,\)"):
        standard_slices([1, 2], [1, 2], train_users=[], train_items=[], random=[1])
    with pytest.raises(ValueError, match="1 names for 2 parts"):
        quantile_slices("x", [1, 2], parts=2, names=["low"])
    assert quantile_slices("x", [1.0], among=np.array([False])) == {}
