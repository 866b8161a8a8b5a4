import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core_gates.errors import GatesError
from video_multitask.scorer import FusedScore, Fusion, fusion_of

TASKS = ("view", "like", "skip")


@given(
    st.lists(st.lists(st.floats(0.001, 1), min_size=3, max_size=3), min_size=1, max_size=9),
    st.tuples(st.floats(0.1, 3), st.floats(0.1, 3), st.floats(-2, -0.1)),
)
def test_the_score_is_the_product_of_powers(rows, beta):
    fused = FusedScore(TASKS, dict(zip(TASKS, beta, strict=True)), {"like": 0.5, "skip": 0.2})
    found = fused(torch.tensor(rows, dtype=torch.float64))
    for score, (view, like, skip) in zip(found.tolist(), rows, strict=True):
        wanted = view ** beta[0] * (0.5 + like) ** beta[1] * (0.2 + skip) ** beta[2]
        assert math.isclose(score, wanted, rel_tol=1e-6)
    ranked = [found[k] for k in fused.rank(torch.tensor(rows, dtype=torch.float64)).tolist()]
    assert ranked == sorted(ranked, reverse=True)


def test_a_probability_of_zero_vetoes_unless_offset():
    p = torch.tensor([[0.0, 0.9, 0.0], [0.1, 0.1, 0.0]])
    assert FusedScore(TASKS, {"view": 1.0, "like": 1.0})(p).tolist() == pytest.approx([0.0, 0.01])
    assert FusedScore(TASKS, {"view": 1.0, "like": 1.0}, {"view": 1.0}).rank(p).tolist() == [0, 1]


def test_tasks_without_exponent_do_not_count_and_ties_keep_their_order():
    p = torch.tensor([[0.5, 0.0, 0.3], [0.5, 1.0, 0.9], [0.7, 0.2, 0.1]])
    assert FusedScore(TASKS, {"view": 2.0}).rank(p).tolist() == [2, 0, 1]
    assert FusedScore(TASKS, {"view": 2.0}).rank(p, top=1).tolist() == [2]
    assert FusedScore(TASKS, {"view": 2.0})(p).tolist() == pytest.approx([0.25, 0.25, 0.49])


def test_many_small_probabilities_do_not_underflow():
    fused = FusedScore(TASKS, {"view": 20.0, "like": 20.0})
    p = torch.tensor([[1e-3, 1e-3, 0.0], [2e-3, 1e-3, 0.0]])
    assert (fused(p).tolist(), fused.rank(p).tolist()) == ([0.0, 0.0], [1, 0])


@pytest.mark.parametrize(
    ("exponents", "offsets", "message"),
    [
        ({"click": 1.0}, {}, "names click; the tasks are view, like, skip"),
        ({"view": 1.0}, {"hate": 0.1}, "names hate; the tasks are"),
        ({}, {}, "needs an exponent other than 0"),
        ({"skip": -1.0}, {}, "skip has the exponent -1.0 and no offset"),
        ({"view": 1.0}, {"view": -0.1}, "offset of view must not be negative"),
    ],
)
def test_wrong_settings_are_refused(exponents, offsets, message):
    with pytest.raises(ValueError, match=message):
        FusedScore(TASKS, exponents, offsets)


def test_another_number_of_tasks_is_refused():
    with pytest.raises(GatesError, match="got probabilities of 2 tasks, the fused score has 3"):
        FusedScore(TASKS, {"view": 1.0})(torch.rand(4, 2))


def test_scores_are_products_of_powers():
    fusion = Fusion(("like", "hate", "view"), {"hate": -3.0, "like": 2.0}, {"hate": 0.5})
    p = np.array([[0.1, 0.2, 0.9], [0.5, 0.0, 0.1]], np.float32)
    np.testing.assert_allclose(fusion(p), [0.1**2 * 0.7**-3, 0.5**2 * 0.5**-3], rtol=1e-6)
    assert fusion.settings == {"exponents": {"hate": -3.0, "like": 2.0}, "offsets": {"hate": 0.5}}


def test_no_exponent_is_no_score():
    assert fusion_of(("like",), None, None) is None
    assert fusion_of(("like",), {}, {}) is None
    with pytest.raises(GatesError, match="name the exponents by --fused"):
        fusion_of(("like",), None, {"like": 1.0})


@pytest.mark.parametrize(
    ("exponents", "offsets", "words"),
    [
        ({"lik": 1.0}, None, "names lik; the tasks are like"),
        ({"like": math.inf}, None, "finite"),
        ({"like": 1.0}, {"like": -1.0}, "must not be negative"),
        ({"like": 1.0}, {"like": math.nan}, "finite"),
        ({"like": -1.0}, None, "infinite score"),
        ({"like": 1e300}, None, "finite"),
        ({"like": 400.0}, {"like": 10.0}, r"can exceed 2e\+308"),
        ({"like": -400.0}, {"like": 0.1}, "choose smaller ones"),
    ],
)
def test_what_makes_no_score_is_refused(exponents, offsets, words):
    with pytest.raises(GatesError, match=words):
        Fusion(("like",), exponents, offsets)


def test_large_exponents_that_cannot_overflow_are_taken():
    fusion = Fusion(("like",), {"like": 1e6}, None)
    assert fusion(np.array([[0.5], [1.0]], np.float32)).tolist() == [0.0, 1.0]
