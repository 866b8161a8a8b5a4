import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from harness.evidence import holm


def test_holm_of_a_known_example():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])


probabilities = st.lists(st.floats(0, 1), min_size=1, max_size=12)


@given(probabilities)
def test_holm_lies_between_no_correction_and_bonferroni(p):
    found = holm(p)
    assert (found >= np.array(p)).all()
    assert (found <= np.minimum(1, len(p) * np.array(p))).all()
    order = np.argsort(p, kind="stable")
    assert (np.diff(found[order]) >= 0).all()


@given(probabilities)
def test_what_was_not_compared_does_not_count(p):
    found = holm([np.nan, *p, np.nan])
    assert np.isnan(found[[0, -1]]).all()
    np.testing.assert_array_equal(found[1:-1], holm(p))


def test_holm_of_nothing_and_of_nonsense(refuses):
    assert holm([]).shape == (0,)
    assert np.isnan(holm([np.nan])).all()
    refuses(ValueError, ("between 0 and 1", lambda: holm([0.1, 1.5])))
