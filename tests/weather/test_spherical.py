"""Spherical-harmonic transform: exactness, derivatives, conventions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from weather.grid import gaussian_nodes
from weather.spherical import EARTH_RADIUS_M, SphericalTransform, legendre_functions


class Plain(SphericalTransform):
    """With grid fields ``(..., H, W)`` and complex coefficients ``(..., M, L)``."""

    def analyze(self, field):
        return self.unpacked(self.analysis(self.pack_grid(field)), field.shape[:-2])

    def synthesize(self, coefficients):
        packed = self.synthesis(self.pack_coefficients(coefficients))
        return self.unpack_grid(packed, coefficients.shape[:-2])

    def vorticity_divergence(self, u, v):
        x, y = (self.fourier(self.pack_grid(field)) for field in (u, v))
        return tuple(
            self.unpacked(made(x, y), u.shape[:-2]) for made in (self.curl, self.divergence)
        )

    def wind(self, vorticity, divergence):
        packed = map(self.pack_coefficients, (vorticity, divergence))
        return [self.unpack_grid(x, vorticity.shape[:-2]) for x in self.wind_synthesis(*packed)]

    def gradient(self, coefficients):
        parts = self.gradient_synthesis(self.pack_coefficients(coefficients))
        return [self.unpack_grid(part, coefficients.shape[:-2]) for part in parts]

    def unpacked(self, packed, shape):
        pairs = packed.permute(3, 1, 2, 0).reshape(*shape, self.size, self.size, 2)
        return torch.view_as_complex(pairs.contiguous())


T21 = Plain(21, 32, 64)


def random_coefficients(transform, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = transform.size
    values = torch.randn(*shape, size, size, dtype=torch.complex128, generator=generator)
    values[..., 0, :].imag = 0
    return values * (transform.degree >= torch.arange(size)[:, None])


def angles(transform):
    lat, lon = transform.grid.latitude.deg2rad(), transform.grid.longitude.deg2rad()
    return lat[:, None].expand(transform.grid.shape), lon.expand(transform.grid.shape)


@pytest.mark.parametrize("shape", [(21, 32, 64), (42, 64, 128), (21, 22, 43), (1, 2, 3)])
def test_round_trip(shape):
    transform = Plain(*shape)
    coefficients = random_coefficients(transform, 2, 3)
    field = transform.synthesize(coefficients)
    assert field.shape == (2, 3, *transform.grid.shape)
    assert field.dtype == torch.float64
    assert (transform.analyze(field) - coefficients).abs().max() < 1e-12
    again = transform.synthesize(transform.analyze(field))
    assert (again - field).abs().max() < 1e-12 * field.abs().max()


def test_analysis_projects_out_what_is_beyond_the_truncation():
    fine = Plain(30, 32, 64)
    coefficients = random_coefficients(fine)
    field = fine.synthesize(coefficients)
    assert_close(T21.analyze(field), coefficients[:22, :22], atol=1e-12, rtol=0)


def test_known_harmonics():
    lat, lon = angles(T21)
    fields = {
        (0, 0): torch.ones_like(lat),
        (0, 1): math.sqrt(3) * lat.sin(),
        (1, 1): 2 * math.sqrt(3 / 2) * lat.cos() * lon.cos(),
        (1, 2): 2 * math.sqrt(15 / 2) * lat.sin() * lat.cos() * lon.cos(),
        (2, 2): 2 * math.sqrt(15 / 8) * lat.cos() ** 2 * (2 * lon).cos(),
    }
    for (m, n), field in fields.items():
        expected = torch.zeros(22, 22, dtype=torch.complex128)
        expected[m, n] = 1
        assert_close(T21.analyze(field), expected, atol=1e-13, rtol=0)
        assert_close(T21.synthesize(expected), field, atol=1e-13, rtol=0)
    eastward_quarter = T21.analyze(lat.cos() * (lon - math.pi / 2).cos())[1, 1]
    assert eastward_quarter.imag < 0
    assert abs(eastward_quarter.real) < 1e-13


def test_legendre_functions_are_orthonormal_and_their_slopes_are_derivatives():
    nodes, weights = gaussian_nodes(48)
    values, slopes = legendre_functions(42, nodes)
    for m in (0, 1, 7, 42):
        gram = (values[m] * weights / 2) @ values[m].T
        expected = torch.diag((torch.arange(43) >= m).double())
        assert_close(gram, expected, atol=1e-12, rtol=0)
    step = 1e-6
    ahead, behind = (legendre_functions(42, nodes + sign * step)[0] for sign in (1, -1))
    numeric = (1 - nodes.square()) * (ahead - behind) / (2 * step)
    assert_close(slopes, numeric, atol=1e-5, rtol=1e-6)


def test_coefficients_give_mean_and_mean_square():
    coefficients = random_coefficients(T21)
    field = T21.synthesize(coefficients)
    _, weights = gaussian_nodes(32)
    mean = (field.mean(-1) * weights / 2).sum()
    assert_close(mean, coefficients[0, 0].real)
    power = coefficients.abs().square()
    assert_close(
        (field.square().mean(-1) * weights / 2).sum(), power[0].sum() + 2 * power[1:].sum()
    )


def test_wind_of_vorticity_and_divergence_and_back():
    vorticity, divergence = 1e-5 * random_coefficients(T21, 2, 4)
    for field in (vorticity, divergence):
        field[..., 0, 0] = 0
    u, v = T21.wind(vorticity, divergence)
    vorticity_back, divergence_back = T21.vorticity_divergence(u, v)
    assert (vorticity_back - vorticity).abs().max() < 1e-17
    assert (divergence_back - divergence).abs().max() < 1e-17


def test_solid_body_rotation_has_vorticity_twice_its_spin():
    lat, _ = angles(T21)
    u = 10 * lat.cos()
    vorticity, divergence = T21.vorticity_divergence(u, torch.zeros_like(u))
    expected = 2 * 10 / EARTH_RADIUS_M * lat.sin()
    assert_close(T21.synthesize(vorticity), expected, atol=1e-18, rtol=1e-12)
    assert divergence.abs().max() < 1e-19


def test_gradient_of_known_fields():
    lat, lon = angles(T21)
    east, north = T21.gradient(T21.analyze(lat.cos() ** 2 * (2 * lon).sin()))
    expected_east = 2 * lat.cos() * (2 * lon).cos() / EARTH_RADIUS_M
    expected_north = -2 * lat.cos() * lat.sin() * (2 * lon).sin() / EARTH_RADIUS_M
    assert_close(east, expected_east, atol=1e-18, rtol=1e-12)
    assert_close(north, expected_north, atol=1e-18, rtol=1e-12)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_divergence_of_gradient_is_laplacian_and_its_curl_vanishes(seed):
    coefficients = random_coefficients(T21, seed=seed)
    curl, divergence = T21.vorticity_divergence(*T21.gradient(coefficients))
    scale = T21.laplacian.abs().max()
    assert (divergence - coefficients * T21.laplacian).abs().max() < 1e-12 * scale
    assert curl.abs().max() < 1e-12 * scale


def test_transforms_are_differentiable_from_float32():
    field = torch.randn(32, 64, dtype=torch.float32, requires_grad=True)
    T21.synthesize(T21.analyze(field)).square().sum().backward()
    assert field.grad is not None
    assert field.grad.abs().sum() > 0


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="more than 42 longitudes"):
        SphericalTransform(21, 32, 42)
    with pytest.raises(ValueError, match=r"\(32, 64\)"):
        T21.analyze(torch.zeros(64, 32))
