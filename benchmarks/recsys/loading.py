"""Rows from memory in shuffled batches, next to torch-rechub, and the encoding of raw tables.

29 columns of table rows, 4 dense numbers and 8 labels, batches of 4,096 rows. torch-rechub is given
encoded columns as well; its loader makes a dictionary per row and stacks them. Raw tables have 5
columns of integers, 2 of strings and 3 of numbers, with up to 100,000 values.
"""

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import polars as pl
import torch

from benchmarks.comparison import Call, Comparison, Load

FIELDS, NUMBERS, TASKS, BATCH = 29, 4, 8, 4096
ABSENT = "torch-rechub is not installed: pip install 'gatesuite[bench]'"
ROWS = {"ours": 2**18, "torch-rechub": 2**13}
BARS = {"ours": 1 / 20}
CANDIDATES, BULK = 500, 2**17
VALUES = (50, 1000, 10_000, 50_000, 100_000)


def comparisons() -> Iterator[Comparison]:
    """An epoch of a loader, and the encoding of a table; on one CPU thread."""
    yield epoch()
    yield encoding()


def epoch() -> Comparison:
    """Return an epoch of shuffled rows of theirs and of ours."""

    def build(load: Load) -> Mapping[str, Call]:
        calls = {"ours": _read_all(_our_loader(load))}
        if _is_installed():
            calls["torch-rechub"] = _read_all(_their_loader())
        return calls

    return Comparison(
        name=f"epoch of a loader, batch {BATCH}",
        op="recsys_loader",
        build=build,
        baseline="torch-rechub",
        bars=BARS if _is_installed() else {},
        units={name: float(rows) for name, rows in ROWS.items()},
        unit="row",
        rate="rows/s",
        absent={} if _is_installed() else {"torch-rechub": ABSENT},
    )


def encoding() -> Comparison:
    """Return the encoding of many rows at once, and of the candidates of one request."""

    def build(load: Load) -> Mapping[str, Call]:
        table = _raw_table()
        transform = _transform(load).fit(table)
        few = table[:CANDIDATES]
        return {
            "many rows": lambda: transform.encode(table),
            f"{CANDIDATES} candidates": lambda: transform.encode(few),
        }

    return Comparison(
        name=f"encoding of a table of {len(VALUES) + 5} columns",
        op="recsys_encode",
        build=build,
        baseline="many rows",
        units={"many rows": float(BULK), f"{CANDIDATES} candidates": float(CANDIDATES)},
        unit="row",
        rate="rows/s",
    )


def _is_installed() -> bool:
    return importlib.util.find_spec("torch_rechub") is not None


def _read_all(loader: Any) -> Call:
    def call() -> int:
        return sum(1 for _ in loader)

    return call


def _columns(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, 2, (rows, TASKS)).float()
    return torch.randint(0, 1000, (rows, FIELDS)), torch.rand(rows, NUMBERS), labels


def _our_loader(load: Load) -> Any:
    rows = ROWS["ours"]
    sparse, dense, labels = _columns(rows)
    batch = load("recsys.inputs").Batch(
        sparse,
        dense,
        (),
        labels,
        torch.ones(rows, TASKS, dtype=torch.bool),
        torch.ones(rows),
        torch.arange(rows),
    )
    packed = load("recsys.data.datamodule").PackedRows(batch)
    return load("recsys.data.datamodule").TrainingLoader(packed, BATCH)


def _their_loader() -> Any:
    sparse, dense, labels = _columns(ROWS["torch-rechub"])
    columns = {f"s{i}": column.numpy() for i, column in enumerate(sparse.unbind(1))}
    columns |= {f"d{i}": column.numpy() for i, column in enumerate(dense.unbind(1))}
    first_row = {name: column[:1] for name, column in columns.items()}
    y, y1 = labels.numpy(), labels[:1].numpy()
    data: Any = importlib.import_module("torch_rechub.utils.data")
    made = data.DataGenerator(columns, y)
    loaders = made.generate_dataloader(
        x_val=first_row, y_val=y1, x_test=first_row, y_test=y1, batch_size=BATCH, num_workers=0
    )
    return loaders[0]


def _raw_table() -> pl.DataFrame:
    draw = np.random.default_rng(0)
    columns: dict[str, Any] = {
        f"i{k}": draw.integers(0, values, BULK) for k, values in enumerate(VALUES)
    }
    for k, values in enumerate((VALUES[0], VALUES[-1])):
        columns[f"t{k}"] = pl.Series(draw.integers(0, values, BULK)).cast(pl.String)
    columns |= {f"n{k}": draw.lognormal(size=BULK) for k in range(3)}
    return pl.DataFrame(columns)


def _transform(load: Load) -> Any:
    schema = load("recsys.schema")
    sparse = [*(f"i{k}" for k in range(len(VALUES))), "t0", "t1"]
    return load("recsys.transform").FeatureTransform(
        schema.FeatureSchema(
            tasks=(schema.Task("clicked"),),
            sparse=tuple(map(schema.Sparse, sparse)),
            dense=tuple(schema.Dense(f"n{k}") for k in range(3)),
        )
    )
