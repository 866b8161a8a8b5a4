import polars as pl
import pytest
import torch

from recsys.data import datamodule
from recsys.data.datamodule import PackedRows
from recsys.inputs import Batch
from recsys.schema import FeatureSchema, History, Sparse, Task
from recsys.transform import FeatureTransform


@pytest.fixture
def batch():
    return Batch(
        torch.arange(12).reshape(6, 2),
        torch.rand(6, 3),
        (torch.arange(24).reshape(6, 4),),
        torch.tensor([[0.0], [1], [1], [0], [1], [0]]),
        torch.tensor([[True], [False]] * 3),
        torch.rand(6),
        torch.arange(6) + 2**40,
    )


def equal(one, other):
    for a, b in zip(
        [*one.plain(), *one.sequences], [*other.plain(), *other.sequences], strict=True
    ):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [slice(1, 4), torch.tensor([5, 0, 0]), slice(None)], ids=str)
@pytest.mark.parametrize("narrow", [True, False])
def test_rows_come_back_as_they_were(batch, rows, narrow):
    equal(PackedRows(batch, narrow=narrow).take(rows), batch.take(rows))


def test_they_take_less_memory(batch):
    wide = sum(t.numel() * t.element_size() for t in [*batch.plain(), *batch.sequences])
    stored = PackedRows(batch)
    assert stored.bytes == wide - 12 * 4 - 24 * 4 - 6 * 3
    assert len(stored) == 6
    assert torch.equal(stored.user, batch.user)


def test_chunks_join_without_seams(monkeypatch):
    schema = FeatureSchema((Task("y"),), (Sparse("a"),), sequences=(History("h", of="a"),))
    table = pl.DataFrame(
        {"a": [1, 2, 3, 1, 2], "h": [[1], [], [2, 3], None, [1]], "y": [0, 1] * 2 + [1]}
    )
    transform = FeatureTransform(schema).fit(table)
    whole = transform.batch(table)
    monkeypatch.setattr(datamodule, "CHUNK", 2)
    equal(PackedRows.of(table, transform).take(slice(None)), whole)
    assert whole.user.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.fault("video R1")
def test_rows_without_a_user_stay_apart_where_tables_are_joined(batch):
    """Row n of each table has the number -1 - n, such as that of each fold of a comparison."""
    one = batch.replace(user=torch.tensor([7, -2, -3, 8, -5, 7]))
    joined = Batch.cat([one, one.take(slice(0, 3)), one])
    known = joined.user[joined.user >= 0]
    assert known.tolist() == [7, 8, 7, 7, 7, 8, 7]
    assert len(joined.user[joined.user < 0].unique()) == 3 + 2 + 3
    equal(Batch.cat([batch, batch]).take(slice(6, 12)), batch)
