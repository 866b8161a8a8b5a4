"""What a schema refuses before a row is read."""

from functools import partial

import numpy as np
import polars as pl
import pytest

from core_gates.errors import GatesError
from recsys.data.tables import split_by_time
from recsys.infer import infer_schema
from recsys.schema import Crossed, Dense, FeatureSchema, History, Sparse, Task
from recsys.transform import FeatureTransform

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


@pytest.mark.fault("video R15")
@pytest.mark.parametrize(
    "feature",
    [partial(Sparse, "a"), partial(Dense, "a"), partial(History, "a", "b"), partial(Crossed, "ab")],
)
def test_each_feature_is_of_a_known_side(feature):
    assert feature(side="item").side == "item"
    with pytest.raises(ValueError, match="side is 'users'; choose one of user, item, context"):
        feature(side="users")


@pytest.mark.fault("video R15")
@pytest.mark.parametrize(
    "times",
    [[[1], [2]], np.ones((2, 2)), [{"a": 1}, {"a": 2}], [[None], [[1]]]],
    ids=["lists", "arrays", "structs", "lists of lists"],
)
def test_times_without_an_order_are_refused_in_one_line(times):
    schema = FeatureSchema(tasks=TASKS, sparse=(Sparse("i"),), time="t")
    table = pl.DataFrame({"i": [1, 2], "t": times, "y": [0, 1]})
    calls = (FeatureTransform(schema).fit, lambda t: split_by_time(t, "t", validation=0.3))
    for call in calls:
        with pytest.raises(GatesError, match=r"^column 't' has type .*, a time must be .*$"):
            call(table)
