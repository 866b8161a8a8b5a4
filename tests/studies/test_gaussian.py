"""The Gaussian mixture of experts: golden vectors, gradients, losses of cells and the ridge."""

from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import check_grad

from studies.gaussian.gaussian_mixture import ACTIVATIONS, Mixture, gradient, likelihood
from studies.gaussian.maximum import fit, improved_experts
from studies.gaussian.rates import CASES, errors_of, slopes, started, weighted_medians
from studies.gaussian.ridge import FACTORS, ridge_map
from studies.gaussian.voronoi import cells, voronoi_loss

GOLDEN = sorted((Path(__file__).parents[1] / "golden/moe_gates").glob("gaussian_moe_*.npz"))
FIELDS = ("beta1", "beta0", "tau", "a", "b", "nu")
FREE = ("beta1", "beta0", "log_tau", "a", "b", "log_nu")


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden(request):
    with np.load(request.param) as found:
        return dict(found)


def mixture_of(golden, which):
    found = Mixture(*(golden[f"{which}_{name}"] for name in FIELDS))
    return found._replace(tau=float(found.tau))


def sample_of(golden):
    return golden["X"], golden["Y"], str(golden["activation"])


def test_there_are_golden_vectors():
    assert len(GOLDEN) == 3


def test_likelihood_and_gradient_are_those_of_the_vectors(golden):
    x, y, activation = sample_of(golden)
    start = mixture_of(golden, "init")
    found = likelihood(start, x, y, activation)
    assert found.value == pytest.approx(float(golden["init_loglik"]), abs=1e-12)
    np.testing.assert_allclose(found.responsibilities, golden["init_responsibility"], atol=1e-12)
    for name, own in zip(FREE, gradient(start, x, found, activation), strict=True):
        expected = golden[f"init_grad_{name}"]
        held = name in ("beta1", "beta0")  # of the reference
        np.testing.assert_allclose(own[:-1] if held else own, expected[:-1] if held else expected,
                                   atol=1e-12)  # fmt: skip


def test_the_maximum_is_that_of_the_vectors(golden):
    x, y, activation = sample_of(golden)
    start = mixture_of(golden, "init")
    improved = improved_experts(start, x, y, activation)
    for name in ("a", "b", "nu"):
        np.testing.assert_allclose(getattr(improved, name), golden[f"em1_{name}"], atol=1e-10)
    found = fit(start, x, y, activation)
    assert found.value == pytest.approx(float(golden["mle_loglik"]), abs=1e-6)
    assert found.slope < 1e-6
    assert found.mixture.beta1[-1] == 0
    true, best = (mixture_of(golden, which) for which in ("true", "mle"))
    assert cells(best, true).tolist() == golden["cell"].tolist()
    assert voronoi_loss(best, true) == pytest.approx(float(golden["voronoi_r1"]), abs=1e-12)
    merged = voronoi_loss(best, true, merged=True)
    assert merged == pytest.approx(float(golden["voronoi"]), abs=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gradient_by_the_gate_is_that_of_differences(activation):
    generator = np.random.default_rng(0)
    x, y = generator.uniform(-1, 1, (50, 2)), generator.standard_normal(50)
    middle = Mixture(generator.standard_normal((3, 2)), generator.standard_normal(3), 0.7,
                     generator.standard_normal((3, 2)), generator.standard_normal(3),
                     np.array([0.3, 0.5, 0.8]))  # fmt: skip

    def moved(vector):
        beta1, log_tau = vector[:6].reshape(3, 2), vector[6]
        return middle._replace(beta1=beta1, tau=float(np.exp(log_tau)))

    def value(vector):
        return likelihood(moved(vector), x, y, activation).value

    def slope(vector):
        found = likelihood(moved(vector), x, y, activation)
        by_beta1, _, by_tau, *_ = gradient(moved(vector), x, found, activation)
        return np.append(by_beta1.ravel(), by_tau)

    place = np.append(middle.beta1.ravel(), np.log(middle.tau))
    assert check_grad(value, slope, place) < 1e-6


def test_a_mixture_is_no_distance_from_itself_and_merged_atoms_count_by_their_powers():
    true = CASES["tanh"].truth
    assert voronoi_loss(true, true) == 0
    twice = started(CASES["tanh-k3"], 0.0, np.random.default_rng(0))
    assert voronoi_loss(twice, true) == pytest.approx(0, abs=1e-12)
    apart = twice._replace(b=twice.b + np.array([0.1, -0.1, 0.0]))
    weight = true.weights[0]
    assert voronoi_loss(apart, true) == pytest.approx(weight * 0.1)
    assert voronoi_loss(apart, true, merged=True) == pytest.approx(weight * 0.1**4)


def test_only_the_identity_has_a_ridge():
    middle = len(FACTORS) // 2
    for name, flat in (("identity", True), ("tanh", False)):
        lost = ridge_map(CASES[name], num=500)
        assert (lost[middle, middle], np.abs(np.diagonal(lost)).max() < 1e-10) == (0, flat)
        assert lost[0, -1] < -1e-3


def test_starts_are_paired_across_sizes_and_samples_are_not():
    case = CASES["identity"]
    both = errors_of(case, [100, 200], 0.3, repeat=1)
    alone = errors_of(case, [200], 0.3, repeat=1)
    np.testing.assert_array_equal(both["errors"][1], alone["errors"][0])
    assert both["errors"].shape == (2, 9)
    assert (both["slope"] < 1e-6).all()


def test_slopes_are_those_of_a_power_law():
    sizes = [10, 100, 1000]
    errors = np.stack([[[size**-0.5, 2.0 * size**-1] for size in sizes]] * 5)
    found = slopes(errors, sizes, ["slow", "fast"])(np.ones((1, 5)))
    assert (found["slow"][0], found["fast"][0]) == (pytest.approx(-0.5), pytest.approx(-1))


def test_medians_count_what_was_drawn():
    values = np.array([3.0, 1.0, 2.0, 4.0])
    weights = np.array([[1, 1, 1, 1], [0, 3, 0, 1], [2, 0, 0, 2]], dtype=float)
    assert weighted_medians(values, weights).tolist() == [2.5, 1.0, 3.5]
