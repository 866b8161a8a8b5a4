"""Okapi BM25."""

import math

import numpy as np
import pytest

from diffusion.evaluation.retrieval_scores import BM25, words

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


def test_rare_words_weigh_more_and_words_add_up():
    rivals = BM25(TEXTS)
    assert rivals.scores("dog")[1] > BM25([*TEXTS, "dog", "dog"]).scores("dog")[1]
    np.testing.assert_allclose(
        rivals.scores("red dog"), rivals.scores("red") + rivals.scores("dog")
    )


@pytest.mark.parametrize("texts", [[""], ["", ""], TEXTS])
def test_without_a_common_word_all_are_zero(texts):
    assert BM25(texts).scores("unicorn").tolist() == [0] * len(texts)
    assert BM25(texts).scores("").tolist() == [0] * len(texts)


def test_words_are_letters_and_digits_in_lower_case():
    assert words("Red-Cat, 2x!") == ["red", "cat", "2x"]
