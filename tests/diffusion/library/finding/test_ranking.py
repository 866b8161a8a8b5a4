"""The k best of many products, against numpy in float64."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion.library.searcher import best, dots, exact_dots


def ranked(matrix, query, k):
    found, scores = best(dots(matrix, query), k, lambda rows: exact_dots(matrix, rows, query))
    expected = matrix.astype(np.float64) @ query.astype(np.float64)
    order = np.lexsort((np.arange(len(matrix)), -expected))[:k]
    return found, scores, order, expected


@given(st.integers(0, 300), st.integers(1, 40), st.integers(1, 12), st.integers(0, 99))
def test_exact_order(rows, dim, k, seed):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(rows, dim)).astype(np.float32)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    query = rng.normal(size=dim).astype(np.float32)
    query /= np.linalg.norm(query)
    found, scores, order, expected = ranked(matrix, query, k)
    np.testing.assert_allclose(scores, expected[order], atol=1e-12)
    np.testing.assert_array_equal(found, order)


@pytest.mark.parametrize("rows", [1 << 14, (1 << 15) + 7])
def test_blocks_and_scores_that_differ_by_less_than_float32_can_tell(rows):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(rows, 32)).astype(np.float32)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    query = matrix[5].copy()
    copies = [3, 5, 1000, rows - 1]
    matrix[copies] = query
    matrix[7] = query
    matrix[7, 0] = np.nextafter(query[0], np.float32(2 * np.sign(query[0])))
    found, _, order, _ = ranked(matrix, query, 6)
    np.testing.assert_array_equal(found, order)
    assert found[:5].tolist() == [7, *copies]


def test_rows_that_are_not_in_use_may_hold_anything():
    matrix = np.full((3, 4), np.nan, np.float32)
    matrix[1] = np.inf
    matrix[2] = 0.5
    assert dots(matrix, np.full(4, 0.5, np.float32))[2] == 1
