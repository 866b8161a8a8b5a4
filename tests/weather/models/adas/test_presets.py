import pytest
import torch

from weather.models.adas.presets import PRESETS, adas_preset

OURS = ("small", "tiny", "unit", "swe", "era5")


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


@pytest.mark.parametrize("name", OURS)
def test_windows_divide_the_circle_at_all_scales(name):
    preset = PRESETS[name]
    assert preset["position"] == "latitude"
    assert preset["circular_longitude"] is True
    columns, width = preset["grid_shape"][1] // preset["patch_size"][1], preset["window_size"][2]
    for scale in (1, 2, 4):
        assert columns // scale * scale == columns or scale == 4
        assert -(-columns // scale) % width == 0
    assert -(-columns // 4) // width >= 2


def test_the_published_forms_are_the_published_ones():
    for name in ("official", "fnp"):
        assert PRESETS[name]["position"] == "full"
        assert PRESETS[name]["circular_longitude"] is False
        assert PRESETS[name]["legacy_clip"] is True
    with torch.device("meta"):
        network = adas_preset("official")
    assert network.num_channels == 69
    assert network.position.shape == (1, 192, 14, 120, 240)


@pytest.mark.parametrize("name", ["unit", "swe", "era5"])
def test_small_presets_run(name):
    torch.manual_seed(0)
    network = adas_preset(name, output="increment")
    x = torch.randn(1, network.num_channels, *network.grid_shape)
    assert network(x, x, (x > 0).float()).shape == x.shape


def test_overrides_and_unknown_names():
    assert millions("unit", dim=8) > 3 * millions("unit")
    with pytest.raises(ValueError, match="no preset 'large': choose one of official, fnp"):
        adas_preset("large")
    with pytest.raises(TypeError, match="widht"):
        adas_preset("unit", widht=3)
