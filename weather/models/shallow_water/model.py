"""Stirred shallow water on the rotating sphere: a fast chaotic stand-in for the atmosphere.

Semi-implicit spectral model of relative vorticity, divergence and height of the free surface
(Hoskins and Simmons, 1975, reduced to one layer), with the triangular truncation of `spherical`.
"""

import torch
from torch import Tensor, nn

from weather.models.earth import GRAVITY, ROTATION
from weather.models.leapfrog import LeapfrogModel
from weather.models.noise import random_coefficients
from weather.models.shallow_water.forcing import (
    jet_profile,
    mountain_heights,
    stirring_pattern,
)
from weather.models.shallow_water.step import (
    DIVERGENCE,
    GEOPOTENTIAL,
    VORTICITY,
    SemiImplicitStep,
)
from weather.spherical import SphericalTransform
from weather.state import SHALLOW_WATER

MEMBER_NOISE = 5e-6
"""Root mean square of the vorticity noise by which initial members differ, s-1."""


class ShallowWater(LeapfrogModel):
    """Shallow water kept turbulent by jet relaxation, mountains and a fixed stirring pattern.

    The state is (height of the free surface in m, eastward wind, northward wind in m/s), on the
    Gaussian grid, north to south. Mass is conserved: neither relaxation nor diffusion acts on the
    mean height.

    Args:
        truncation: T of the triangular truncation.
        num_latitudes: Gaussian latitudes H.
        num_longitudes: Longitudes W.
        time_step: Seconds; divides six hours.
        stirring: Root mean square of the vorticity tendency that stirs the flow, s-2; a model with
            another value is a model with error.
        relaxation_days: Time scale of the relaxation to the balanced jets; ``inf`` turns it off.
        stirring_seed: Seed of the stirring pattern.
        drag_days: Time scale of the drag on the divergence; ``inf`` turns it off.
        mountains: Scale of the mountains; 0 is a flat bottom.
        mean_depth: Mean depth of the fluid, m.
        diffusion_hours: Time in which diffusion damps the smallest scale by e; ``inf`` turns it
            off.
        time_filter: Robert-Asselin coefficient.

    Raises:
        ValueError: A scale or the grid is out of range.
    """

    _offset: Tensor
    _jets: Tensor

    def __init__(
        self,
        *,
        truncation: int = 21,
        num_latitudes: int = 32,
        num_longitudes: int = 64,
        time_step: float = 3600.0,
        stirring: float = 2.5e-10,
        relaxation_days: float = 7.0,
        stirring_seed: int = 0,
        drag_days: float = 20.0,
        mountains: float = 1.0,
        mean_depth: float = 10000.0,
        diffusion_hours: float = 6.0,
        time_filter: float = 0.04,
    ) -> None:
        settings = {
            name: value for name, value in locals().items() if isinstance(value, int | float)
        }
        for name, scale in (
            ("relaxation_days", relaxation_days),
            ("drag_days", drag_days),
            ("mean_depth", mean_depth),
            ("diffusion_hours", diffusion_hours),
        ):
            if not scale > 0:
                raise ValueError(f"{name} must be positive, got {scale}")
        transform = SphericalTransform(truncation, num_latitudes, num_longitudes)
        super().__init__(
            transform.grid,
            SHALLOW_WATER,
            time_step=time_step,
            time_filter=time_filter,
            settings=settings,
        )
        self.transform = transform
        self.mean_depth = mean_depth
        self.register_buffer("_offset", _carried_offset(transform, mountains), persistent=False)
        waves = transform.fourier(transform.pack_grid(jet_profile(transform.grid)))
        jets = transform.curl(waves, torch.zeros_like(waves))
        pattern = transform.pack_coefficients(stirring_pattern(transform, stirring_seed))
        self._steps = nn.ModuleList(
            SemiImplicitStep(
                transform,
                span * time_step,
                mean_geopotential=GRAVITY * mean_depth,
                relaxation_days=relaxation_days,
                drag_days=drag_days,
                diffusion_hours=diffusion_hours,
                target=self.balance(jets),
                stirring=stirring * pattern,
            )
            for span in (1, 2)
        )
        self.register_buffer("_jets", jets, persistent=False)

    def initial_state(self, members: int, *, seed: int) -> Tensor:
        """Return the balanced jets plus balanced vorticity noise, (N, 3, H, W), float32."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.stack(
            [random_coefficients(self.transform, (1, 12), generator) for _ in range(members)]
        )
        vorticity = self._jets + MEMBER_NOISE * self.transform.pack_coefficients(noise)
        return self.to_state(self.balance(vorticity)).float()

    def balance(self, vorticity: Tensor) -> Tensor:
        """Return the state (2, M, L, 3, N) without divergence nor tendency of it.

        The height solves the nonlinear balance equation (Charney, 1955) for the vorticity
        (2, M, L, N), with the mean depth as its mean.
        """
        nothing = torch.zeros_like(vorticity)
        state = torch.stack((nothing, vorticity, nothing), dim=-2)
        pull = self.tendency(state)[..., DIVERGENCE, :]
        laplacian = self.transform.laplacian[:, None]
        state[..., GEOPOTENTIAL, :] = torch.where(laplacian < 0, pull / laplacian, 0.0)
        return state

    def to_spectral(self, state: Tensor) -> Tensor:
        """Transform (N, 3, H, W) to divergence, vorticity, geopotential (2, M, L, 3, N)."""
        fields = self.transform.pack_grid(state.transpose(0, 1))
        members = len(state)
        waves = self.transform.fourier(fields)
        height, u, v = (waves[..., i * members : (i + 1) * members] for i in range(3))
        geopotential = self.transform.legendre_analysis(height) * GRAVITY
        geopotential[0, 0, 0] -= GRAVITY * self.mean_depth
        return torch.stack(
            (self.transform.divergence(u, v), self.transform.curl(u, v), geopotential), dim=-2
        )

    def to_state(self, spectral: Tensor) -> Tensor:
        """Transform divergence, vorticity, geopotential (2, M, L, 3, N) to (N, 3, H, W)."""
        divergence, vorticity, geopotential = spectral.unbind(-2)
        u, v = self.transform.wind_synthesis(vorticity, divergence)
        height = self.transform.synthesis(geopotential) / GRAVITY + self.mean_depth
        return torch.stack((height, u, v), dim=-1).permute(2, 3, 1, 0).contiguous()

    def advance(self, previous: Tensor, current: Tensor, span: int) -> Tensor:
        """Return the coefficients ``span`` time steps after ``previous``."""
        step: Tensor = self._steps[span - 1](previous, self.tendency(current))
        return step

    def tendency(self, state: Tensor) -> Tensor:
        """Return the nonlinear tendencies (2, M, L, 3, N) in flux form.

        They are the curl and divergence of the flux of absolute vorticity, the Laplacian of the
        kinetic energy, and the divergence of the flux of the departure from the mean depth.
        """
        transform, members = self.transform, state.shape[-1]
        u, v = transform.wind_synthesis(state[..., VORTICITY, :], state[..., DIVERGENCE, :])
        carried = state[..., VORTICITY:, :] + self._offset
        carried = transform.synthesis(carried.flatten(-2))
        x, y = (transform.fourier(torch.cat((wind, wind), dim=-1) * carried) for wind in (u, v))
        energy = transform.analysis(torch.addcmul(u * u, v, v))
        spin = transform.curl(x[..., :members], y[..., :members])
        pull = torch.addcmul(spin, energy, transform.laplacian[:, None], value=-0.5)
        outflow = transform.divergence(x, y)
        rates = torch.cat((pull, -outflow), dim=-1)
        return rates.view(*rates.shape[:-1], 3, members)


def _carried_offset(transform: SphericalTransform, mountains: float) -> Tensor:
    """Return what turns vorticity and surface geopotential into the carried quantities.

    These are the planetary vorticity, s-1, and minus the geopotential of the bottom, m2 s-2, as
    coefficients (2, M, L, 2, 1).
    """
    grid = transform.grid
    planetary = 2 * ROTATION * grid.latitude.deg2rad().sin()[:, None].expand(grid.shape)
    bottom = GRAVITY * mountains * mountain_heights(grid)
    return transform.analysis(transform.pack_grid(torch.stack((planetary, -bottom)))).unsqueeze(-1)
