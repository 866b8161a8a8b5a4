import math

import numpy as np
import pytest

from apps.video.serving.fusion import Fusion, fusion_of
from core_gates.errors import GatesError


def test_scores_are_products_of_powers():
    fusion = Fusion(("like", "hate", "view"), {"hate": -3.0, "like": 2.0}, {"hate": 0.5})
    p = np.array([[0.1, 0.2, 0.9], [0.5, 0.0, 0.1]], np.float32)
    expected = [0.1**2 * 0.7**-3, 0.5**2 * 0.5**-3]
    np.testing.assert_allclose(fusion(p), expected, rtol=1e-6)
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
