import pytest
import torch
from torch.testing import assert_close

from weather.baselines.letkf import LETKF, ensemble_weights, relax_to_prior_spread
from weather.grid import great_circle_km
from weather.metrics import rmse
from weather.observations.gridded import GriddedObservations

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


@pytest.mark.parametrize(
    ("axis", "order"), [(-4, (2, 0, 4, 1, 3)), (-3, (2, 0, 1)), (-1, (*range(7, 12), *range(7)))]
)
def test_members_channels_and_meridians_may_be_permuted(problem, grid, axis, order):
    background, observations = problem(members=5, channels=3)
    method = LETKF(grid, 5, localization_km=4000.0, inflation=1.1, relaxation=0.4)
    analysis, order = method.analyze(background, observations), torch.tensor(order)
    if axis != -4:
        observations = GriddedObservations(*(x.index_select(axis, order) for x in observations))
    permuted = method.analyze(background.index_select(axis, order), observations)
    assert_close(permuted, analysis.index_select(axis, order), **EXACT)


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
    assert_close((analysis[:, :, 0], analysis[:, :, 1]), (first[:, :, 0], second[:, :, 1]), **EXACT)


def test_each_channel_may_have_its_own_reach(problem, grid):
    background, observations = problem(members=5)
    analysis = LETKF(grid, 5, localization_km=[1500.0, 6000.0]).analyze(background, observations)
    for channel, width in enumerate((1500.0, 6000.0)):
        expected = LETKF(grid, 5, localization_km=width).analyze(background, observations)
        assert_close(analysis[:, :, channel], expected[:, :, channel], **EXACT)


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
        ({"localization_km": [1e3, 2e3, 3e3]}, "3 values, expected 1 or 2"),
        ({"coupling": torch.eye(3)}, "coupling"),
        ({"coupling": [[1.0, -0.5], [0.0, 1.0]]}, "coupling must lie between 0 and 1, found"),
        ({"coupling": [[1.0, 1.5], [0.0, 1.0]]}, "coupling must lie between 0 and 1, found"),
        ({"coupling": [[1.0, torch.nan], [0.0, 1.0]]}, "coupling must lie between 0 and 1"),
        ({"error": 0.0}, "not positive"),
    ],
)
def test_bad_arguments(problem, grid, options, message, refused):
    options = {"members": 5, "error": 0.5} | options
    background, observations = problem(members=5)
    errors = torch.where(observations.mask, options.pop("error"), torch.inf)
    refused(
        message,
        lambda: LETKF(grid, **options).analyze(background, observations._replace(errors=errors)),
        error=ValueError,
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


def test_rounding_below_zero_is_no_information():
    signal = torch.diag(torch.tensor([-50.0, 0.0, 3.0]))
    weights = ensemble_weights(signal, torch.zeros(3), inflation=1.0)
    expected = torch.diag(torch.tensor([1.0, 1.0, (2 / 5) ** 0.5], dtype=torch.float64))
    assert_close(transform(weights), expected, rtol=0, atol=1e-7)
