"""Grids, their areas, regridding between them, and spherical harmonics."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from weather.grid import (
    Grid,
    Regridder,
    gaussian_grid,
    gaussian_nodes,
    great_circle_km,
    regular_grid,
)
from weather.spherical import EARTH_RADIUS_M, SphericalTransform, legendre_functions

GOLDEN = Path(__file__).parents[1] / "golden" / "weather"


@pytest.mark.parametrize("name", ["wb2_asc_with_poles", "wb2_desc_no_poles"])
def test_area_weights_equal_weatherbench(name):
    with np.load(GOLDEN / f"{name}.npz") as golden:
        grid = Grid(torch.tensor(golden["latitude"]), torch.tensor(golden["longitude"]))
        expected = torch.tensor(golden["wb2_lat_weights_for_given_order"])
    assert_close(grid.area_weights(), expected, rtol=1e-12, atol=0)


def test_area_mean_of_zonal_fields(refused):
    grid = regular_grid(181, 4, poles=True)
    sine = grid.latitude.deg2rad().sin()[:, None].expand(grid.shape)
    assert grid.area_mean(sine.square()).item() == pytest.approx(1 / 3, abs=1e-4)
    assert grid.area_mean(torch.full((2, *grid.shape), 3.0)).tolist() == pytest.approx([3.0, 3.0])
    refused("181", grid.area_mean, torch.zeros(4, 181), error=ValueError)


def test_grids_run_from_north_to_south_and_from_zero_eastwards():
    for grid in (gaussian_grid(32, 64), regular_grid(32, 64, poles=False)):
        assert grid.shape == (32, 64)
        assert (grid.latitude.diff() < 0).all()
        assert (grid.longitude[0], grid.longitude[1]) == (0, 5.625)
        assert_close(grid.latitude, -grid.latitude.flip(0), atol=1e-12, rtol=0)
    assert regular_grid(32, 64, poles=False).latitude[0] == 90 - 90 / 32
    assert regular_grid(33, 64, poles=True).latitude[[0, -1]].tolist() == [90, -90]
    assert gaussian_grid(32, 64).latitude[0].item() == pytest.approx(85.7605871, abs=1e-6)


def test_gaussian_quadrature_is_exact_for_polynomials():
    nodes, weights = gaussian_nodes(8)
    for degree in range(16):
        exact = 0 if degree % 2 else 2 / (degree + 1)
        assert (weights * nodes**degree).sum().item() == pytest.approx(exact, abs=1e-14)


def test_bounds_cover_the_sphere_once():
    grid = Grid(torch.tensor([-60.0, 0.0, 80.0]), torch.tensor([-180.0, -90.0, 0.0, 100.0]))
    assert grid.latitude_bounds().tolist() == [-90, -30, 40, 90]
    assert grid.longitude_bounds().tolist() == [-220, -135, -45, 50, 140]


def test_distances():
    degrees = torch.tensor([[0.0, 0, 0, 90], [0, 0, 90, 37], [60, 10, 60, 190], [50, 8, 50, 8]])
    expected = 6371 * torch.tensor([math.pi / 2, math.pi / 2, math.pi / 3, 0])
    assert_close(great_circle_km(*degrees.double().T), expected.double(), atol=1e-3, rtol=1e-6)
    antipode = great_circle_km(*torch.tensor([30.0, 10, -30, 190]).double())
    assert antipode.item() == pytest.approx(6371 * math.pi)


def test_equal_grids_compare_and_hash_equal():
    assert gaussian_grid(4, 8) == gaussian_grid(4, 8)
    assert len({gaussian_grid(4, 8), gaussian_grid(4, 8), regular_grid(4, 8, poles=True)}) == 2
    assert gaussian_grid(4, 8) != "grid"


@pytest.mark.parametrize(
    ("latitude", "longitude", "message"),
    [
        ([0.0, 10.0, 5.0], [0.0, 90.0], "rise or fall"),
        ([0.0, 95.0], [0.0, 90.0], "-90, 90"),
        ([0.0, 10.0], [0.0, 90.0, 360.0], "repeated meridian"),
        ([0.0, 10.0], [180.0, -180.0], "increase"),
        ([0.0, float("nan")], [0.0], "finite"),
        ([], [0.0], "finite"),
    ],
)
def test_bad_coordinates_are_refused(latitude, longitude, message, refused):
    refused(message, Grid, torch.tensor(latitude), torch.tensor(longitude), error=ValueError)


def test_the_difference_of_grids():
    grid = gaussian_grid(16, 32)
    rounded = Grid(grid.latitude.float(), grid.longitude.float())
    assert grid != rounded
    assert 0 < grid.difference(rounded) < 1e-5
    assert grid.difference(Grid(grid.latitude, grid.longitude + 0.25)) == 0.25
    assert grid.difference(Grid(grid.latitude - 0.5, grid.longitude)) == 0.5
    assert grid.difference(gaussian_grid(16, 16)) == math.inf


GRIDS = {
    "gaussian": gaussian_grid(32, 64),
    "no poles": regular_grid(15, 30, poles=False),
    "poles": regular_grid(61, 120, poles=True),
    "ascending from -180": Grid(
        torch.linspace(-90, 90, 19, dtype=torch.float64), torch.arange(-180.0, 180.0, 10.0)
    ),
    "uneven": Grid(
        torch.tensor([80.0, 50.0, 47.0, -10.0, -70.0]), torch.tensor([3.0, 20.0, 100.0, 359.0])
    ),
}
PAIRS = [(a, b) for a in GRIDS for b in GRIDS if a != b]


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_conservative_keeps_the_area_mean(source, target):
    source, target = GRIDS[source], GRIDS[target]
    field = torch.randn(3, *source.shape, dtype=torch.float64)
    regridded = Regridder(source, target)(field)
    assert regridded.shape == (3, *target.shape)
    widths = [grid.longitude_bounds().diff() / 360 for grid in (source, target)]
    means = [
        (values * width).sum(-1) @ (grid.area_weights() / len(grid.latitude))
        for values, width, grid in zip((field, regridded), widths, (source, target), strict=True)
    ]
    assert_close(means[1], means[0], atol=1e-13, rtol=0)


@pytest.mark.parametrize("method", ["conservative", "bilinear"])
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_constants_stay_and_no_new_extremes_appear(source, target, method):
    regridder = Regridder(GRIDS[source], GRIDS[target], method)
    ones = regridder(torch.full(GRIDS[source].shape, 7.0, dtype=torch.float64))
    assert_close(ones, torch.full_like(ones, 7.0), atol=1e-13, rtol=0)
    field = torch.rand(GRIDS[source].shape, dtype=torch.float64)
    regridded = regridder(field)
    assert regridded.min() >= field.min() - 1e-12
    assert regridded.max() <= field.max() + 1e-12
    assert regridded.std() > 0.01


def test_conservative_averages_blocks_of_cells():
    fine, coarse = regular_grid(8, 12, poles=False), regular_grid(8, 4, poles=False)
    coarse = Grid(coarse.latitude, coarse.longitude + 30)  # three cells in one
    field = torch.randn(8, 12, dtype=torch.float64)
    expected = field.reshape(8, 4, 3).mean(-1)
    assert_close(Regridder(fine, coarse)(field), expected)
    assert_close(Regridder(coarse, fine)(expected), expected.repeat_interleave(3, dim=1))


@settings(max_examples=25, deadline=None)
@given(
    slope=st.floats(-5, 5),
    rows=st.integers(2, 40),
    columns=st.integers(1, 40),
    poles=st.booleans(),
)
def test_bilinear_is_exact_for_linear_fields(slope, rows, columns, poles):
    source = regular_grid(37, 72, poles=True)
    target = regular_grid(rows, columns, poles=poles)
    along = (source.longitude - 180).abs()  # linear on both sides of the date line and of 0
    field = 2 + slope * source.latitude[:, None] + along
    exact = 2 + slope * target.latitude[:, None] + (target.longitude - 180).abs()
    assert_close(Regridder(source, target, "bilinear")(field), exact, atol=1e-9, rtol=0)


def test_bilinear_keeps_the_outermost_rows_beyond_them():
    source, target = regular_grid(10, 4, poles=False), regular_grid(3, 4, poles=True)
    field = torch.randn(10, 4, dtype=torch.float64)
    assert_close(Regridder(source, target, "bilinear")(field)[[0, 2]], field[[0, -1]])


@pytest.mark.parametrize("method", ["conservative", "bilinear"])
def test_same_grid_is_the_identity(method):
    for grid in GRIDS.values():
        field = torch.randn(grid.shape, dtype=torch.float64)
        assert_close(Regridder(grid, grid, method)(field), field, atol=1e-12, rtol=0)


@pytest.mark.parametrize("method", ["conservative", "bilinear"])
def test_missing_values_spoil_only_what_they_contribute_to(method):
    source, target = GRIDS["poles"], GRIDS["gaussian"]
    regridder = Regridder(source, target, method)
    field = torch.randn(source.shape, dtype=torch.float64)
    whole = regridder(field)
    field[30, 60] = torch.nan  # equator, 180 E
    field[31, 60] = torch.inf
    holed = regridder(field)
    spoiled = holed.isnan()
    assert 1 <= spoiled.sum() <= 9
    assert torch.equal(holed[~spoiled], whole[~spoiled])
    assert spoiled[15:17, 31:34].any()
    assert not spoiled[:, :28].any()


def test_float32_fields_stay_float32():
    field = torch.randn(2, 61, 120)
    assert Regridder(GRIDS["poles"], GRIDS["gaussian"])(field).dtype == torch.float32


def test_bad_arguments_are_refused(refuses):
    refuses(
        ValueError,
        ("'cubic'", lambda: Regridder(GRIDS["poles"], GRIDS["gaussian"], "cubic")),
        (
            r"\(61, 120\)",
            lambda: Regridder(GRIDS["poles"], GRIDS["gaussian"])(torch.zeros(60, 120)),
        ),
    )


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
    assert (field.shape, field.dtype) == ((2, 3, *transform.grid.shape), torch.float64)
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
        assert_close(gram, torch.diag((torch.arange(43) >= m).double()), atol=1e-12, rtol=0)
    step = 1e-6
    ahead, behind = (legendre_functions(42, nodes + sign * step)[0] for sign in (1, -1))
    numeric = (1 - nodes.square()) * (ahead - behind) / (2 * step)
    assert_close(slopes, numeric, atol=1e-5, rtol=1e-6)


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
    assert_close((east, north), (expected_east, expected_north), atol=1e-18, rtol=1e-12)


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


def test_wrong_sizes_are_refused(refuses):
    refuses(
        ValueError,
        ("more than 42 longitudes", lambda: SphericalTransform(21, 32, 42)),
        (r"\(32, 64\)", lambda: T21.analyze(torch.zeros(64, 32))),
    )
