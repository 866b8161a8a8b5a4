import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from weather.baselines.letkf import LETKF, ensemble_weights, relax_to_prior_spread
from weather.grid import gaussian_grid, great_circle_km
from weather.metrics import rmse
from weather.observations.gridded import GriddedObservations
from weather.observations.simulated import observe

EXACT = {"rtol": 0, "atol": 1e-9}


def test_golden(golden_filter):
    vectors, grid, observations = golden_filter
    method = LETKF(
        grid,
        8,
        localization_km=vectors["letkf_c_km"].item(),
        inflation=vectors["infl"].item(),
        inflate_unobserved=True,
    )
    analysis = method.analyze(vectors["X"].T.reshape(1, 8, 1, 6, 10), observations)
    assert_close(analysis.reshape(8, 60).T, vectors["letkf_Xa"], **EXACT)


def test_without_localization_it_is_the_global_filter(problem, grid, etkf):
    background, observations = problem(timelines=2, members=5)
    analysis = LETKF(grid, 5, inflation=1.2).analyze(background, observations)
    for line in range(2):
        states, mask = background[line].flatten(1), observations.mask[line].flatten()
        values, errors = (part[line].flatten()[mask] for part in observations)
        expected = etkf(states, states[:, mask], values, errors, inflation=1.2)
        assert_close(analysis[line].flatten(1), expected, **EXACT)


def test_channels_may_be_permuted(problem, grid):
    background, observations = problem(members=5, channels=3)
    order = torch.tensor([2, 0, 1])
    method = LETKF(grid, 5, localization_km=4000.0)
    analysis = method.analyze(background, observations)
    permuted = GriddedObservations(*(part[:, order] for part in observations))
    assert_close(method.analyze(background[:, :, order], permuted), analysis[:, :, order], **EXACT)


def test_members_may_be_permuted(problem, grid):
    background, observations = problem(members=5)
    order = torch.tensor([2, 0, 4, 1, 3])
    method = LETKF(grid, 5, localization_km=4000.0, inflation=1.1, relaxation=0.4)
    analysis = method.analyze(background, observations)
    assert_close(method.analyze(background[:, order], observations), analysis[:, order], **EXACT)


def test_the_globe_has_no_seam(problem, grid):
    background, observations = problem(members=5)
    method = LETKF(grid, 5, localization_km=4000.0)
    rolled = GriddedObservations(*(part.roll(5, -1) for part in observations))
    analysis = method.analyze(background, observations)
    assert_close(method.analyze(background.roll(5, -1), rolled), analysis.roll(5, -1), **EXACT)


def test_an_observation_acts_within_its_reach_only(problem, grid):
    background, observations = problem(timelines=1, members=5, density=1.0)
    single = torch.zeros(2, *grid.shape, dtype=torch.bool)
    single[0, 2, 3] = True
    analysis = LETKF(grid, 5, localization_km=2500.0, inflation=1.3).analyze(
        background, observations.withhold(single)
    )
    distance = great_circle_km(
        grid.latitude[2], grid.longitude[3], grid.latitude[:, None], grid.longitude
    )
    assert torch.equal((analysis == background).all(1).all(1)[0], distance >= 5000.0)


def test_identity_coupling_analyses_channels_apart(problem, grid):
    background, observations = problem(members=5)
    apart = LETKF(grid, 5, localization_km=4000.0, coupling=torch.eye(2))
    together = LETKF(grid, 5, localization_km=4000.0)
    analysis = apart.analyze(background, observations)
    for channel in range(2):
        part = slice(channel, channel + 1)
        alone = GriddedObservations(*(field[:, part] for field in observations))
        expected = together.analyze(background[:, :, part], alone)
        assert_close(analysis[:, :, part], expected, **EXACT)


def test_coupling_scales_the_precision_of_the_other_channel(problem, grid):
    background, observations = problem(members=5)
    coupling = [[1.0, 0.25], [1.0, 1.0]]
    analysis = LETKF(grid, 5, localization_km=4000.0, coupling=coupling).analyze(
        background, observations
    )
    doubled = observations.errors.clone()
    doubled[:, 1] *= 2  # a quarter of the precision
    method = LETKF(grid, 5, localization_km=4000.0)
    first = method.analyze(background, observations._replace(errors=doubled))
    second = method.analyze(background, observations)
    assert_close(analysis[:, :, 0], first[:, :, 0], **EXACT)
    assert_close(analysis[:, :, 1], second[:, :, 1], **EXACT)


def test_each_channel_may_have_its_own_reach(problem, grid):
    background, observations = problem(members=5)
    analysis = LETKF(grid, 5, localization_km=[1500.0, 6000.0]).analyze(background, observations)
    for channel, width in enumerate((1500.0, 6000.0)):
        expected = LETKF(grid, 5, localization_km=width).analyze(background, observations)
        assert_close(analysis[:, :, channel], expected[:, :, channel], **EXACT)


@given(seed=st.integers(0, 10**6), density=st.floats(0.02, 1), error=st.floats(0.1, 100))
def test_the_ensemble_never_becomes_less_certain(seed, density, error):
    grid = gaussian_grid(4, 8)
    generator = torch.Generator().manual_seed(seed)
    background = torch.randn(1, 6, 1, 4, 8, generator=generator, dtype=torch.float64)
    network = torch.rand(4, 8, generator=generator) < density
    observations = observe(background[:, 0], network, torch.tensor([error]), generator=generator)
    method = LETKF(grid, 6, localization_km=3000.0)
    prior, posterior = background.var(1), method.analyze(background, observations).var(1)
    assert (posterior <= prior + 1e-12).all()
    assert (posterior[:, :, network] < prior[:, :, network]).all()


def test_inflation_and_relaxation_widen_the_ensemble_only(problem, grid):
    background, observations = problem(members=5, density=1.0)

    def analyze(**options):
        return LETKF(grid, 5, localization_km=4000.0, **options).analyze(background, observations)

    plain, relaxed = analyze(), analyze(relaxation=0.5)
    assert_close(relaxed.mean(1), plain.mean(1), **EXACT)
    middle = (plain.std(1) + background.std(1)) / 2
    assert_close(relaxed.std(1), middle, **EXACT)
    assert_close(analyze(relaxation=1.0).std(1), background.std(1), **EXACT)
    assert (analyze(inflation=1.5).std(1) > plain.std(1)).all()


def test_relaxation_leaves_a_collapsed_point_alone():
    zeros = torch.zeros(2, 4)
    assert torch.equal(relax_to_prior_spread(torch.ones(2, 4), zeros, 0.5), zeros)


@pytest.mark.parametrize("bad", [torch.nan, 1e200])
def test_a_timeline_without_observations_or_lost_is_returned(problem, grid, bad):
    background, observations = problem(timelines=3, members=5, density=1.0)
    keep = torch.tensor([True, False, True]).view(3, 1, 1, 1)
    background[2, 3, 0, 1, 1] = bad
    method = LETKF(grid, 5, localization_km=4000.0, inflation=1.2)
    analysis = method.analyze(background, observations.withhold(keep))
    assert not torch.equal(analysis[0], background[0])
    assert analysis[0].isfinite().all()
    assert torch.equal(analysis[1], background[1])
    assert torch.equal(analysis[2].nan_to_num(), background[2].nan_to_num())


def test_float32_is_close_to_float64(problem, grid):
    background, observations = problem(members=8)
    method = LETKF(grid, 8, localization_km=4000.0, inflation=1.1, relaxation=0.5)
    exact = method.analyze(background, observations)
    rough = method.analyze(background.float(), observations.to(torch.float32))
    assert rough.dtype == torch.float32
    assert_close(rough.double(), exact, rtol=0, atol=1e-4)


def test_real_fields_come_closer_to_the_truth(era5_problem):
    grid, truth, background, observations = era5_problem
    method = LETKF(grid, 9, localization_km=500.0, coupling=torch.eye(4))
    analysis = method.analyze(background, observations)
    weights = grid.area_weights()
    before, after = (rmse(x[0].mean(0), truth, weights) for x in (background, analysis))
    assert (after < 0.97 * before).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": 1}, "two members"),
        ({"inflation": 0.0}, "inflation"),
        ({"relaxation": 1.5}, "relaxation"),
        ({"localization_km": 0.0}, "localization_km"),
        ({"localization_km": [1000.0, 0.0]}, "localization_km"),
    ],
)
def test_bad_arguments(grid, options, message):
    with pytest.raises(ValueError, match=message):
        LETKF(grid, **{"members": 5, **options})


def test_bad_inputs(problem, grid, refuses):
    background, observations = problem(members=5)
    refuses(
        ValueError,
        (
            "3 values, expected 1 or 2",
            lambda: LETKF(grid, 5, localization_km=[1e3, 2e3, 3e3]).analyze(
                background, observations
            ),
        ),
        (
            "coupling",
            lambda: LETKF(grid, 5, coupling=torch.eye(3)).analyze(background, observations),
        ),
        (
            "not positive",
            lambda: LETKF(grid, 5).analyze(
                background, observations._replace(errors=observations.errors * 0)
            ),
        ),
    )


@pytest.mark.fault("faults 7")
def test_one_missing_value_does_not_drop_the_other_observations(problem, grid):
    background, observations = problem(members=5, density=1.0)
    values = observations.values.clone()
    values[0, 0, 2, 3] = torch.nan
    keep = torch.ones_like(observations.mask)
    keep[0, 0, 2, 3] = False
    method = LETKF(grid, 5, localization_km=4000.0)
    found = method.analyze(background, GriddedObservations(values, observations.errors))
    assert_close(found, method.analyze(background, observations.withhold(keep)), **EXACT)
    assert not torch.equal(found[0], background[0])


@pytest.mark.fault("faults 7")
@pytest.mark.parametrize("factor", [-0.5, 1.5, torch.nan])
def test_a_coupling_lies_between_0_and_1(grid, factor):
    with pytest.raises(ValueError, match="coupling must lie between 0 and 1, found"):
        LETKF(grid, 5, coupling=[[1.0, factor], [0.0, 1.0]])


@pytest.mark.fault("faults 7")
def test_unobserved_points_are_inflated_with_and_without_an_observation(problem, grid):
    background, observations = problem(members=5, timelines=1)
    method = LETKF(grid, 5, localization_km=500.0, inflation=1.44, inflate_unobserved=True)
    mean = background.mean(1, keepdim=True)
    inflated = mean + 1.2 * (background - mean)
    nothing = observations.withhold(torch.zeros_like(observations.mask))
    assert_close(method.analyze(background, nothing), inflated, **EXACT)
    one = torch.zeros_like(observations.mask)
    one[0, :, 0, 0] = True
    found = method.analyze(background, GriddedObservations(
        torch.zeros_like(observations.values), torch.ones_like(observations.errors)
    ).withhold(one))  # fmt: skip
    assert_close(found[..., 3:, :], inflated[..., 3:, :], **EXACT)


def transform(weights):
    """The symmetric W of Hunt et al. (2007), equation 24."""
    return (weights.vectors * weights.shrink) @ weights.vectors.mT


def test_golden_of_the_global_filter(golden_filter, etkf):
    vectors = golden_filter[0]
    states = vectors["X"].T
    observed = states[:, vectors["obs_index"]]
    errors = vectors["R_diag"].sqrt()
    inflation = vectors["infl"].item()
    analysis = etkf(states, observed, vectors["y"], errors, inflation=inflation)
    assert_close(analysis.T, vectors["etkf_Xa"], **EXACT)
    scaled = (observed - observed.mean(0)) / errors
    innovation = (vectors["y"] - observed.mean(0)) / errors
    weights = ensemble_weights(scaled @ scaled.T, scaled @ innovation, inflation)
    assert_close(weights.vectors @ weights.shift, vectors["etkf_wmean"], **EXACT)
    assert_close(transform(weights), vectors["etkf_W"], **EXACT)


def ensemble(seed=0, members=30, size=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(members, size, generator=generator, dtype=torch.float64)


def test_mean_and_covariance_are_those_of_the_kalman_filter(etkf):
    states, operator = ensemble(), torch.tensor([[1.0, 0, 2, 0], [0, 1, 0, -1]]).double()
    values, errors = torch.tensor([0.5, -2.0]).double(), torch.tensor([0.3, 2.0]).double()
    analysis = etkf(states, states @ operator.T, values, errors)
    prior = states.T.cov()
    innovation = operator @ prior @ operator.T + errors.square().diag()
    gain = prior @ operator.T @ innovation.inverse()
    mean = states.mean(0) + gain @ (values - operator @ states.mean(0))
    assert_close(analysis.mean(0), mean, **EXACT)
    assert_close(analysis.T.cov(), prior - gain @ operator @ prior, **EXACT)


def test_the_order_of_the_observations_does_not_matter(etkf):
    states = ensemble()
    values, errors = torch.randn(4).double(), torch.rand(4).double() + 0.1
    order = torch.tensor([2, 0, 3, 1])
    analysis = etkf(states, states, values, errors)
    assert_close(etkf(states, states[:, order], values[order], errors[order]), analysis, **EXACT)


def test_an_observation_with_an_infinite_error_is_none(etkf):
    states = ensemble()
    errors = torch.tensor([1.0, torch.inf, 0.5, torch.inf]).double()
    values = torch.tensor([0.3, 1e9, -1.0, torch.nan]).double()
    seen = torch.tensor([0, 2])
    expected = etkf(states, states[:, seen], values[seen], errors[seen])
    assert_close(etkf(states, states, values, errors), expected, **EXACT)


def test_rounding_below_zero_is_no_information():
    signal = torch.diag(torch.tensor([-50.0, 0.0, 3.0]))
    weights = ensemble_weights(signal, torch.zeros(3), inflation=1.0)
    expected = torch.diag(torch.tensor([1.0, 1.0, (2 / 5) ** 0.5], dtype=torch.float64))
    assert_close(transform(weights), expected, rtol=0, atol=1e-7)


@pytest.mark.fault("faults 7")
def test_one_member_is_no_ensemble(etkf):
    states = ensemble(members=1)
    with pytest.raises(ValueError, match="at least two members, found 1"):
        etkf(states, states, torch.zeros(4), torch.ones(4))
