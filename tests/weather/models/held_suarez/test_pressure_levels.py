"""Pressure levels: closed forms of an isothermal and a linear column."""

import math

import pytest
import torch
from torch.testing import assert_close

from weather.models.earth import GAS_CONSTANT
from weather.models.held_suarez.pressure_levels import (
    PRESSURE_LEVELS,
    pressure_level_channels,
    to_pressure_levels,
)

CHANNELS = pressure_level_channels()
SIGMA = (torch.arange(8).double() + 0.5) / 8


def columns(temperature, u=10.0, v=-5.0, pressure=1.01e5):
    """Return a state (1, 25, 2, 3) with the same profile, and another pressure, in each column."""
    surface = pressure * (1 + 0.02 * torch.arange(6.0, dtype=torch.float64).reshape(1, 2, 3))
    log_layers = SIGMA.log()[:, None, None] + surface.log()
    profiles = []
    for profile in (temperature, u, v):
        values = profile(log_layers) if callable(profile) else torch.full_like(log_layers, profile)
        profiles.append(values)
    return torch.cat((surface, *profiles))[None], surface


def pick(fields, name, level=None):
    return fields[:, CHANNELS.index(name, level)]


def test_isothermal_atmosphere_has_logarithmic_heights():
    state, surface = columns(250.0)
    fields = to_pressure_levels(state)
    assert fields.shape == (1, CHANNELS.num_channels, 2, 3)
    for level in PRESSURE_LEVELS:
        exact = GAS_CONSTANT * 250 * (surface / (100 * level)).log()
        assert_close(pick(fields, "geopotential", level), exact, rtol=1e-12, atol=1e-8)
        assert_close(pick(fields, "temperature", level), torch.full_like(exact, 250))
        assert_close(pick(fields, "u_component_of_wind", level), torch.full_like(exact, 10))


def test_profiles_linear_in_log_pressure_are_exact_between_the_layers():
    def temperature(log_pressure):
        return 280 + 25 * (log_pressure - math.log(1e5))

    state, surface = columns(temperature, u=lambda log_pressure: 3 * log_pressure)
    fields = to_pressure_levels(state, PRESSURE_LEVELS)
    ground = temperature((surface * SIGMA[-1]).log())
    lowest = GAS_CONSTANT * ground * -SIGMA[-1].log()
    for level in (100, 200, 300, 500, 700, 850):
        log_level = math.log(100 * level)
        expected = torch.full_like(surface, temperature(log_level))
        assert_close(pick(fields, "temperature", level), expected)
        assert_close(pick(fields, "u_component_of_wind", level), 3 * log_level + 0 * surface)
        mean = (temperature((surface * SIGMA[-1]).log()) + temperature(log_level)) / 2
        exact = lowest + GAS_CONSTANT * mean * ((surface * SIGMA[-1]).log() - log_level)
        assert_close(pick(fields, "geopotential", level), exact, rtol=1e-12, atol=1e-6)


def test_values_are_constant_beyond_the_outermost_layers():
    state, surface = columns(lambda log_pressure: 20 * log_pressure)
    levels = (50, 20, 1100)
    fields, channels = to_pressure_levels(state, levels), pressure_level_channels(levels)
    for level, layer in ((50, 0), (20, 0), (1100, 7)):
        assert_close(fields[:, channels.index("temperature", level)], state[:, 1 + layer])
    high, higher = (fields[:, channels.index("geopotential", level)] for level in (50, 20))
    assert_close(higher - high, GAS_CONSTANT * state[:, 1] * math.log(50 / 20))
    ground = fields[:, channels.index("geopotential", 1100)]
    assert_close(ground, GAS_CONSTANT * state[:, 8] * (surface / 1.1e5).log())


def test_surface_fields_are_those_of_the_lowest_layer():
    state, surface = columns(lambda log_pressure: 20 * log_pressure)
    fields = to_pressure_levels(state)
    assert_close(pick(fields, "2m_temperature"), state[:, 8])
    assert_close(pick(fields, "10m_u_component_of_wind"), state[:, 16])
    assert_close(pick(fields, "10m_v_component_of_wind"), state[:, 24])
    assert_close(pick(fields, "mean_sea_level_pressure"), surface)


def test_geopotential_is_hydrostatic_for_any_profile():
    generator = torch.Generator().manual_seed(0)
    state, _ = columns(250.0)
    state[:, 1:] += 20 * torch.randn(state[:, 1:].shape, generator=generator, dtype=torch.float64)
    levels = tuple(range(30, 1001, 2))
    fields = to_pressure_levels(state, levels)
    channels = pressure_level_channels(levels)
    heights = fields[:, [channels.index("geopotential", level) for level in levels]]
    temperature = fields[:, [channels.index("temperature", level) for level in levels]]
    logs = torch.tensor(levels, dtype=torch.float64).log()
    layers = -logs.diff()[:, None, None] * GAS_CONSTANT * (temperature[:, 1:] + temperature[:, :-1])
    assert_close(heights.diff(dim=1), layers / 2, rtol=0, atol=2.0)


def test_leading_dimensions_and_dtype_are_kept():
    state, _ = columns(250.0)
    many = state.expand(4, 5, *state.shape[1:]).float()
    fields = to_pressure_levels(many, (500, 850))
    assert fields.shape == (4, 5, 12, 2, 3)
    assert fields.dtype == torch.float32


def test_bad_input_is_refused():
    state, _ = columns(250.0)
    with pytest.raises(ValueError, match="found 24"):
        to_pressure_levels(state[:, 1:])
    with pytest.raises(ValueError, match="positive"):
        to_pressure_levels(state, (0, 500))
