import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from weather.observations.gridded import GriddedObservations, confidence, gross_check

INF = torch.inf


def example():
    """Two channels on 1x3 cells; cell 1 of channel 0 and cell 2 of channel 1 are absent."""
    values = torch.tensor([[[1.0, torch.nan, 3.0]], [[4.0, 5.0, 6.0]]])
    errors = torch.tensor([[[0.5, 0.5, 0.5]], [[2.0, 2.0, INF]]])
    return GriddedObservations.from_values(values, errors)


def test_absence_is_an_infinite_error_and_a_zero_value():
    observations = example()
    assert observations.values.tolist() == [[[1, 0, 3]], [[4, 5, 0]]]
    assert observations.errors.tolist() == [[[0.5, INF, 0.5]], [[2, 2, INF]]]
    assert observations.mask.tolist() == [[[True, False, True]], [[True, True, False]]]


def test_errors_per_channel():
    observations = GriddedObservations.from_values(torch.zeros(2, 3, 4, 5), torch.arange(1.0, 4.0))
    assert observations.errors.shape == (2, 3, 4, 5)
    assert torch.equal(observations.errors[1, :, 2, 3], torch.arange(1.0, 4.0))


@pytest.mark.parametrize("error", [0.0, -1.0, torch.nan])
def test_impossible_errors_are_refused(error):
    with pytest.raises(ValueError, match="zero, negative or NaN"):
        GriddedObservations.from_values(torch.zeros(1, 1, 1), torch.tensor([error]))
    absent = GriddedObservations.from_values(
        torch.full((1, 1, 1), torch.nan), torch.tensor([error])
    )
    assert not absent.mask.any()


def test_withhold_keeps_the_rest_untouched():
    observations = example()
    kept = observations.withhold(torch.tensor([True, True, False]))
    assert kept.values.tolist() == [[[1, 0, 0]], [[4, 5, 0]]]
    assert kept.errors.tolist() == [[[0.5, INF, INF]], [[2, 2, INF]]]
    assert observations.mask.sum() == 4


def test_stack_and_conversion():
    stacked = GriddedObservations.stack([example(), GriddedObservations.absent((2, 1, 3))])
    assert stacked.values.shape == (2, 2, 1, 3)
    assert stacked.mask.sum((1, 2, 3)).tolist() == [4, 0]
    converted = stacked.to(torch.float64)
    assert converted.errors.dtype == converted.values.dtype == torch.float64
    assert torch.equal(converted.mask, stacked.mask)


def test_confidence():
    reference = torch.tensor([0.5, 1.0])
    assert confidence(example(), reference, "binary").tolist() == [[[1, 0, 1]], [[1, 1, 0]]]
    expected = torch.tensor([[[0.5, 0.0, 0.5]], [[0.2, 0.2, 0.0]]])
    torch.testing.assert_close(confidence(example(), reference), expected)
    batched = GriddedObservations.stack([example()] * 2)
    torch.testing.assert_close(confidence(batched, reference)[1], expected)
    with pytest.raises(ValueError, match="'soft' is unknown, expected 'error' or 'binary'"):
        confidence(example(), reference, "soft")


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_confidence_is_the_weight_of_scalar_interpolation(error, reference):
    observations = GriddedObservations.from_values(
        torch.ones(1, 1, 1, dtype=torch.float64), torch.tensor([error], dtype=torch.float64)
    )
    c = confidence(observations, torch.tensor([reference], dtype=torch.float64)).item()
    assert c == pytest.approx(reference**2 / (reference**2 + error**2))
    assert 0 <= c <= 1


def test_gross_check_rejects_beyond_five_combined_deviations():
    values = torch.tensor([[[24.9, 25.1, -24.9, -25.1, 1e6, 0.0]]])
    observations = GriddedObservations.from_values(values, torch.tensor([4.0]))
    background = torch.zeros(1, 1, 6)
    background[..., 5] = torch.nan
    checked = gross_check(observations, background, torch.tensor([3.0]))
    assert checked.mask.flatten().tolist() == [True, False, True, False, False, False]
    assert checked.values.flatten()[4] == 0
    stricter = gross_check(observations, background, torch.tensor([3.0]), factor=4)
    assert not stricter.mask.any()


def test_gross_check_leaves_good_observations_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(2, 3, 8, 16, generator=generator)
    errors = torch.tensor([0.5, 1.0, 2.0])
    values = truth + errors[:, None, None] * torch.randn(truth.shape, generator=generator)
    observations = GriddedObservations.from_values(values, errors)
    observations = observations.withhold(torch.rand(8, 16, generator=generator) < 0.3)
    checked = gross_check(observations, truth, torch.tensor([1.0, 1.0, 1.0]))
    assert torch.equal(checked.values, observations.values)
    assert torch.equal(checked.errors, observations.errors)


def test_poisoned_observation_is_rejected_and_alone():
    observations = GriddedObservations.from_values(torch.zeros(1, 2, 2), torch.tensor([1.0]))
    observations.values[0, 0, 1] = 1e6
    checked = gross_check(observations, torch.zeros(1, 2, 2), torch.tensor([10.0]))
    assert checked.mask.tolist() == [[[True, False], [True, True]]]
    assert checked.values.abs().max() == 0


def test_empty_batch_is_valid():
    absent = GriddedObservations.absent((2, 3, 4, 5))
    assert confidence(absent, torch.ones(3)).abs().max() == 0
    checked = gross_check(absent, torch.zeros(2, 3, 4, 5), torch.ones(3))
    assert not checked.mask.any()
    assert checked.values.abs().max() == 0


@pytest.mark.fault("faults 7")
def test_a_value_that_is_not_finite_is_absent_however_it_came():
    for bad in (torch.nan, INF, -INF):
        values = torch.tensor([[[1.0, bad, 3.0]]])
        for found in (
            GriddedObservations(values, torch.ones(1, 1, 3)),
            GriddedObservations.stack([GriddedObservations(values, torch.ones(1, 1, 3))]),
            GriddedObservations(values, torch.ones(1, 1, 3)).to(torch.float64),
        ):
            assert found.values.flatten().tolist() == [1, 0, 3]
            assert found.errors.flatten().tolist() == [1, INF, 1]
