"""Training steps with tables of different sizes, and with dense gradients.

The ranker has 29 features of 16 numbers and the cheapest network, SharedBottom: with any other the
tables matter less.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.comparison import Call, Comparison, Load

BATCH, FEATURES, DIM, TASKS = 4096, 29, 16, 8
LARGE = 3  # features with the large table
SIZES = {"10^5 rows": 10**5, "10^6 rows": 10**6, "10^7 rows": 10**7}
SIZE_BAR = 1.1
DENSE_ROWS = 2 * 10**6
BATCHES = 8


def comparisons() -> Iterator[Comparison]:
    """All comparisons of embedding tables; on one CPU thread."""
    yield table_sizes()
    yield touched_rows()


def table_sizes() -> Comparison:
    """Return a training step of the same batches with tables of 10^5 to 10^7 rows."""

    def build(load: Load) -> Mapping[str, Call]:
        return {name: _training(load, rows) for name, rows in SIZES.items()}

    return Comparison(
        name="training step by rows of the largest tables",
        op="embedding",
        build=build,
        baseline="10^5 rows",
        bars=dict.fromkeys(list(SIZES)[1:], SIZE_BAR),
        unit="step",
        memory=4.0 * 1.5 * LARGE * DIM * sum(SIZES.values()),
        single_calls=3,
    )


def touched_rows() -> Comparison:
    """Return a step of row-wise Adagrad on touched rows, and of Adam on whole tables."""

    def build(load: Load) -> Mapping[str, Call]:
        return {
            "fused Adam, whole tables": _table_step(load, sparse=False),
            "row-wise Adagrad, touched rows": _table_step(load, sparse=True),
        }

    return Comparison(
        name=f"gather, gradient and update of {DENSE_ROWS:,} rows",
        op="embedding",
        build=build,
        baseline="fused Adam, whole tables",
        unit="step",
        memory=4.0 * 8 * DENSE_ROWS * DIM,
    )


def _training(load: Load, rows: int) -> Call:
    """Return training steps that take the batches one after the other."""
    ranker = _ranker(load, rows)
    adagrad = load("recsys.embedding.row_wise_adagrad").RowWiseAdagrad(ranker.tables())
    adam = torch.optim.Adam(ranker.dense_parameters(), fused=True)
    batches, labels = _batches(rows), torch.rand(BATCH, TASKS).round()
    dense = torch.randn(BATCH, ranker.dense_width)
    step = 0

    def call() -> None:
        nonlocal step
        step += 1
        logits = ranker(batches[step % BATCHES], dense)
        loss = F.binary_cross_entropy_with_logits(logits, labels)
        adagrad.zero_grad()
        adam.zero_grad()
        loss.backward()
        adagrad.step()
        adam.step()

    return call


def _ranker(load: Load, rows: int) -> Any:
    schema = load("recsys.schema")
    names = [f"f{i}" for i in range(FEATURES)]
    features = schema.FeatureSchema(
        tasks=tuple(schema.Task(f"t{i}") for i in range(TASKS)),
        sparse=tuple(schema.Sparse(name) for name in names),
        dim=DIM,
    )
    sizes = {name: rows if i < LARGE else 1000 for i, name in enumerate(names)}
    torch.manual_seed(0)
    options = {"hidden_dims": [256, 128], "tower_dims": [64]}
    return load("recsys.ranker").Ranker.build(features, sizes, 0, "SharedBottom", options)


def _batches(rows: int) -> list[Tensor]:
    """Return row numbers (BATCH, FEATURES), those of the large tables skewed as real ones are."""
    draw = torch.Generator().manual_seed(1)
    sizes = torch.tensor([rows if i < LARGE else 1000 for i in range(FEATURES)])
    shape = (BATCHES, BATCH, FEATURES)
    return list((torch.rand(shape, generator=draw) ** 3 * sizes).long())


def _table_step(load: Load, *, sparse: bool) -> Call:
    table = torch.nn.Embedding(DENSE_ROWS, DIM, sparse=sparse)
    kind = load("recsys.embedding.row_wise_adagrad").RowWiseAdagrad
    optimizer = kind([table.weight]) if sparse else torch.optim.Adam([table.weight], fused=True)
    draw = torch.Generator().manual_seed(1)
    rows = (torch.rand(BATCH, FEATURES, generator=draw) ** 3 * DENSE_ROWS).long()
    grad = torch.randn(BATCH, FEATURES, DIM, generator=draw)

    def call() -> None:
        optimizer.zero_grad()
        table(rows).backward(grad)
        optimizer.step()

    return call
