import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core_gates.routing.capacity import group_positions, ungroup_positions


@given(st.lists(st.integers(0, 3), max_size=3), st.integers(1, 3), st.integers(0, 2), st.booleans())
def test_round_trip(leading, k, which, from_behind):
    values = torch.arange(torch.Size([*leading, k]).numel()).view(*leading, k)
    group_dim = None if which >= len(leading) else which - from_behind * (len(leading) + 1)
    grouped = group_positions(values, group_dim)
    length = torch.Size(leading).numel() if group_dim is None else leading[which]
    assert (grouped.ndim, grouped.shape[1:]) == (3, (length, k))
    assert torch.equal(ungroup_positions(grouped, values.shape[:-1], group_dim), values)


def test_positions_of_a_group_differ_in_one_dimension_only():
    values = torch.arange(2 * 3 * 4).view(2, 3, 4, 1)
    assert group_positions(values, 1)[:, :, 0].tolist() == [
        [b * 12 + t * 4 + h for t in range(3)] for b in range(2) for h in range(4)
    ]
    assert group_positions(values, None).shape == (1, 24, 1)


@pytest.mark.parametrize("group_dim", [-1, 2, 3, -4])
def test_group_dim_is_a_dimension_of_positions(group_dim):
    with pytest.raises(ValueError, match="group_dim must be a dimension of the 2 before the feat"):
        group_positions(torch.zeros(2, 3, 4), group_dim)
