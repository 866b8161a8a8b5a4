import math

import pytest
import torch
from torch.testing import assert_close

from weather.metrics import drift, recovery_time, trend


def test_drift_is_the_relative_change_over_the_last_half():
    time = torch.arange(200.0)
    steady = torch.full((200,), 5.0)
    rising = 10 + 0.02 * (time - 149.5)  # 2 in 100 cycles around 10
    early = torch.where(time < 100, 50 - time / 2, 5.0)
    errors = torch.stack([steady, rising, rising.flip(0) + 12, early], 1)
    # Flipped, its last half falls by 2 around 8 + 12.
    expected = torch.tensor([0.0, 0.2, 0.1, 0.0]).double()
    assert_close(drift(errors), expected, rtol=0, atol=1e-6)
    signed = expected * torch.tensor([1, 1, -1, 1])
    assert_close(trend(errors), signed, rtol=0, atol=1e-6)


def test_drift_needs_some_cycles():
    with pytest.raises(ValueError, match="four"):
        drift(torch.ones(3))


def test_recovery_counts_from_the_first_observations():
    before, outage = [4.0, 2.0, 2.0], [5.0, 8.0]
    after = torch.tensor([[7.0, 2.0, 9.0], [2.3, 2.0, 9.0], [2.1, 2.0, 9.0], [2.1, 2.0, 9.0]])
    errors = torch.cat([torch.tensor(before + outage)[:, None].expand(-1, 3), after])
    hours = recovery_time(errors, (3, 5), hours=6.0)
    assert hours.tolist() == [12.0, 0.0, math.inf]
    assert recovery_time(errors, (3, 5), hours=6.0, tolerance=1.2)[0] == 6.0
    with pytest.raises(ValueError, match="outage"):
        recovery_time(errors, (3, 9))
