import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core_gates.attention.window import MASKED, WindowLayout
from tests.core_gates.drawn import randn

CPU = torch.device("cpu")
sizes = st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 8))
windows = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=60)
@given(size=sizes, window=windows, shifted=st.booleans())
def test_partition_is_undone(size, window, shifted):
    layout = WindowLayout.of(size, window, shifted=shifted)
    x = randn(2, 3, *size)
    cut = layout.partition(x)
    assert cut.shape == (2, math.prod(layout.counts), math.prod(layout.window), 3)
    assert torch.equal(layout.reverse(cut), x)
    inside = layout.inside(CPU)
    assert (inside is None) == (not any(layout.padding))
    if inside is not None:
        assert inside.sum() == math.prod(size)
        assert torch.equal(cut * inside, cut)


@settings(max_examples=60)
@given(size=sizes, window=windows)
def test_only_pairs_torn_in_depth_or_latitude_are_masked(size, window):
    layout = WindowLayout.of(size, window, shifted=True)
    padded = [n * w for n, w in zip(layout.counts, layout.window, strict=True)]
    axes = [torch.arange(extent) for extent in padded]
    origin = torch.stack(torch.meshgrid(*axes, indexing="ij")).double()[None]
    whole = WindowLayout(tuple(padded), layout.window, layout.shift)
    place = WindowLayout(tuple(padded), layout.window, (0, 0, 0)).partition(origin)[0]
    came_from = whole.partition(origin)[0]

    def offsets(position):
        return (position[:, :, None] - position[:, None])[..., :2]  # depth and latitude

    torn = (offsets(place) != offsets(came_from)).any(-1)
    mask = layout.mask(CPU)
    if mask is None:
        assert not torn.any()
    else:
        columns = layout.counts[2]
        assert torch.equal(mask.repeat_interleave(columns, dim=0), torn * MASKED)


def test_windows_are_clipped_and_then_not_shifted():
    layout = WindowLayout.of((1, 3, 8), (2, 4, 4), shifted=True)
    assert (layout.window, layout.shift, layout.counts) == ((1, 3, 4), (0, 0, 2), (1, 1, 2))
    assert layout.mask(CPU) is None
