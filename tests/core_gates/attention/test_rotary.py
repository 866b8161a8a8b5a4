import pytest
import torch
from torch.testing import assert_close

from core_gates.attention import rotate


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("interleaved", [False, True])
def test_products_depend_on_the_distance_alone(interleaved):
    query, key = draw(1, 6), draw(1, 6, seed=1)

    def product(i, j):
        turned = (
            rotate(t, torch.tensor([p]), interleaved=interleaved) for t, p in ((query, i), (key, j))
        )
        return torch.mul(*turned).sum()

    assert_close(product(3, 10), product(103, 110))
    assert not torch.isclose(product(3, 10), product(3, 11))
    assert_close(product(0, 0), (query * key).sum())


@pytest.mark.fault("core S8")
@pytest.mark.parametrize(
    ("interleaved", "first", "second"), [(False, [0, 1], [2, 3]), (True, [0, 2], [1, 3])]
)
def test_which_features_are_a_pair(interleaved, first, second):
    x = draw(5, 4)
    turned = rotate(x, torch.arange(5), 100.0, interleaved=interleaved)
    angles = torch.arange(5.0, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.1]).double()
    plane = torch.complex(x[:, first], x[:, second]) * torch.polar(torch.ones_like(angles), angles)
    assert_close(turned[:, first], plane.real)
    assert_close(turned[:, second], plane.imag)


def test_positions_broadcast():
    x = draw(2, 5, 3, 4)
    by_head = rotate(x.transpose(1, 2), torch.arange(5))
    assert_close(rotate(x, torch.arange(5)[:, None]), by_head.transpose(1, 2))
    shifted = rotate(x, (torch.tensor([[0], [7]]) + torch.arange(5))[..., None])
    assert_close(shifted[1:], rotate(x[1:], torch.arange(7, 12)[:, None]))
    half = rotate(x.bfloat16(), torch.arange(5)[:, None])
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, rotate(x.bfloat16().float(), torch.arange(5)[:, None]).bfloat16())


def test_odd_features_are_refused():
    with pytest.raises(ValueError, match="even number of features, got 3"):
        rotate(torch.zeros(1, 3), torch.zeros(1))
