"""Measures of a search, likeness of adapters, and BM25."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.evaluation.retrieval_scores import (
    BM25,
    chance,
    closeness,
    search_values,
)

TEXTS = ["red cat", "cat cat dog", "", "a long text about one red house and no animal"]


def test_the_formula_by_hand():
    scores = BM25(TEXTS, k1=1.2, b=0.75).scores("Cat?")
    mean = (2 + 3 + 0 + 10) / 4
    idf = math.log(1 + (4 - 2 + 0.5) / 2.5)
    expected = [
        idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * length / mean))
        for tf, length in ((1, 2), (2, 3), (0, 0), (0, 10))
    ]
    np.testing.assert_allclose(scores, expected)


@pytest.mark.parametrize("texts", [[""], ["", ""], TEXTS])
def test_without_a_common_word_all_are_zero(texts):
    assert BM25(texts).scores("unicorn").tolist() == [0] * len(texts)
    assert BM25(texts).scores("").tolist() == [0] * len(texts)


def test_words_are_letters_and_digits_in_lower_case():
    assert BM25(["Red-Cat, 2x!"]).scores("2X cat") > BM25(["Red-Cat, 2x!"]).scores("2X cats") > 0


seeds = st.integers(0, 2**31)


def test_one_right_adapter():
    scores = np.array([[0.9, 0.5, 0.1, 0.3], [0.1, 0.5, 0.9, 0.3]])
    values = search_values(scores, np.array([[0, 1, 0, 0], [0, 0, 1, 0]], bool), ks=(1, 2, 10))
    assert (values["recall@1"].tolist(), values["recall@2"].tolist()) == ([0, 1], [1, 1])
    assert (values["recall@10"].tolist(), values["mrr"].tolist()) == ([1, 1], [0.5, 1])


def test_several_right_adapters():
    scores, relevant = np.array([[4.0, 3, 2, 1]]), np.array([[0, 1, 0, 1]], bool)
    values = search_values(scores, relevant, ks=(1, 2, 4))
    assert [values[f"recall@{k}"][0] for k in (1, 2, 4)] == [0, 0.5, 1]
    assert values["mrr"].tolist() == [0.5]


def test_equal_scores_are_at_chance():
    relevant = np.eye(20, dtype=bool)
    values = search_values(np.zeros((20, 20)), relevant)
    expected = chance(relevant)
    for name in values:
        assert values[name].mean() == pytest.approx(expected[name].mean(), abs=0.05)
    assert expected["recall@1"].tolist() == [0.05] * 20


@given(seed=seeds, count=st.integers(2, 7), right=st.integers(1, 3))
@settings(max_examples=20)
def test_chance_is_the_mean_over_random_orders(seed, count, right):
    generator = np.random.default_rng(seed)
    relevant = np.tile(np.arange(count) < min(right, count), (4000, 1))
    found = search_values(generator.random(relevant.shape), relevant, ks=(1, 3))
    for name, value in chance(relevant[:1], ks=(1, 3)).items():
        assert found[name].mean() == pytest.approx(value[0], abs=0.035)


def test_scores_that_say_nothing(one_line):
    right = np.eye(2, dtype=bool)
    assert "NaN" in one_line(ValueError, search_values, np.full((2, 2), np.nan), right)
    assert "no right" in one_line(ValueError, search_values, np.ones((2, 2)), ~right & False)
    assert "one (Q, N)" in one_line(ValueError, search_values, np.ones((2, 3)), right)


def test_cosines_within_and_between_concepts():
    first, second = torch.tensor([[1.0, 0], [3.0, 4]]), torch.tensor([[2.0, 0], [0, 1.0]])
    found = closeness(first, second)
    for name, values in {"intra": [1, 0.8], "inter": [0, 0.6], "gap": [1, 0.2]}.items():
        np.testing.assert_allclose(found[name], values, atol=1e-7)
