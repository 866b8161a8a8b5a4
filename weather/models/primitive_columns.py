"""Nonlinear tendencies of the primitive equations, column by column on the grid."""

from typing import NamedTuple

import torch
from torch import Tensor

from weather.models.earth import GAS_CONSTANT, KAPPA
from weather.models.sigma_levels import SigmaLevels


class Columns(NamedTuple):
    """Fields on the grid, (W, H, N, L); those of the surface (W, H, N, 1).

    Attributes:
        u: Eastward wind, m/s.
        v: Northward wind, m/s.
        slope_x: Eastward derivative of ln ps, m-1.
        slope_y: Northward derivative of ln ps, m-1.
        absolute_vorticity: s-1.
        divergence: s-1.
        temperature: Departure from the reference, K.
    """

    u: Tensor
    v: Tensor
    slope_x: Tensor
    slope_y: Tensor
    absolute_vorticity: Tensor
    divergence: Tensor
    temperature: Tensor


class ColumnTendencies(NamedTuple):
    """What drives the prognostic fields, (W, H, N, L) except `surface`.

    Attributes:
        force_x: Eastward acceleration without the gradient of energy and geopotential, m s-2.
        force_y: Northward acceleration without them, m s-2.
        energy: Kinetic energy, m2 s-2.
        heating: Of temperature, without horizontal advection in flux form, K s-1.
        surface: Of ln ps, without the divergence (W, H, N, 1), s-1.
    """

    force_x: Tensor
    force_y: Tensor
    energy: Tensor
    heating: Tensor
    surface: Tensor


def column_tendencies(
    air: Columns, levels: SigmaLevels, reference_temperature: float
) -> ColumnTendencies:
    """Return the tendencies of Durran (2010, section 8.6) in vorticity-divergence form."""
    along_slope = torch.addcmul(air.u * air.slope_x, air.v, air.slope_y)
    source = air.divergence + along_slope
    lift = source @ levels.lift

    def carried(field: Tensor) -> Tensor:
        return ((field @ levels.difference) * lift) @ levels.advection

    pressure = GAS_CONSTANT * air.temperature
    force_x = torch.addcmul(air.absolute_vorticity * air.v, pressure, air.slope_x, value=-1)
    force_y = torch.addcmul(air.absolute_vorticity * air.u, pressure, air.slope_y)
    omega = along_slope - source @ levels.compression  # over pressure
    forced = along_slope - along_slope @ levels.compression  # without the linear part
    compression = torch.addcmul(reference_temperature * forced, air.temperature, omega)
    heating = torch.addcmul(KAPPA * compression, air.temperature, air.divergence)
    return ColumnTendencies(
        force_x=force_x - carried(air.u),
        force_y=-force_y - carried(air.v),
        energy=0.5 * torch.addcmul(air.u * air.u, air.v, air.v),
        heating=heating - carried(air.temperature),
        surface=-along_slope.mean(-1, keepdim=True),
    )
