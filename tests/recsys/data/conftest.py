import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recsys.data.tables import RankingTables
from recsys.schema import Dense, FeatureSchema, Sparse, Task


@pytest.fixture
def shared():
    """The folder of real data, by ``shared(name)``; absent files skip the test."""
    root = Path(os.environ.get("GATES_SHARED", Path(__file__).parents[4] / "shared"))

    def find(name):
        path = root / "data" / "recsys" / name
        if not path.exists():
            pytest.skip(f"{path} is absent: set GATES_SHARED")
        return path

    return find


@pytest.fixture
def tables():
    """Rows whose dense number is their place, so that a batch shows which rows it has."""
    schema = FeatureSchema(
        tasks=(Task("y"), Task("z")),
        sparse=(Sparse("user"), Sparse("item")),
        dense=(Dense("place", "none"),),
        user="user",
    )
    draw = np.random.default_rng(0)

    def rows(count, first):
        return pl.DataFrame(
            {
                "user": draw.integers(0, 12, count),
                "item": draw.integers(0, 30, count),
                "place": np.arange(first, first + count, dtype=float),
                "y": draw.integers(0, 2, count),
                "z": draw.integers(0, 2, count),
            }
        )

    return RankingTables("toy", schema, rows(103, 0), rows(31, 200), rows(17, 300))
