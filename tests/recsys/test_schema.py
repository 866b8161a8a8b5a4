"""What a schema refuses before a row is read."""

import numpy as np
import polars as pl
import pytest

from core_gates.errors import GatesError
from recsys.infer import infer_schema
from recsys.schema import Dense, FeatureSchema, Sparse, Task

TASKS = (Task("y"),)


@pytest.mark.fault("video R12")
@pytest.mark.parametrize("kind", [Sparse, Dense])
def test_a_feature_called_like_the_indicator_of_another_is_refused(kind):
    """Both would be one input of the network."""
    others = {"sparse": (Sparse("i"),), "dense": (Dense("age"),)}
    name = "sparse" if kind is Sparse else "dense"
    others[name] = (*others[name], kind("age missing"))
    words = "the feature 'age missing' is called like the indicator that 'age' is missing: rename"
    with pytest.raises(ValueError, match=words):
        FeatureSchema(tasks=TASKS, **others)
    bucketed = Dense("age", scaling="buckets")  # has no indicator
    FeatureSchema(tasks=TASKS, sparse=(Sparse("age missing"),), dense=(bucketed,))
    FeatureSchema(tasks=(Task("age missing"),), dense=(Dense("age"),))


@pytest.mark.fault("video R12")
def test_a_draft_tells_of_such_a_column_in_one_line():
    rng = np.random.default_rng(0)
    table = pl.DataFrame(
        {
            "age": rng.normal(size=400),
            "age missing": rng.integers(0, 2, 400),
            "y": rng.integers(0, 2, 400),
        }
    )
    with pytest.raises(GatesError, match="'age missing' is called like the indicator"):
        infer_schema(table, ["y"])
    assert infer_schema(table, ["y"], drop=["age missing"]).schema.dense[0].name == "age"
