"""A shop's log with every kind of column, and an untrained model of it."""

import numpy as np
import polars as pl
import torch

from recsys.model_folder import save_model
from recsys.ranker import Ranker
from recsys.schema import Crossed, Dense, FeatureSchema, History, Sparse, Task
from recsys.transform import FeatureTransform

USER = ("reader", "city", "age", "last")
CONTEXT = ("hour",)
ITEM = ("book", "author", "price")
TASKS = ("view", "buy", "return")


def schema(encoder="mean"):
    """User, item and context columns; strings, integers, numbers, a history and a cross."""
    return FeatureSchema(
        tasks=tuple(Task(name, category="read" if name == "view" else "pay") for name in TASKS),
        sparse=(
            Sparse("reader", side="user"),
            Sparse("city", side="user", dim=2),
            Sparse("book", side="item"),
            Sparse("author", side="item", storage="hash", buckets=20),
            Sparse("hour", dim=2),
        ),
        dense=(
            Dense("age", side="user"),
            Dense("price", side="item", scaling="buckets", buckets=4),
        ),
        sequences=(History("last", of="book", max_length=5, encoder=encoder),),
        crossed=(Crossed(("city", "hour"), buckets=30, dim=2),),
        dim=4,
        user="reader",
        item="book",
        time="day",
    )


def rows(number, seed=0):
    """Rows of the log, some values missing, some never seen in training."""
    draw = np.random.default_rng(seed)

    def some(values, missing=0.1):
        return [v if draw.random() > missing else None for v in values.tolist()]

    lengths = draw.integers(0, 8, number)
    return pl.DataFrame(
        {
            "day": pl.Series(draw.integers(1, 30, number)),
            "reader": pl.Series(some(draw.integers(0, 50 + seed, number), 0.05), dtype=pl.Int64),
            "city": pl.Series(some(draw.choice(["Graz", "Linz", "Wien", "Lech"], number))),
            "age": pl.Series(some(draw.integers(10, 90, number)), dtype=pl.Int64),
            "last": pl.Series([draw.integers(0, 80, n).tolist() for n in lengths]),
            "hour": pl.Series(draw.integers(0, 24, number)),
            "book": pl.Series(draw.integers(0, 80 + seed, number)),
            "author": pl.Series(some(draw.choice(["A. B.", "C, D", 'E "F"', "Ö"], number))),
            "price": pl.Series(some(draw.gamma(2.0, 9.0, number).round(2)), dtype=pl.Float64),
        }
        | {name: pl.Series(draw.integers(0, 2, number)) for name in TASKS}
    )


def write_model(folder, seed=0, encoder="mean"):
    """Write an untrained model whose weights and running statistics matter."""
    transform = FeatureTransform(schema(encoder)).fit(rows(500))
    torch.manual_seed(seed)
    options = {"dim": 8, "hidden_dims": [16], "rank": 4, "tower_dims": [8]}
    sizes = (transform.sizes, transform.dense_width)
    ranker = Ranker.build(transform.schema, *sizes, "HoME", options)
    with torch.no_grad():
        for table in ranker.tables():
            table.normal_()
        for weight in ranker.net.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
        ranker.train()
        for part in range(3):
            batch = transform.batch(rows(200, part))
            ranker(batch.sparse, batch.dense, batch.sequences)
    return save_model(folder, ranker.eval(), transform, {"settings": {"seed": seed}})


def request(table, **further):
    """Rows of one user as a request: user and context of the first row, all candidates."""
    first = table.row(0, named=True)
    return {
        "user": {name: first[name] for name in USER},
        "context": {name: first[name] for name in CONTEXT},
        "candidates": table.select(ITEM).to_dicts(),
        **further,
    }


def as_table(table):
    """The rows that :func:`request` asks for."""
    first = table[[0] * len(table)]
    return first.with_columns(table[name] for name in ITEM)
