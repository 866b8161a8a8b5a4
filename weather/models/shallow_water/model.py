"""Stirred shallow water on the rotating sphere: a fast chaotic stand-in for the atmosphere."""

import math

import torch
from torch import Tensor, nn

from weather.grid import EARTH_RADIUS_KM, Grid, great_circle_km
from weather.models.leapfrog import DAY, GRAVITY, ROTATION, LeapfrogModel, random_coefficients
from weather.spherical import SphericalTransform
from weather.state import SHALLOW_WATER

JETS = ((45.0, 60.0), (-45.0, 54.0))
"""Center (degrees) and peak (m/s) of the jets that the flow relaxes to."""

JET_HALF_WIDTH = math.pi / 7.5
"""Distance in latitude, rad, at which a jet vanishes."""

MOUNTAINS = ((45.0, 90.0, 1000.0, 15.0), (40.0, 250.0, 800.0, 12.0), (-25.0, 290.0, 600.0, 10.0))
"""Latitude, longitude (degrees), height (m) and e-folding radius (degrees) of the mountains."""

STIRRED_DEGREES = (5, 12)
"""Smallest and largest total wavenumber that is stirred."""


def jet_profile(grid: Grid) -> Tensor:
    """Return the eastward wind (H, W), m/s, of the jets, smooth and of compact support.

    A jet is ``peak exp(1 - 1 / (1 - x**2))`` for ``|x| < 1``, where x is the distance in latitude
    from its center over the half width (the profile of Galewsky et al., 2004).
    """
    wind = torch.zeros_like(grid.latitude)
    for center, peak in JETS:
        distance = (grid.latitude - center).deg2rad() / JET_HALF_WIDTH
        inside = (1 - distance.square()).clamp(min=1e-6)
        wind += torch.where(distance.abs() < 1, peak * torch.exp(1 - 1 / inside), 0.0)
    return wind[:, None].expand(grid.shape)


def mountain_heights(grid: Grid) -> Tensor:
    """Return the height (H, W), m, of the Gaussian mountains."""
    heights = torch.zeros(grid.shape, dtype=torch.float64)
    for latitude, longitude, peak, radius in MOUNTAINS:
        place = grid.latitude.new_tensor([latitude, longitude])
        distance = great_circle_km(grid.latitude[:, None], grid.longitude, place[0], place[1])
        heights += peak * torch.exp(-((distance / EARTH_RADIUS_KM).rad2deg() / radius).square())
    return heights


def stirring_pattern(transform: SphericalTransform, seed: int) -> Tensor:
    """Return a fixed random pattern (1, M, L), complex coefficients, of mean square 1."""
    return random_coefficients(transform, STIRRED_DEGREES, torch.Generator().manual_seed(seed))[
        None
    ]


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
        partial = torch.addcmul(
            explicit[..., GEOPOTENTIAL, :], previous[..., DIVERGENCE, :], self.mass
        )
        divergence = torch.addcmul(explicit[..., DIVERGENCE, :], partial, self.wave_new)
        divergence = torch.addcmul(divergence, previous[..., GEOPOTENTIAL, :], self.wave_old)
        return torch.stack(
            (
                divergence,
                explicit[..., VORTICITY, :],
                torch.add(partial, divergence, alpha=-self.pressure),
            ),
            dim=-2,
        )


FASTEST = 1.75
"""Courant number ``T U dt / a`` of the fastest wind U beyond which the time step is halved."""

MOST_HALVINGS = 3

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
        time_step: Seconds; divides six hours. It is halved while the wind is too fast for it.
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
        self.transform, self.mean_depth = transform, mean_depth
        self._settings = settings
        self._finer: dict[int, list[ShallowWater]] = {}  # in lists: no parts of this module
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

    def halvings(self, state: Tensor) -> Tensor:
        """Return how often each member (N,) halves the time step for its fastest wind."""
        wind = state[:, 1:].double().square().sum(1).amax((1, 2)).sqrt()
        courant = self.transform.truncation * wind * self.time_step / (1e3 * EARTH_RADIUS_KM)
        return (courant / FASTEST).log2().ceil().nan_to_num(0.0).clamp(0, MOST_HALVINGS).long()

    def halved(self, times: int) -> "ShallowWater":
        """Return the model with its time step halved ``times`` times."""
        if not times:
            return self
        if times not in self._finer:
            settings = {**self._settings, "time_step": self.time_step / 2**times}
            self._finer[times] = [ShallowWater(**settings).to(self._jets.device)]  # type: ignore[arg-type]
        return self._finer[times][0]

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
        members, waves = len(state), self.transform.fourier(fields)
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
        pull = torch.addcmul(
            transform.curl(x[..., :members], y[..., :members]),
            energy,
            transform.laplacian[:, None],
            value=-0.5,
        )
        rates = torch.cat((pull, -transform.divergence(x, y)), dim=-1)
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
