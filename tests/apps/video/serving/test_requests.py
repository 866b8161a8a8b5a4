import json

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from apps.video.serving.requests import RequestReader
from core_gates.errors import GatesError


@pytest.fixture(scope="module")
def reader(shop):
    transform = shop.FeatureTransform(shop.schema()).fit(shop.rows(300))
    return RequestReader(transform, shop.TASKS)


@pytest.fixture
def good(shop):
    return json.loads(json.dumps(shop.request(shop.rows(3))))


def test_fields_have_the_kinds_of_the_training_table(reader):
    assert reader.kinds == {
        "reader": "integer", "city": "text", "book": "integer", "author": "text",
        "hour": "integer", "age": "number", "price": "number", "last": "integers",
    }  # fmt: skip


def test_requests_become_the_rows_that_they_ask_for(shop, reader):
    tables = [shop.rows(n, seed) for n, seed in ((3, 0), (1, 1), (4, 2))]
    requests = [reader.read(json.loads(json.dumps(shop.request(t))), 10) for t in tables]
    expected = pl.concat([shop.as_table(table) for table in tables])
    found = reader.table(requests)
    newest = pl.col("last").list.tail(5)
    kinds = expected.select(found.columns).with_columns(pl.col("age").cast(pl.Float64), newest)
    assert_frame_equal(found, kinds)


def test_a_field_may_be_given_for_user_context_or_candidates(reader, good):
    other = json.loads(json.dumps(good))
    hour = other["context"].pop("hour")
    for candidate in other["candidates"]:
        candidate["hour"] = hour
    other["user"]["price"] = None
    for candidate in other["candidates"]:
        del candidate["price"]
    first, second = reader.read(good, 10), reader.read(other, 10)
    table = reader.table([first, second])
    columns = [c for c in table.columns if c != "price"]
    assert_frame_equal(table[:3].select(columns), table[3:].select(columns))
    assert table["price"][3:].null_count() == 3


def test_tasks_order_and_ignored_keys(reader, good):
    good["tasks"], good["best_first"] = ["return", "view"], True
    good["candidates"][0]["day"] = "2024-01-01"  # a key of the schema besides the features
    request = reader.read(good, 10)
    assert request.tasks == [2, 0]
    assert request.best_first
    assert reader.read({**good, "tasks": []}, 10).tasks == [0, 1, 2]


def test_events_that_no_history_keeps_are_dropped_at_once(reader, good):
    """They would be repeated for each candidate."""
    other = json.loads(json.dumps(good))
    other["user"]["last"] = [*range(100_000), 3, 1, 4, 1, 5]
    good["user"]["last"] = [3, 1, 4, 1, 5]
    first, second = reader.read(other, 10), reader.read(good, 10)
    assert first.fixed["last"] == [3, 1, 4, 1, 5]
    assert_frame_equal(reader.table([first]), reader.table([second]))


FAULTS = {
    "no mapping": (lambda r: [r], "the request is a list: expected a mapping"),
    "unknown part": (lambda r: r | {"users": {}}, "unknown field 'users': did you mean 'user'?"),
    "no candidates": (lambda r: r | {"candidates": []}, "expected a list of one mapping or more"),
    "candidates no list": (lambda r: r | {"candidates": {}}, "candidates: expected a list"),
    "too many": (lambda r: r | {"candidates": r["candidates"] * 4}, "has 12 rows, at most 10"),
    "user no mapping": (lambda r: r | {"user": 5}, "user is a number: expected a mapping"),
    "absent": (lambda r: r | {"context": {}}, "lacks 'hour', and so do user and context"),
    "twice": (
        lambda r: r | {"context": r["context"] | {"city": "Graz"}},
        "context.city is given twice",
    ),
    "twice in candidates": (
        lambda r: r | {"user": r["user"] | {"book": 3}},
        "candidates[0].book is given twice",
    ),
    "unknown column": (
        lambda r: r | {"user": r["user"] | {"citi": "Graz"}},
        "user.citi is no field of the model: did you mean 'city'?",
    ),
    "text id": (
        lambda r: r | {"user": r["user"] | {"reader": "7"}},
        "user.reader is '7': expected an integer or null",
    ),
    "fraction": (
        lambda r: r | {"user": r["user"] | {"reader": 7.5}},
        "user.reader is 7.5: expected an integer",
    ),
    "wrong event": (
        lambda r: r | {"user": r["user"] | {"last": [1, "x"]}},
        "user.last is [1, 'x']: expected a list of integers",
    ),
    "infinite": (
        lambda r: r | {"user": r["user"] | {"age": float("inf")}},
        "user.age is inf: expected a finite number",
    ),
    "unknown task": (lambda r: r | {"tasks": ["like"]}, "no task 'like'; it has view, buy, return"),
    "tasks no list": (lambda r: r | {"tasks": "view"}, "tasks: expected a list of names"),
    "order": (lambda r: r | {"best_first": 1}, "best_first: expected true or false"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_request_is_refused_by_field_and_row(reader, good, fault):
    change, words = FAULTS[fault]
    with pytest.raises(GatesError) as caught:
        reader.read(change(good), 10)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.fault("video V14")
@pytest.mark.parametrize("tasks", ["", 0, 0.0, False, {}])
def test_only_null_stands_for_all_tasks(reader, good, tasks):
    assert reader.read({**good, "tasks": None}, 10).tasks == [0, 1, 2]
    with pytest.raises(GatesError, match="tasks: expected a list of names"):
        reader.read({**good, "tasks": tasks}, 10)


def test_the_faulty_row_is_named(reader, good):
    good["candidates"][2]["price"] = "cheap"
    with pytest.raises(GatesError, match=r"candidates\[2\]\.price is 'cheap'"):
        reader.read(good, 10)
