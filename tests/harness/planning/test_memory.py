import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.planning import Table, exchange_of_rank, memory_of_rank

TABLES = [Table(rows=1000, dim=16, lookups=3), Table(rows=10, dim=4, lookups=50)]


def test_memory_has_its_closed_form():
    found = memory_of_rank(500, TABLES, 100.0, ranks=4, batch_size=8)
    assert found.weights == found.gradients == 2000
    assert (found.adam, found.tables) == (4000, (1000 * 16 + 10 * 4) * 4 / 4)
    assert found.adagrad == 1010 * 4 / 4
    assert found.table_gradients == 8 * (3 * (16 * 4 + 8) + 50 * (4 * 4 + 8))
    assert (found.activations, found.total) == (800, sum(found))


def test_exchange_has_its_closed_form():
    found = exchange_of_rank(500, TABLES, ranks=4, batch_size=8)
    assert found.ids == 8 * 53 * 8 * 3 / 4
    assert found.vectors == found.gradients == 8 * (3 * 16 + 50 * 4) * 4 * 3 / 4
    assert (found.all_to_all, found.dense) == (found.ids + 2 * found.vectors, 2 * 3 / 4 * 500 * 4)
    half = exchange_of_rank(500, TABLES, ranks=4, batch_size=8, distinct=0.5)
    assert (half.all_to_all, half.dense) == (found.all_to_all / 2, found.dense)


def test_one_rank_sends_nothing():
    assert exchange_of_rank(500, TABLES, ranks=1, batch_size=8).total == 0


@given(st.integers(1, 512), st.integers(1, 4096))
def test_all_ranks_together_hold_every_row_once(ranks, batch_size):
    found = memory_of_rank(7, TABLES, 1.0, ranks=ranks, batch_size=batch_size)
    assert found.tables * ranks == pytest.approx(4 * (1000 * 16 + 10 * 4))
    more = exchange_of_rank(7, TABLES, ranks=ranks + 1, batch_size=batch_size)
    fewer = exchange_of_rank(7, TABLES, ranks=ranks, batch_size=batch_size)
    assert more.total > fewer.total


@pytest.mark.parametrize("wrong", [{"ranks": 0}, {"batch_size": 0}, {"distinct": 0.0}])
def test_numbers_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        exchange_of_rank(1, TABLES, **{"ranks": 1, "batch_size": 1} | wrong)
