import math

import pytest
import torch
from torch.testing import assert_close

from weather.baselines.covariance import gaspari_cohn
from weather.baselines.minimizer import DenseControl, adjoint_increment
from weather.baselines.spectral_covariance import (
    LinearBalance,
    SpectralCovariance,
    correlation_spectrum,
)
from weather.grid import great_circle_km
from weather.models.leapfrog import GRAVITY, ROTATION
from weather.spherical import EARTH_RADIUS_M, SphericalTransform
from weather.state import SHALLOW_WATER, ChannelSpec

TRANSFORM = SphericalTransform(10, 16, 32)
SMALL = SphericalTransform(6, 10, 20)
GRID = TRANSFORM.grid
SCALAR = ChannelSpec(surface=("height",))
POINTS = 16 * 32


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def variance_of(b):
    """The diagonal of B (n,), in blocks."""
    return torch.cat([b.block(rows, rows).diagonal() for rows in torch.arange(b.size).split(256)])


def legendre(cosine, truncation):
    """Polynomials P_0 to P_T by the recurrence of Bonnet."""
    found = [torch.ones_like(cosine), cosine]
    for n in range(1, truncation):
        found.append(((2 * n + 1) * cosine * found[n] - n * found[n - 1]) / (n + 1))
    return torch.stack(found)


def test_a_scalar_has_the_covariance_of_its_spectrum():
    """Addition theorem: B(x, y) = sum over l of (2 l + 1) S_l P_l(cos distance)."""
    spectrum = torch.rand(11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    b = SpectralCovariance(TRANSFORM, SCALAR, spectrum[:, None, None])
    rows = torch.tensor([0, 37, 300, 511])
    lat, lon = GRID.latitude.repeat_interleave(32), GRID.longitude.repeat(16)
    angle = great_circle_km(lat[rows, None], lon[rows, None], lat, lon) / 6371.0
    terms = legendre(angle.cos(), 10)
    expected = torch.einsum("l,lrp->rp", (2 * torch.arange(11) + 1) * spectrum, terms)
    assert_close(b.block(rows), expected, rtol=0, atol=1e-11)
    assert_close(b.block(rows, rows), expected[:, rows], rtol=0, atol=1e-11)
    total = ((2 * torch.arange(11) + 1) * spectrum).sum().expand(POINTS)
    assert_close(variance_of(b), total, rtol=1e-12, atol=0)


def test_winds_have_the_stated_deviation_and_no_preferred_direction():
    b = SpectralCovariance.univariate(
        TRANSFORM, SHALLOW_WATER, torch.tensor([20.0, 3.0, 3.0]), length_km=3000.0
    )
    variance = variance_of(b).view(3, POINTS)
    expected = torch.tensor([400.0, 9.0, 9.0], dtype=torch.float64)[:, None]
    assert_close(variance, expected.expand(3, POINTS))


def test_gaspari_cohn_spectrum_gives_the_function_back():
    spectrum = correlation_spectrum(lambda km: gaspari_cohn(km / 3000.0), 30)
    assert (spectrum >= 0).all()
    km = torch.linspace(0, 9000, 50, dtype=torch.float64)
    terms = legendre((km / 6371.0).cos(), 30)
    found = ((2 * torch.arange(31) + 1) * spectrum) @ terms
    assert_close(found, gaspari_cohn(km / 3000.0), rtol=0, atol=2e-3)
    assert found[0].item() == pytest.approx(1.0, abs=1e-12)


def random_spectra(seed=2):
    root = random(11, 3, 3, seed=seed) * torch.linspace(1, 0.1, 11).double()[:, None, None]
    root[0, 1:] = 0  # a wind has no mean vorticity or divergence
    spectra = root @ root.mT
    scale = torch.tensor([30.0, 1e-5, 3e-6], dtype=torch.float64)
    return spectra * scale * scale[:, None]


@pytest.mark.parametrize("balance", [None, torch.linspace(0.5, 1.0, 11, dtype=torch.float64)])
def test_the_adjoint_of_u(balance):
    b = SpectralCovariance(TRANSFORM, SHALLOW_WATER, random_spectra(), balance=balance)
    v, x = random(2, b.num_controls, seed=3), random(2, b.size, seed=4)
    assert_close(
        (b.increment(v) * x).sum(1), (v * adjoint_increment(b, x)).sum(1), rtol=1e-12, atol=0
    )
    rows = torch.tensor([5, POINTS + 70, 2 * POINTS + 300])
    assert_close(b.block(rows, rows), b.block(rows, rows).T)


def test_samples_drawn_from_it_give_the_spectra_back():
    balance = torch.linspace(0.9, 0.4, 7, dtype=torch.float64)
    spectra = random_spectra()[:7]
    spectra[:, 0, 1:] = spectra[:, 1:, 0] = 0  # what is left of the height knows no wind
    truth = SpectralCovariance(SMALL, SHALLOW_WATER, spectra, balance=balance)
    with torch.no_grad():
        samples = truth.increment(random(2000, truth.num_controls, seed=5)).view(2000, 3, 10, 20)
    found = SpectralCovariance.from_samples(samples, SMALL, SHALLOW_WATER, balanced=True)
    assert_close(found.balance[1:], balance[1:], rtol=0.05, atol=0)
    variance = variance_of(truth)
    assert_close(variance_of(found), variance, rtol=0.1, atol=0)
    rows = torch.tensor([70, 270, 470])
    sample = samples.flatten(1)
    expected = sample[:, rows].T @ sample / 2000
    deviation = variance.sqrt()
    error = (found.block(rows) - expected) / deviation[rows, None] / deviation
    assert error.abs().max() < 0.1
    free = SpectralCovariance.from_samples(samples, SMALL, SHALLOW_WATER)
    height_and_wind = free.block(torch.tensor([70]))[0, 200:]
    balanced = found.block(torch.tensor([70]))[0, 200:]
    assert balanced.abs().max() > 3 * height_and_wind.abs().max()


def test_linear_balance_in_closed_form():
    """Solid rotation w: g dh/dlat = -f u a gives h = -w a**2 omega sin**2 / g, up to a constant."""
    rate = 1e-6
    sine = GRID.latitude.deg2rad().sin()[:, None].expand(16, 32)
    vorticity = TRANSFORM.analysis(TRANSFORM.pack_grid(2 * rate * sine[None]))
    height = TRANSFORM.synthesis(LinearBalance(TRANSFORM).height(vorticity))
    expected = -rate * EARTH_RADIUS_M**2 * ROTATION * (sine.square() - 1 / 3) / GRAVITY
    assert_close(TRANSFORM.unpack_grid(height, torch.Size([1]))[0], expected, rtol=1e-10, atol=1e-9)


def test_the_wind_of_one_height_observation_goes_round_it():
    """In the north, high pressure has westerlies on its northern side; south of the equator not."""
    length = 3000.0
    b = SpectralCovariance.univariate(
        TRANSFORM, SHALLOW_WATER, torch.tensor([5.0, 3.0, 3.0]), length_km=length
    )
    spectra = torch.zeros(11, 3, 3, dtype=torch.float64)
    scalar = correlation_spectrum(lambda km: gaspari_cohn(km / length), 10)
    spectra[:, 1, 1] = scalar * TRANSFORM.laplacian.square() * 1e13
    spectra[:, 0, 0] = scalar
    balanced = SpectralCovariance(
        TRANSFORM, SHALLOW_WATER, spectra, balance=torch.ones(11, dtype=torch.float64)
    )
    for row, sign in ((4, 1), (11, -1)):  # 45 degrees north, and south
        line = balanced.block(torch.tensor([row * 32 + 10])).view(3, 16, 32)
        assert line[0, row, 10] == line[0].max()
        poleward = row - 2 * sign
        assert line[1, poleward, 10] > 0
        assert line[1, row + 2 * sign, 10] < 0
        assert sign * line[2, row, 12] < 0 < sign * line[2, row, 8]
    apart = b.block(torch.tensor([4 * 32 + 10])).view(3, 16, 32)
    assert apart[1:].abs().max() < 1e-12


def test_a_dense_root_is_a_root():
    root = random(6, 4, seed=7)
    b = root @ root.T  # singular
    control = DenseControl(b)
    u = control.increment(torch.eye(6, dtype=torch.float64))
    assert_close(u @ u.T, b, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"square matrix, found shape \(6, 4\)"):
        DenseControl(root)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"expected spectra \(11, 3, 3\)"):
        SpectralCovariance(TRANSFORM, SHALLOW_WATER, torch.zeros(11, 2, 2))
    with pytest.raises(ValueError, match="u_component_of_wind and v_component_of_wind belong"):
        SpectralCovariance(TRANSFORM, ChannelSpec(("u_component_of_wind",)), torch.zeros(11, 1, 1))
    factors = torch.ones(11)
    with pytest.raises(ValueError, match="linear balance needs the channels height and one wind"):
        SpectralCovariance(TRANSFORM, SCALAR, torch.zeros(11, 1, 1), balance=factors)
    for sd, length in ((0.0, 100.0), (1.0, -1.0), (math.nan, 100.0)):
        with pytest.raises(ValueError, match="deviation and length_km must be positive"):
            SpectralCovariance.univariate(TRANSFORM, SCALAR, torch.tensor([sd]), length_km=length)
