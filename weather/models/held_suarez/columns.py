"""Nonlinear tendencies of the primitive equations, column by column on the grid."""

from typing import NamedTuple

import torch
from torch import Tensor

from weather.models.earth import GAS_CONSTANT, KAPPA
from weather.models.held_suarez.sigma_levels import SigmaLevels


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
    pull_x, pull_y = GAS_CONSTANT * air.slope_x, GAS_CONSTANT * air.slope_y
    force_x = torch.addcmul(air.absolute_vorticity * air.v, air.temperature, pull_x, value=-1)
    force_y = torch.addcmul(air.absolute_vorticity * air.u, air.temperature, pull_y).neg_()
    # Compression heats by kappa omega / p = kappa (source @ residual - divergence), and the
    # reference temperature by the part of it that is not linear.
    gain = (source @ levels.residual).mul_(KAPPA).add_(air.divergence, alpha=1 - KAPPA)
    heating = (along_slope @ levels.residual).mul_(KAPPA * reference_temperature)
    heating.addcmul_(air.temperature, gain)
    for rate, field in ((force_x, air.u), (force_y, air.v), (heating, air.temperature)):
        subtract_vertical_advection(rate, field, lift, levels.thickness)
    return ColumnTendencies(
        force_x=force_x,
        force_y=force_y,
        energy=torch.addcmul(air.u * air.u, air.v, air.v).mul_(0.5),
        heating=heating,
        surface=-along_slope.mean(-1, keepdim=True),
    )


def subtract_vertical_advection(
    rate: Tensor, field: Tensor, lift: Tensor, thickness: float
) -> None:
    """Take the vertical advection off a tendency, in place.

    It is velocity times difference, averaged over both edges of a layer.

    Args:
        rate: Tendency (..., L).
        field: What is carried (..., L).
        lift: Sigma velocity at the inner edges (..., L - 1), s-1.
        thickness: Of the layers, in sigma.
    """
    carried = lift * (field[..., 1:] - field[..., :-1])
    for layers in (rate[..., 1:], rate[..., :-1]):
        layers.sub_(carried, alpha=0.5 / thickness)
