import polars as pl
import pytest

from recsys.schema import Crossed, Dense, FeatureSchema, History, Sparse, Task


@pytest.fixture
def schema():
    return FeatureSchema(
        tasks=(Task("bought"), Task("liked", mask="bought")),
        sparse=(
            Sparse("reader", side="user"),
            Sparse("book", min_count=2, side="item"),
            Sparse("shop", storage="hash", buckets=50),
        ),
        dense=(Dense("price"), Dense("pages", scaling="standardize"), Dense("age", "buckets", 4)),
        sequences=(History("read", of="book", max_length=3),),
        crossed=(Crossed(("reader", "book"), buckets=100),),
        user="reader",
        time="day",
        weight="weight",
    )


@pytest.fixture
def table():
    return pl.DataFrame(
        {
            "day": [1, 2, 3, 4, 5, 6],
            "reader": ["ann", "bob", "ann", None, "ann", ""],
            "book": [11, 12, 11, 12, 13, -1],
            "shop": [1, 2, 3, 1, 2, None],
            "price": [0.0, 9.0, 99.0, None, float("inf"), float("nan")],
            "pages": [100, 300, 200, 200, None, 200],
            "age": [1.0, 2.0, 3.0, 4.0, 5.0, None],
            "read": [[], [11], [11, 12, 99], [12, 11, 11, 12], None, [None, 12]],
            "bought": [1, 0, 1, 0, 1, 0],
            "liked": [1, None, 0, None, 1, None],
            "weight": [1.0, 2.0, 0.0, 1.0, 1.0, 1.0],
        }
    )
