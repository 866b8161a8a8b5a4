"""Adas: golden layers, symmetry, presets, the forms that are compared."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from core_gates.attention.window import DropPath
from weather.models.adas.network import (
    Adas,
    AdasStage,
    Downsample,
    Upsample,
)
from weather.models.adas.presets import (
    FORMS,
    MOST_COLUMNS,
    PRESETS,
    adas_preset,
    convert_official_state_dict,
    network_shape,
)
from weather.training.optimization import unify_loss

GOLDEN = Path(__file__).parents[3] / "golden" / "weather"
EXACT = {"rtol": 0, "atol": 1e-10}


def load(name):
    with np.load(GOLDEN / name) as file:
        arrays = {key: file[key] for key in file.files}
    return {
        key: torch.from_numpy(np.asarray(a)) for key, a in arrays.items() if a.dtype.kind != "U"
    }


def weights(golden, prefix=""):
    return {f"{prefix}{name[2:]}": value for name, value in golden.items() if name[:2] == "w/"}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fields(network, batch=1):
    shape = (batch, network.num_channels, *network.grid_shape)
    confidence = (randn(*shape, seed=2) > 0.5).double()
    return randn(*shape), randn(*shape, seed=1) * confidence, confidence


def unit(**overrides):
    torch.manual_seed(0)
    network = adas_preset("unit", **overrides).double()
    for parameter in network.parameters():  # larger than the initial values, so that all matters
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return network


@pytest.fixture(scope="module")
def official():
    golden = load("adas_full_even.npz")
    network = Adas(
        grid_shape=(16, 32),
        num_surface=4,
        num_upper=5,
        num_levels=2,
        dim=4,
        window_size=(2, 2, 4),
        num_heads=2,
        decoder_depth=2,
        legacy_clip=True,
    )
    network = network.double().eval()
    network.load_state_dict(convert_official_state_dict(weights(golden)))
    return golden, network


def test_official_network_with_losses_and_gradients(official):
    golden, network = official
    background = golden["in/background"].clone().requires_grad_()
    analysis = network(background, golden["in/observation"], golden["in/mask"])
    assert_close(analysis, golden["out/analysis"], **EXACT)
    mae, mse = (unify_loss(analysis, golden["in/truth"], kind=kind) for kind in ("mae", "mse"))
    assert_close((mae, mse), (golden["out/unify_mae"], golden["out/unify_mse"]), **EXACT)
    mae.backward()
    assert_close(background.grad, golden["grad/background"], **EXACT)
    assert_close(network.position.grad, golden["grad/w/absolute_pos_embed"], **EXACT)
    assert_close(network.fusion.bias.grad, golden["grad/w/fusion.bias"], **EXACT)


def test_official_checkpoints_of_parallel_training_load(official):
    golden, network = official
    state = {f"module.{name}": value for name, value in weights(golden).items()}
    name = "module.layer1.crosslayer.back1.attn.relative_position_index"
    state[name] = torch.zeros(16, 16, dtype=torch.long)
    assert set(convert_official_state_dict(state)) == set(network.state_dict())


@pytest.mark.parametrize(("name", "sample"), [("same", None), ("down", "down")])
def test_official_stage(name, sample):
    golden = load(f"adas_basiclayer_{name}.npz")
    kernel, window = (tuple(golden[key].tolist()) for key in ("kernel", "window"))
    stage = AdasStage(golden["out/x1"].shape[1], kernel, 2, window, sample=sample).double()
    converted = convert_official_state_dict(weights(golden, "layer1."))
    stage.load_state_dict({key.removeprefix("stages.0."): v for key, v in converted.items()})
    outputs = stage(tuple(golden[f"in/{key}"] for key in ("x1", "x2", "gate")))
    for key, output in zip(("x1", "x2", "gate"), outputs, strict=True):
        assert_close(output, golden[f"out/{key}"], **EXACT)


@pytest.mark.parametrize(
    "name", [pytest.param("small", marks=pytest.mark.slow), "tiny", "unit", "swe", "era5"]
)
def test_rolling_the_globe_rolls_the_analysis(name):
    torch.manual_seed(0)
    network = adas_preset(name).double().eval()
    inputs = fields(network)
    columns = network.window_size[2] * 4 * 2
    assert columns < network.grid_shape[1]
    with torch.no_grad():
        rolled = network(*[x.roll(columns, -1) for x in inputs])
        assert_close(rolled, network(*inputs).roll(columns, -1), **EXACT)


def test_an_increment_starts_at_zero_and_then_learns():
    network = adas_preset("unit", output="increment").double()
    inputs = fields(network)
    increment = network(*inputs)
    assert torch.equal(increment, torch.zeros_like(increment))
    (increment - inputs[1]).square().mean().backward()
    assert network.recovery.upper.weight.grad.abs().max() > 0


@pytest.mark.parametrize("output", ["analysis", "increment"])
def test_increment_mode_without_observations_is_the_background(output):
    network = unit(output=output, increment_mode=True)
    assert not any(m.rate for m in network.modules() if isinstance(m, DropPath))
    torch.nn.init.normal_(network.recovery.upper.weight)
    background, observation, confidence = fields(network, batch=2)
    observation[0], confidence[0] = 0, 0
    result = network.train()(background, observation, confidence)
    nothing = background[0] if output == "analysis" else torch.zeros_like(background[0])
    assert torch.equal(result[0], nothing)
    assert (result[1] - (background[1] if output == "analysis" else 0)).abs().max() > 1e-3


def test_increment_mode_is_the_difference_of_two_answers():
    network, plain = unit(increment_mode=True), unit(drop_path=0.0)
    background, observation, confidence = fields(network)
    zero = torch.zeros_like(background)
    difference = plain(background, observation, confidence) - plain(background, zero, zero)
    assert_close(network(background, observation, confidence), background + difference)


def test_ungated_control_differs_with_the_same_parameters():
    gated, ungated = unit().eval(), unit(gated=False).eval()
    ungated.load_state_dict(gated.state_dict())
    inputs = fields(gated)
    assert (gated(*inputs) - ungated(*inputs)).abs().max() > 1e-3
    assert not any(part.gated for part in ungated.modules() if hasattr(part, "gated"))


def test_every_parameter_matters_and_both_inputs_are_heard():
    network = unit().eval()
    inputs = [x.requires_grad_() for x in fields(network)]
    network(*inputs).square().sum().backward()
    # the gate that leaves the last stage is fused, therefore heard; nothing is left over
    assert not {n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    assert all(x.grad.abs().max() > 0 for x in inputs)


def test_bounded_gates_stay_between_zero_and_one():
    for bound in (False, True):
        network = unit(bound_gate=bound)
        gates = []
        for stage in network.stages:
            stage.register_forward_hook(lambda *args, gates=gates: gates.append(args[2][2]))
        network(*fields(network))
        assert (max(gate.max().item() for gate in gates) <= 1, len(gates)) == (bound, 5)


def test_stochastic_depth_grows_through_the_decoder_and_sleeps_in_evaluation():
    network = unit(drop_path=0.6, decoder_depth=3)
    assert [block.drop_path.rate for block in network.decoder] == pytest.approx([0, 0.3, 0.6])
    inputs = fields(network)
    torch.manual_seed(0)
    assert not torch.equal(network(*inputs), network(*inputs))
    network.eval()
    assert torch.equal(network(*inputs), network(*inputs))


def test_recomputing_changes_no_gradient():
    results = []
    for recompute in (False, True):
        network = unit(recompute=recompute)
        inputs = [x.requires_grad_() for x in fields(network)]
        torch.manual_seed(1)
        network(*inputs).square().sum().backward()
        results.append([*(x.grad for x in inputs), *(p.grad for p in network.parameters())])
    assert_close(results[1], results[0])


@pytest.mark.parametrize(
    "state",
    [
        {"num_surface": 3, "num_upper": 0, "num_levels": 0},
        {"num_surface": 0, "num_upper": 2, "num_levels": 2},
        {"num_surface": 1, "num_upper": 3, "num_levels": 8},
    ],
)
def test_any_state_on_an_odd_grid(state):
    network = Adas(grid_shape=(13, 20), dim=4, window_size=(2, 3, 5), position="latitude", **state)
    network = network.double()
    assert network.position.shape == (1, 4, state["num_levels"] + bool(state["num_surface"]), 6, 1)
    inputs = [x.requires_grad_() for x in fields(network, batch=2)]
    analysis = network(*inputs)
    assert analysis.shape == inputs[0].shape
    analysis.sum().backward()
    assert (inputs[1].grad != 0).all()  # every row and column is inside a patch
    embedding = network.embeddings["background"]
    assert (embedding.surface is None) == (not state["num_surface"])
    assert (embedding.upper is None) == (not state["num_upper"])


def test_odd_extents_are_padded_going_down_and_cropped_coming_up():
    down, up = Downsample(4).double(), Upsample(8).double()
    x = randn(1, 4, 2, 5, 7)
    coarse = down(x)
    assert coarse.shape == (1, 8, 2, 3, 4)
    assert_close(down(torch.nn.functional.pad(x, (0, 1, 0, 1))), coarse)
    assert up(coarse).shape == (1, 4, 2, 6, 8)
    stage = AdasStage(4, (1, 3, 3), 2, (1, 2, 2), sample="up").double()
    skip = tuple(randn(1, 4, 2, 5, 7, seed=seed) for seed in range(3))
    outputs = stage(tuple(randn(1, 8, 2, 3, 4, seed=seed) for seed in range(3)), skip)
    assert all(y.shape == x.shape for y in outputs)


def test_bfloat16_autocast_returns_the_dtype_of_the_background():
    network = adas_preset("unit")
    inputs = [x.float() for x in fields(network)]
    with torch.autocast("cpu", torch.bfloat16):
        rough = network.eval()(*inputs)
    assert rough.dtype == torch.float32
    assert_close(rough, network(*inputs), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"grid_shape": (15, 32), "patch_size": (4, 2)}, "do not cover a grid of 15 x 32"),
        ({"grid_shape": (16, 31)}, "divisors of 16 and 31"),
        ({"num_levels": 0}, "needs surface channels"),
        ({"num_upper": 0}, "needs surface channels"),
        ({"num_upper": 0, "num_levels": 0, "num_surface": 0}, "needs surface channels"),
        ({"position": "longitude"}, "position must be"),
        ({"output": "anomaly"}, "output must be"),
        ({"num_heads": 3}, "multiple of num_heads=3"),
    ],
)
def test_impossible_configurations_are_refused(overrides, message, refused):
    refused(message, adas_preset, "unit", **overrides, error=ValueError)


@pytest.mark.parametrize(
    ("grid", "patch", "window"),
    [
        ((121, 240), 4, 5),  # 1.5 degrees with poles
        ((721, 1440), 24, 5),
        ((32, 64), 2, 4),
        ((61, 120), 2, 5),
        ((181, 360), 6, 5),
        ((16, 32), 2, 2),
    ],
)
def test_windows_divide_the_tokens_of_all_scales(grid, patch, window):
    found = network_shape(grid, 4, 4, 4)
    assert (found["patch_size"], found["window_size"][2]) == ([patch, patch], window)
    tokens = grid[1] // patch
    assert tokens <= MOST_COLUMNS
    assert tokens % (4 * window) == 0
    assert tokens // 4 // window >= 2


def test_channels_decide_on_depth():
    assert network_shape((32, 64), 3, 0, 0)["window_size"][0] == 1
    assert network_shape((32, 64), 3, 0, 0)["kernel_sizes"][0][0] == 1
    deep = network_shape((32, 64), 1, 2, 3)
    assert (deep["num_surface"], deep["num_upper"], deep["num_levels"]) == (1, 2, 3)
    assert (deep["window_size"][0], deep["kernel_sizes"][0][0]) == (2, 3)


@pytest.mark.parametrize("grid", [(16, 32), (9, 20), (13, 18), (7, 10)])
def test_every_grid_has_a_network(grid):
    shape = network_shape(grid, 1, 1, 2)
    network = Adas(**shape, dim=4, num_heads=2, decoder_depth=1, position="latitude")
    fields = torch.zeros(1, 3, *grid)
    assert network(fields, fields, fields).shape == fields.shape


def millions(name, **overrides):
    with torch.device("meta"):
        network = adas_preset(name, **overrides)
    assert all(parameter.is_meta for parameter in network.parameters())
    return sum(parameter.numel() for parameter in network.parameters()) / 1e6


@pytest.mark.parametrize(
    ("name", "overrides", "expected", "digits"),
    [
        ("official", {}, 291.3, 1),
        ("fnp", {}, 64.5, 1),
        ("small", {"position": "full", "window_size": (2, 4, 8)}, 3.53, 2),
        ("tiny", {"position": "full", "window_size": (2, 4, 8)}, 1.57, 2),
        ("swe", {}, 0.43, 2),
    ],
)
def test_parameter_counts(name, overrides, expected, digits):
    assert round(millions(name, **overrides), digits) == expected


def test_the_published_forms_are_the_published_ones():
    for name in ("official", "fnp"):
        options = ("position", "circular_longitude", "legacy_clip")
        assert [PRESETS[name][option] for option in options] == ["full", False, True]
    with torch.device("meta"):
        network = adas_preset("official")
    assert (network.num_channels, network.position.shape) == (69, (1, 192, 14, 120, 240))


def test_overrides_and_unknown_names(refused):
    assert millions("unit", dim=8) > 3 * millions("unit")
    refused(
        "no preset 'large': choose one of official, fnp", adas_preset, "large", error=ValueError
    )
    refused("widht", adas_preset, "unit", widht=3, error=TypeError)
    network, x = unit(), torch.zeros(1, 14, 16, 32)
    refused(r"observation must be \(1, 14, 16, 32\)", network, x, x[:, :3], x, error=ValueError)


@pytest.fixture
def build(small_adas):
    arguments = small_adas().arguments

    def of(form, **changes):
        torch.manual_seed(0)
        network = Adas(**{**arguments, **FORMS[form], **changes})
        nn.init.normal_(network.recovery.surface.weight, std=0.1)
        return network

    return of


def inputs():
    x, y = torch.randn(2, 1, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    c = (torch.rand(1, 3, 16, 32, generator=torch.Generator().manual_seed(1)) < 0.3).float()
    return x, y * c, c


def test_the_forms_have_the_same_parameters(build):
    shapes = [{n: p.shape for n, p in build(form).named_parameters()} for form in FORMS]
    assert all(shape == shapes[0] for shape in shapes)


def test_the_control_still_reads_the_confidence(build):
    x, y, c = inputs()
    for form in FORMS:
        network = build(form)
        assert not torch.allclose(network(x, y, c), network(x, y, torch.zeros_like(c)), atol=1e-6)


def test_with_open_gates_an_observation_of_zero_looks_like_none(build):
    x, y, c = inputs()
    network = build("adas_increment", open_gate=True)
    torch.testing.assert_close(network(x, y, c), network(x, y, torch.zeros_like(c)))
    assert not torch.allclose(network(x, y, c), network(x, 0 * y, c), atol=1e-6)


def test_only_the_official_form_returns_the_analysis():
    outputs = {form: changes["output"] for form, changes in FORMS.items()}
    assert outputs == {
        "adas_increment": "increment",
        "adas_official": "analysis",
        "ungated": "increment",
    }
