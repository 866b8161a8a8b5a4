import pytest
import torch
from torch.testing import assert_close

from weather.models.adas.network import Adas
from weather.models.fengwu.network import FengWu, SkipJoin, fengwu_preset

FRAME = (2, 5, 8, 16)


def frames(seed=0, shape=FRAME):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)


def counted(name):
    with torch.device("meta"):
        network = fengwu_preset(name)
    assert all(parameter.is_meta for parameter in network.parameters())
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("official", 229_254_258), ("small", 4_186_890), ("tiny", 1_111_034), ("unit", 23_598)],
)
def test_parameters_are_those_of_the_description(name, parameters):
    """Counted by hand from the layers and widths of the paper."""
    assert counted(name) == parameters


def test_the_official_shape():
    with torch.device("meta"):
        network = fengwu_preset("official")
        x = torch.zeros(1, 69, 721, 1440)
        prediction = network(x, x)
    assert prediction.mean.shape == prediction.log_variance.shape == x.shape
    assert network.encoders[0].position.shape == (1, 180, 360, 192)
    assert len(network.encoders) == len(network.decoders) == 6


def test_it_starts_as_persistence_with_unit_spread():
    torch.manual_seed(0)
    prediction = fengwu_preset("unit")(*frames(shape=(1, 3, 16, 32)))
    assert not prediction.mean.any()
    assert not prediction.log_variance.any()


def test_every_channel_of_both_frames_matters_to_every_output(small_fengwu):
    """One encoder a modality would not do this: the fuser does."""
    network = small_fengwu().double()
    previous, current = (x.double().requires_grad_() for x in frames())
    for output in network(previous, current):
        for channel in range(5):
            gradients = torch.autograd.grad(
                output[:, channel].sum(), (previous, current), retain_graph=True
            )
            for gradient in gradients:
                assert (gradient.abs().amax((0, 2, 3)) > 0).all()


def test_without_the_fuser_modalities_are_separate(small_fengwu):
    network = small_fengwu(fuser_depth=0)
    previous, current = frames()
    before = network(previous, current)
    current = current.clone()
    current[:, 3:] += 1  # the last modality
    for one, other in zip(before, network(previous, current), strict=True):
        assert_close(one[:, :3], other[:, :3], rtol=0, atol=0)
        assert not torch.allclose(one[:, 3:], other[:, 3:])


def test_the_order_of_frames_matters(small_fengwu):
    network, (previous, current) = small_fengwu(), frames()
    assert not torch.allclose(network(previous, current).mean, network(current, previous).mean)


def test_rolling_the_globe_rolls_the_forecast(small_fengwu):
    network, shift = small_fengwu(), 2 * 2 * 2  # patch, coarse scale, window
    previous, current = frames()
    expected = network(previous, current)
    rolled = network(previous.roll(shift, -1), current.roll(shift, -1))
    for one, other in zip(expected, rolled, strict=True):
        assert_close(one.roll(shift, -1), other, rtol=1e-5, atol=1e-5)
    full = small_fengwu(position="full")
    rolled = full(previous.roll(shift, -1), current.roll(shift, -1)).mean
    assert not torch.allclose(full(previous, current).mean.roll(shift, -1), rolled, atol=1e-4)


def test_grids_with_both_poles_and_odd_scales(small_fengwu):
    network = small_fengwu(grid_shape=(11, 20))  # 5 x 10 patches, 3 x 5 at the coarse scale
    x = torch.randn(1, 5, 11, 20)
    assert network(x, x).mean.shape == x.shape


def test_log_variance_is_bounded(small_fengwu):
    network = small_fengwu()
    for decoder in network.decoders:
        decoder.recovery.bias.data.fill_(1e4)
    prediction = network(*frames())
    assert prediction.log_variance.max() == 10
    assert prediction.mean.max() > 1e3


def test_recomputing_changes_no_gradient(small_fengwu):
    gradients = []
    for recompute in (False, True):
        network = small_fengwu(recompute=recompute).double()
        mean, log_variance = network(*(x.double() for x in frames()))
        (mean.square().sum() + log_variance.sum()).backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other)


def test_gates_of_the_skip():
    torch.manual_seed(0)
    join = SkipJoin(4).double()
    x, skip = torch.randn(2, 1, 4, 1, 2, 3, dtype=torch.float64).unbind(0)
    gates = join.gate_values(x, skip).detach()
    assert 0.8 < float(gates.mean()) < 0.95
    tokens = torch.cat((x, skip * gates), dim=1).movedim(1, -1)
    assert_close(join(x, skip), join.join(tokens).movedim(-1, 1))
    with torch.no_grad():
        join.gate.bias.fill_(-1e3)
    assert_close(join(x, skip), join(x, torch.zeros_like(skip)))
    plain = SkipJoin(4, gated=False)
    assert plain.gate is None
    assert bool((plain.gate_values(x, skip) == 1).all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_levels": 0}, "num_levels=0"),
        ({"num_surface": 0, "num_upper": 0, "num_levels": 0}, "num_surface=0"),
        ({"position": "row"}, "position is 'row'; choose one of full, latitude"),
        ({"grid_shape": (8, 15)}, "do not cover a grid of 8 x 15"),
        ({"num_heads": (3, 2)}, "dim must be a multiple of num_heads=3"),
    ],
)
def test_impossible_arguments(small_fengwu, changes, message, refused):
    refused(message, small_fengwu, **changes, error=ValueError)


def test_states_of_another_shape(small_fengwu, refuses):
    network = small_fengwu()
    x = torch.zeros(FRAME)
    refuses(
        ValueError,
        (r"previous must be \(2, 5, 8, 16\), found \(1, 5", lambda: network(x[:1], x)),
        (r"current must be .* found \(2, 4, 8, 16\)", lambda: network(x, x[:, :4])),
        ("preset is 'huge'; choose one of official, small", lambda: fengwu_preset("huge")),
    )


def test_arguments_make_the_same_network(small_fengwu):
    network = small_fengwu()
    again = FengWu(**network.arguments)
    again.load_state_dict(network.state_dict())
    assert torch.equal(again.eval()(*frames()).mean, network(*frames()).mean)


@pytest.mark.parametrize("network", [Adas, FengWu])
@pytest.mark.parametrize("counts", [(0, 0, 0), (1, 2, 0), (1, 0, 3)])
def test_a_state_without_channels_or_levels_is_refused(network, counts, refused):
    names = ("num_surface", "num_upper", "num_levels")
    refused(
        "surface channels, or upper variables with levels",
        network,
        grid_shape=(8, 16),
        dim=4,
        **dict(zip(names, counts, strict=True)),
        error=ValueError,
    )
