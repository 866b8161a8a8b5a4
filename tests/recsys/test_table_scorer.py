import numpy as np
import polars as pl
import pytest
import torch

from core_gates.errors import GatesError
from recsys.model_folder import load_model
from recsys.table_scorer import TableScorer


@pytest.fixture(scope="module", params=["mean", "transformer"])
def folder(request, shop, tmp_path_factory):
    return shop.write_model(tmp_path_factory.mktemp("model") / "shop", encoder=request.param)


def expected(loaded, table):
    batch = loaded.transform.batch(table)
    with torch.no_grad():
        return loaded.ranker(batch.sparse, batch.dense, batch.sequences).sigmoid().numpy()


@pytest.mark.parametrize("block_rows", [1, 7, 4096])
@pytest.mark.parametrize("owned", [False, True])
def test_probabilities_are_those_of_the_ranker(shop, folder, block_rows, owned):
    loaded, table = load_model(folder), shop.rows(50, 3)
    right = expected(loaded, table)
    scorer = TableScorer(loaded.ranker, loaded.transform, block_rows=block_rows, owned=owned)
    found = scorer.score(table.drop(shop.TASKS))
    np.testing.assert_allclose(found.probabilities, right, atol=1e-6)
    assert right.std(0).min() > 0.01
    np.testing.assert_array_equal(found.unknown, loaded.transform.encode(table).sparse == 0)
    assert found.unknown.any()


@pytest.mark.parametrize("block_rows", [1, 10, 4096])
def test_lists_give_what_rows_give(shop, folder, block_rows):
    loaded = load_model(folder)
    scorer = TableScorer(loaded.ranker, loaded.transform, block_rows=block_rows)
    lists = [shop.as_table(shop.rows(n, n)) for n in (9, 1, 4, 12)]
    table = lists[0].vstack(lists[1]).vstack(lists[2]).vstack(lists[3])
    found = scorer.score(table, [len(rows) for rows in lists])
    np.testing.assert_allclose(found.probabilities, scorer.score(table).probabilities, atol=1e-6)


def test_no_rows_give_no_rows_and_faults_are_named(shop, folder):
    loaded = load_model(folder)
    scorer = TableScorer(loaded.ranker, loaded.transform)
    assert scorer.score(shop.rows(3).clear()).probabilities.shape == (0, 3)
    with pytest.raises(GatesError, match="lacks 'book'"):
        scorer.score(shop.rows(3).drop("book"))
    with pytest.raises(ValueError, match="block_rows"):
        TableScorer(loaded.ranker, loaded.transform, block_rows=0)


@pytest.mark.parametrize("lists", [[5], [5, 6], [13], [-1, 13], [0, 12]])
def test_lists_that_are_not_all_rows_are_refused(shop, folder, lists):
    loaded = load_model(folder)
    scorer = TableScorer(loaded.ranker, loaded.transform)
    with pytest.raises(GatesError, match="expected 12 rows in all, at least one in each"):
        scorer.score(shop.as_table(shop.rows(12)), lists)


@pytest.mark.parametrize("name", ["reader", "city", "age", "last"])
def test_lists_of_several_users_are_refused(shop, folder, name):
    loaded = load_model(folder)
    scorer = TableScorer(loaded.ranker, loaded.transform)
    table = shop.as_table(shop.rows(12))
    values = table[name].to_list()
    values[7] = next(v for v in shop.rows(50)[name].to_list() if v and v != values[0])
    changed = table.with_columns(pl.Series(name, values, table[name].dtype))
    with pytest.raises(GatesError, match=rf"row 7 differs in '{name}( missing)?' from the row bef"):
        scorer.score(changed, [5, 7])
    scorer.score(changed, [7, 1, 4])
    scorer.score(changed[:1], [1])
