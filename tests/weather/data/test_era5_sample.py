import numpy as np
import torch

from weather.data.shipped import ATTRIBUTION, load_era5_sample


def test_layout():
    fields, grid, channels, times = load_era5_sample()
    assert fields.shape == (10, 4, 4, 61, 120)
    assert fields.dtype == torch.float32
    assert channels.labels == ("z850", "z500", "t850", "t500")
    assert grid.latitude[[0, 1, -1]].tolist() == [90, 87, -90]
    assert grid.longitude[[0, 1, -1]].tolist() == [0, 3, 357]
    expected = np.array(["2017-01-01T00", "2017-01-01T12", "2017-01-02T00", "2017-01-02T12"])
    np.testing.assert_array_equal(times, expected.astype("datetime64[ns]"))
    assert "Copernicus" in ATTRIBUTION


def test_units_and_level_order():
    fields, grid, _, _ = load_era5_sample()
    z850, z500, t850, t500 = (fields * grid.area_weights()[:, None]).mean((0, 1, 3, 4)).tolist()
    assert 13_500 < z850 < 15_000  # m2 s-2
    assert 54_000 < z500 < 57_000
    assert 275 < t850 < 285  # K
    assert 255 < t500 < 265
    assert fields.isfinite().all()


def test_fields_stand_the_right_way_up():
    """In January the Arctic is colder at 850 hPa than the Antarctic, Siberia than the Pacific."""
    fields, grid, channels, _ = load_era5_sample()
    t850 = fields[:, :, channels.index("temperature", 850)].mean((0, 1))
    north, south = grid.latitude > 60, grid.latitude < -60
    assert t850[north].mean() < t850[south].mean()
    row = int((grid.latitude - 60).abs().argmin())
    assert t850[row, grid.longitude == 120] < t850[row, grid.longitude == 180] - 5


def test_member_zero_is_the_control():
    """The unperturbed member lies nearer to the mean of the others (9.4 against 13.9 m2 s-2)."""
    fields, grid, channels, _ = load_era5_sample()
    z500 = fields[:, :, channels.index("geopotential", 500)]
    weights = grid.area_weights()[:, None]
    spreads = []
    for member in range(10):
        others = torch.cat((z500[:member], z500[member + 1 :])).mean(0)
        spreads.append(((z500[member] - others) ** 2 * weights).mean().sqrt().item())
    assert 8.5 < spreads[0] < 10.5
    assert min(spreads[1:]) > 1.25 * spreads[0]
    assert 13 < sum(spreads[1:]) / 9 < 16
