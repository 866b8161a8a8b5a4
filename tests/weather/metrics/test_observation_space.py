import torch
from torch.testing import assert_close

from weather.metrics import DepartureSums
from weather.observations.gridded import GriddedObservations


def test_hand_calculated():
    values = torch.tensor([[[1.0, 4.0, 0.0]], [[2.0, 0.0, 0.0]]])
    errors = torch.tensor([[[1.0, 2.0, torch.inf]], [[0.5, torch.inf, torch.inf]]])
    background = torch.tensor([[[0.0, 1.0, 9.0]], [[0.0, torch.nan, 9.0]]])
    analysis = torch.tensor([[[1.0, 3.0, 9.0]], [[1.0, torch.nan, 9.0]]])
    sums = DepartureSums.of(background, analysis, GriddedObservations(values, errors))
    assert sums.number.tolist() == [2, 1]
    assert sums.background_bias().tolist() == [2, 2]
    assert_close(sums.background_rms(), torch.tensor([5.0, 4.0]).double().sqrt())
    assert sums.analysis_bias().tolist() == [0.5, 1]
    assert_close(sums.analysis_rms(), torch.tensor([0.5, 1.0]).double().sqrt())


def test_sums_add_up_and_withstand_channels_without_observations():
    generator = torch.Generator().manual_seed(0)
    fields = torch.randn(3, 6, 2, 4, 8, generator=generator).double()
    errors = torch.full((6, 2, 4, 8), 2.0).double()
    errors[:, 1] = torch.inf
    observations = GriddedObservations(fields[2], errors)
    whole = DepartureSums.of(fields[0], fields[1], observations)
    parts = [
        DepartureSums.of(
            fields[0, part], fields[1, part], GriddedObservations(fields[2, part], errors[part])
        )
        for part in (slice(0, 2), slice(2, 6))
    ]
    for mine, theirs in zip(parts[0].plus(parts[1]), whole, strict=True):
        assert_close(mine, theirs)
    assert whole.background_rms()[1].isnan()
