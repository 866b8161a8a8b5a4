import math

import torch
from torch.testing import assert_close

from weather.metrics import mean_spectrum, zonal_energy_spectrum, zonal_wavelength


def test_golden(golden, same):
    latitude = golden.latitude
    for number, name in enumerate(("geopotential", "u_component_of_wind")):
        spectrum = zonal_energy_spectrum(golden.truth[number], latitude)
        same(spectrum, getattr(golden, f"wb2_zonal_spectrum_{name}"))
    same(zonal_wavelength(latitude, 24), golden.wb2_zonal_wavelength_m)


def test_a_wave_has_its_energy_at_its_wavenumber():
    latitude = torch.tensor([60.0, 0.0]).double()
    longitude = torch.arange(16).double() * 2 * math.pi / 16
    field = (3 + 2 * (5 * longitude).cos()).expand(2, 16)
    spectrum = zonal_energy_spectrum(field, latitude)
    expected = torch.zeros(2, 9).double()
    expected[:, 0], expected[:, 5] = 9, 2
    length = 2 * math.pi * 6_367_500.0 * torch.tensor([0.5, 1.0]).double()
    assert_close(spectrum, expected * length[:, None])
    # The mean of 1 and 3 parts of area.
    average = mean_spectrum(field, latitude, torch.tensor([0.5, 1.5]))
    assert_close(average, (0.25 * spectrum[0] + 0.75 * spectrum[1]))
