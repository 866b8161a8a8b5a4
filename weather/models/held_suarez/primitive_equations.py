"""Primitive equations in sigma layers: tendencies column by column, and one semi-implicit step.

Vertical discretization by Durran (2010), section 8; steps by vertical normal modes.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from weather.models.leapfrog import GAS_CONSTANT, KAPPA
from weather.spherical import SphericalTransform


class PrimitiveFields(NamedTuple):
    """Prognostic fields of N members in L layers; leading dimensions are those of the tensor.

    Attributes:
        vorticity: (..., N, L), s-1.
        divergence: (..., N, L), s-1.
        temperature: (..., N, L), departure from the reference, K.
        surface: (..., N, 1), logarithm of the surface pressure over the reference.
    """

    vorticity: Tensor
    divergence: Tensor
    temperature: Tensor
    surface: Tensor


class PrimitiveLayout:
    """The last dimension K = N (3 L + 1): fields outermost, then members, then layers.

    Args:
        num_layers: L.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers

    def members(self, packed: Tensor) -> int:
        """Return N."""
        return packed.shape[-1] // (3 * self.num_layers + 1)

    def split(self, packed: Tensor) -> PrimitiveFields:
        """Return the fields of (..., K)."""
        members = self.members(packed)
        block = members * self.num_layers
        shape = (*packed.shape[:-1], members, self.num_layers)
        vorticity, divergence, temperature = (
            packed[..., i * block : (i + 1) * block].reshape(shape) for i in range(3)
        )
        return PrimitiveFields(
            vorticity, divergence, temperature, packed[..., 3 * block :].unsqueeze(-1)
        )

    def join(
        self, vorticity: Tensor, divergence: Tensor, temperature: Tensor, surface: Tensor
    ) -> Tensor:
        """Undo `split`."""
        upper = [field.flatten(-2) for field in (vorticity, divergence, temperature)]
        return torch.cat((*upper, surface.squeeze(-1)), dim=-1)


class SigmaLevels(nn.Module):
    """Operators between L equidistant sigma layers, counted from the top.

    Args:
        num_layers: L.

    Attributes:
        centers: Sigma at the centers (L,).
        thickness: 1 / L.
        hydrostatic: (L, L), temperature to geopotential above the surface, J kg-1 K-1.
        compression: (L, L), the sum of divergence and advection of ln ps to the part of omega / p
            that it takes away.
        lift: (L, L - 1), the same sum to the sigma velocity at the inner edges, s-1.
        residual: (L, L), one minus `compression`.

    Raises:
        ValueError: There are fewer than two layers.
    """

    centers: Tensor
    hydrostatic: Tensor
    compression: Tensor
    lift: Tensor
    residual: Tensor

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        if num_layers < 2:
            raise ValueError(f"num_layers must be at least 2, got {num_layers}")
        self.num_layers = num_layers
        self.thickness = 1 / num_layers
        edges = torch.linspace(0, 1, num_layers + 1, dtype=torch.float64)
        centers = (edges[1:] + edges[:-1]) / 2
        half_logs = (torch.cat((centers[1:], edges[-1:])) / centers).log()
        half_logs[:-1] /= 2  # the last reaches from the lowest center to the surface
        ones = torch.ones(num_layers, num_layers, dtype=torch.float64)
        # weights[j, k]: how much of a quantity of layer j, summed from the top, acts in layer k
        weights = ones.triu() * half_logs
        weights[:, 1:] += ones.triu(1)[:, 1:] * half_logs[:-1]
        operators = {
            "centers": centers,
            "hydrostatic": GAS_CONSTANT * weights.T,
            "compression": weights,
            "lift": self.thickness * (edges[1:-1] - ones.triu()[:, :-1]),
            "residual": torch.eye(num_layers, dtype=torch.float64) - weights,
        }
        for name, operator in operators.items():
            self.register_buffer(name, operator.contiguous(), persistent=False)


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


class PrimitiveStep(nn.Module):
    """Advance the coefficients by a time interval with given nonlinear tendencies.

    Gravity waves about an isothermal atmosphere at rest are averaged over both ends of the interval
    (Hoskins and Simmons, 1975). With k = l (l + 1) / a**2, half interval s, hydrostatic matrix G,
    reference temperature R, H = kappa R (compression matrix) and p = ln ps, the implicit part is
    ``d+ = d- + ... + s k (G (T+ + T-) + gas R (p+ + p-))``, ``T+ = T- + ... - s H (d+ + d-)`` and
    ``p+ = p- + ... - s mean(d+ + d-)``. The matrix that couples the layers of d is the same at all
    wavenumbers up to the factor s**2 k, so one eigenbasis of it decouples them all.

    Args:
        transform: The spherical transform.
        levels: The vertical operators.
        interval: Seconds from the old to the new state: one or two time steps.
        reference_temperature: R, K.
        friction: Damping rate of the wind in every layer (L,), s-1.
        diffusion: Damping rate of every total wavenumber (T + 1,), s-1.
    """

    to_modes: Tensor
    from_modes: Tensor
    pull: Tensor
    surface_pull: Tensor
    heating: Tensor
    outflow: Tensor
    wave: Tensor
    implicit: Tensor
    damping: Tensor
    filter: Tensor

    def __init__(
        self,
        transform: SphericalTransform,
        levels: SigmaLevels,
        interval: float,
        *,
        reference_temperature: float,
        friction: Tensor,
        diffusion: Tensor,
    ) -> None:
        super().__init__()
        self.interval = interval
        half = interval / 2
        self.layout = PrimitiveLayout(levels.num_layers)
        outflow = torch.full((levels.num_layers, 1), levels.thickness, dtype=torch.float64)
        surface = torch.full_like(outflow.T, GAS_CONSTANT * reference_temperature)
        heating = KAPPA * reference_temperature * levels.compression
        # Symmetric, because hydrostatic and compression are adjoint: the modes are orthonormal.
        squared_speeds, to_modes = torch.linalg.eigh(
            heating @ levels.hydrostatic + outflow @ surface
        )
        wave = -half * transform.laplacian[:, None, None]
        buffers = {
            "to_modes": to_modes,
            "from_modes": to_modes.T,
            "pull": levels.hydrostatic @ to_modes,
            "surface_pull": surface @ to_modes,
            "heating": half * heating,
            "outflow": half * outflow,
            "wave": wave,
            "implicit": 1 / (1 + half * wave * squared_speeds),
            "damping": 1 - interval * friction,
            "filter": torch.exp(-interval * diffusion)[:, None],
        }
        for name, value in buffers.items():
            self.register_buffer(name, value.contiguous(), persistent=False)

    def forward(self, previous: Tensor, tendency: PrimitiveFields) -> Tensor:
        """Return the state at the end of the interval.

        Args:
            previous: State at the start (2, M, L, K) in the layout of `PrimitiveLayout`.
            tendency: Tendencies without gravity waves and damping, fields of (2, M, L, N, layers).
        """
        old_vorticity, old_divergence, old_temperature, old_surface = self.layout.split(previous)
        span = self.interval
        vorticity = (old_vorticity * self.damping).add_(tendency.vorticity, alpha=span)
        divergence = (old_divergence * self.damping).add_(tendency.divergence, alpha=span)
        temperature = torch.add(old_temperature, tendency.temperature, alpha=span)
        temperature -= old_divergence @ self.heating
        surface = torch.add(old_surface, tendency.surface, alpha=span)
        surface -= old_divergence @ self.outflow
        pull = (temperature + old_temperature) @ self.pull
        pull = torch.addcmul(pull, surface + old_surface, self.surface_pull)
        modes = torch.addcmul(divergence @ self.to_modes, pull, self.wave)
        divergence = (modes * self.implicit) @ self.from_modes
        temperature = temperature - divergence @ self.heating
        surface = surface - divergence @ self.outflow
        return self.layout.join(vorticity, divergence, temperature, surface) * self.filter
