"""One semi-implicit step of the primitive equations, by vertical normal modes."""

import torch
from torch import Tensor, nn

from weather.models.earth import GAS_CONSTANT, KAPPA
from weather.models.held_suarez.layout import PrimitiveFields, PrimitiveLayout
from weather.models.held_suarez.sigma_levels import SigmaLevels
from weather.spherical import SphericalTransform


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
