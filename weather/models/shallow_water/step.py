"""One semi-implicit step of the shallow-water model, diagonal in wavenumber."""

import torch
from torch import Tensor, nn

from weather.models.earth import DAY
from weather.spherical import SphericalTransform

DIVERGENCE, VORTICITY, GEOPOTENTIAL = 0, 1, 2
"""Order of the prognostic fields in the spectral state (2, M, L, 3, N)."""


class SemiImplicitStep(nn.Module):
    """Advance the coefficients by a time interval with given nonlinear tendencies.

    Gravity waves are averaged over both ends of the interval (Robert, 1969), linear damping is
    taken at its start, and diffusion multiplies the result by an exponential filter of order 8.
    With k = l (l + 1) / a**2, mean geopotential G and half interval s, the implicit part is
    ``d+ = d- + ... + s k (p+ + p-)`` and ``p+ = p- + ... - s G (d+ + d-)``.

    Args:
        transform: The spherical transform.
        interval: Seconds from the old to the new state: one or two time steps.
        mean_geopotential: G, gravity times the mean depth, m2 s-2.
        relaxation_days: Time scale of vorticity and geopotential.
        drag_days: Time scale of divergence.
        diffusion_hours: E-folding time of the smallest scale.
        target: Spectral state (2, M, L, 3, 1) that the flow relaxes to.
        stirring: Vorticity tendency (2, M, L, 1), s-2.
    """

    keep: Tensor
    gain: Tensor
    forcing: Tensor
    mass: Tensor
    wave_new: Tensor
    wave_old: Tensor

    def __init__(
        self,
        transform: SphericalTransform,
        interval: float,
        *,
        mean_geopotential: float,
        relaxation_days: float,
        drag_days: float,
        diffusion_hours: float,
        target: Tensor,
        stirring: Tensor,
    ) -> None:
        super().__init__()
        degree, truncation = transform.degree, transform.truncation
        scale = (degree * (degree + 1) / (truncation * (truncation + 1))) ** 4
        diffusion = torch.exp(-interval / (diffusion_hours * 3600) * scale)
        rates = torch.zeros(len(degree), 3, dtype=torch.float64)  # (L, 3)
        rates[:, DIVERGENCE] = 1 / (drag_days * DAY)
        rates[:, VORTICITY] = 1 / (relaxation_days * DAY)
        rates[1:, GEOPOTENTIAL] = 1 / (relaxation_days * DAY)  # the mean is mass: not relaxed
        half = interval / 2
        wave = -transform.laplacian * half
        implicit = 1 / (1 + wave * half * mean_geopotential)
        scaling = diffusion[:, None].repeat(1, 3)
        scaling[:, DIVERGENCE] *= implicit
        sources = rates[:, :, None] * target
        sources[..., VORTICITY, :] += stirring
        self.pressure = half * mean_geopotential
        coefficients = {
            "keep": ((1 - interval * rates) * scaling)[..., None],
            "gain": (interval * scaling)[..., None],
            "forcing": interval * scaling[..., None] * sources,
            "mass": (-self.pressure * diffusion)[:, None],
            "wave_new": (wave * implicit)[:, None],
            "wave_old": (wave * implicit * diffusion)[:, None],
        }
        for name, value in coefficients.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, previous: Tensor, tendency: Tensor) -> Tensor:
        """Return the state at the end of the interval.

        Args:
            previous: State at the start (2, M, L, 3, N).
            tendency: Tendencies without gravity waves and damping (2, M, L, 3, N).
        """
        explicit = torch.addcmul(self.forcing, previous, self.keep)
        explicit = torch.addcmul(explicit, tendency, self.gain)
        old_divergence = previous[..., DIVERGENCE, :]
        partial = torch.addcmul(explicit[..., GEOPOTENTIAL, :], old_divergence, self.mass)
        divergence = torch.addcmul(explicit[..., DIVERGENCE, :], partial, self.wave_new)
        divergence = torch.addcmul(divergence, previous[..., GEOPOTENTIAL, :], self.wave_old)
        geopotential = torch.add(partial, divergence, alpha=-self.pressure)
        return torch.stack((divergence, explicit[..., VORTICITY, :], geopotential), dim=-2)
