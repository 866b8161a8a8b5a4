"""Dry primitive equations on sigma layers with the forcing of Held and Suarez (1994)."""

import torch
from torch import Tensor, nn

from weather.models.held_suarez.primitive_equations import (
    Columns,
    ColumnTendencies,
    PrimitiveFields,
    PrimitiveLayout,
    PrimitiveStep,
    SigmaLevels,
    column_tendencies,
)
from weather.models.leapfrog import DAY, KAPPA, ROTATION, LeapfrogModel, random_coefficients
from weather.spherical import SphericalTransform
from weather.state import ChannelSpec

REFERENCE_PRESSURE = 1e5
"""Pa."""

BOUNDARY_LAYER_TOP = 0.7
"""Sigma; friction and the faster relaxation act below, towards the surface."""

FRICTION_RATE = 1 / DAY
"""At the surface, s-1."""

RELAXATION_RATE = 1 / (40 * DAY)
"""In the free atmosphere, s-1."""

SURFACE_RELAXATION_RATE = 1 / (4 * DAY)
"""At the surface of the equator, s-1."""

STRATOSPHERE = 200.0
"""Lowest equilibrium temperature, K."""

EQUATOR = 315.0
"""Equilibrium temperature at the surface of the equator, K."""

EQUATOR_TO_POLE = 60.0
"""Its fall to the pole, K."""

STABILITY = 10.0
"""Rise of equilibrium potential temperature over a factor e in pressure at the equator, K."""


def friction_rates(sigma: Tensor) -> Tensor:
    """Return the damping rate of the wind, s-1, at sigma of any shape."""
    return FRICTION_RATE * _depth(sigma)


def relaxation_rates(sigma: Tensor, latitude: Tensor) -> Tensor:
    """Return the relaxation rate of temperature, s-1; the arguments (latitude in rad) broadcast."""
    faster = (SURFACE_RELAXATION_RATE - RELAXATION_RATE) * _depth(sigma) * latitude.cos() ** 4
    return RELAXATION_RATE + faster


def equilibrium_temperature(log_pressure: Tensor, sigma: Tensor, latitude: Tensor) -> Tensor:
    """Return the temperature that the atmosphere relaxes to (..., L), K.

    It is ``max(200, (315 - 60 sin2 lat - 10 ln(p/p0) cos2 lat) (p/p0)**kappa)``.

    Args:
        log_pressure: ln(surface pressure / 1e5 Pa) (...).
        sigma: Pressure over surface pressure in all layers (L,).
        latitude: Latitudes, rad, that broadcast with the surface pressure.
    """
    exner = sigma.pow(KAPPA)
    ratio = (KAPPA * log_pressure).exp()
    slope = -STABILITY * latitude.cos().square()
    surface = torch.addcmul(
        EQUATOR - EQUATOR_TO_POLE * latitude.sin().square(), slope, log_pressure
    )
    target = (ratio * surface).unsqueeze(-1) * exner
    target = torch.addcmul(target, (ratio * slope).unsqueeze(-1), exner * sigma.log())
    return target.clamp_(min=STRATOSPHERE)


def _depth(sigma: Tensor) -> Tensor:
    return ((sigma - BOUNDARY_LAYER_TOP) / (1 - BOUNDARY_LAYER_TOP)).clamp(min=0)


REFERENCE_TEMPERATURE = 300.0
"""Isothermal atmosphere about which gravity waves are implicit, K."""

FILTER_CUTOFF = 0.4
"""Fraction of the truncation up to which the spectral filter does nothing."""

FILTER_POWER = 36
"""Steepness of the spectral filter."""

MEMBER_NOISE = 0.5
"""Root mean square of the temperature noise by which initial members differ, K."""


class HeldSuarez(LeapfrogModel):
    """A dry atmosphere over a flat surface, relaxed to a zonally symmetric temperature.

    The state is surface pressure (Pa), then temperature (K), eastward and northward wind (m/s) in
    all layers from the top, on the Gaussian grid, north to south. Prognostic are vorticity,
    divergence, temperature and the logarithm of surface pressure (Hoskins and Simmons, 1975). Every
    six hours the mass is set to what it was before.

    Args:
        truncation: T of the triangular truncation.
        num_latitudes: Gaussian latitudes H.
        num_longitudes: Longitudes W.
        num_layers: Equidistant sigma layers L.
        time_step: Seconds; divides six hours.
        forcing: Scale of friction and relaxation; 0 leaves the bare equations, another value than
            1 is a model with error.
        diffusion_seconds: Time in which the spectral filter would damp the scale just beyond the
            truncation by e; ``inf`` turns it off.
        time_filter: Robert-Asselin coefficient.

    Raises:
        ValueError: A scale or the grid is out of range.
    """

    members_at_once = 10

    relaxation: Tensor
    latitude: Tensor
    planetary: Tensor

    def __init__(
        self,
        *,
        truncation: int = 21,
        num_latitudes: int = 32,
        num_longitudes: int = 64,
        num_layers: int = 8,
        time_step: float = 1800.0,
        forcing: float = 1.0,
        diffusion_seconds: float = 5.0,
        time_filter: float = 0.04,
    ) -> None:
        settings = {
            name: value for name, value in locals().items() if isinstance(value, int | float)
        }
        if not diffusion_seconds > 0:
            raise ValueError(f"diffusion_seconds must be positive, got {diffusion_seconds}")
        transform = SphericalTransform(truncation, num_latitudes, num_longitudes)
        channels = ChannelSpec(
            surface=("surface_pressure",),
            upper=("temperature", "u_component_of_wind", "v_component_of_wind"),
            levels=tuple(range(1, num_layers + 1)),
        )
        super().__init__(
            transform.grid,
            channels,
            time_step=time_step,
            time_filter=time_filter,
            settings=settings,
        )
        self.transform, self.levels = transform, SigmaLevels(num_layers)
        self.layout = PrimitiveLayout(num_layers)
        latitude = transform.grid.latitude.deg2rad()[:, None]  # (H, 1)
        buffers = {
            "latitude": latitude,
            "planetary": 2 * ROTATION * latitude.sin().unsqueeze(-1),
            "relaxation": forcing * relaxation_rates(self.levels.centers, latitude.unsqueeze(-1)),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)
        self._steps = nn.ModuleList(
            PrimitiveStep(
                transform,
                self.levels,
                span * time_step,
                reference_temperature=REFERENCE_TEMPERATURE,
                friction=forcing * friction_rates(self.levels.centers),
                diffusion=filter_rates(transform, diffusion_seconds),
            )
            for span in (1, 2)
        )

    def initial_state(self, members: int, *, seed: int) -> Tensor:
        """Return an isothermal atmosphere at rest with noise in the temperature, float32."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.stack(
            [
                random_coefficients(self.transform, (1, 12), generator)
                for _ in range(members * self.levels.num_layers)
            ]
        )
        temperature = MEMBER_NOISE * self.transform.pack_coefficients(noise)
        nothing = torch.zeros_like(temperature)
        return self.to_state(
            torch.cat((nothing, nothing, temperature, nothing[..., :members]), dim=-1)
        ).float()

    def to_spectral(self, state: Tensor) -> Tensor:
        """Transform (N, C, H, W) to the packed fields (2, M, L, K)."""
        surface, upper = self.channels.split(state)  # (N, 1, H, W), (N, 3, L, H, W)
        temperature, u, v = (self.transform.pack_grid(field) for field in upper.unbind(1))
        log_pressure = (self.transform.pack_grid(surface) / REFERENCE_PRESSURE).log()
        x, y = self.transform.fourier(u), self.transform.fourier(v)
        return torch.cat(
            (
                self.transform.curl(x, y),
                self.transform.divergence(x, y),
                self.transform.analysis(temperature - REFERENCE_TEMPERATURE),
                self.transform.analysis(log_pressure),
            ),
            dim=-1,
        )

    def to_state(self, spectral: Tensor) -> Tensor:
        """Transform the packed fields (2, M, L, K) to (N, C, H, W)."""
        members, block = self._blocks(spectral)
        u, v = self.transform.wind_synthesis(
            spectral[..., :block], spectral[..., block : 2 * block]
        )
        scalars = self.transform.synthesis(spectral[..., 2 * block :])
        temperature = scalars[..., :block] + REFERENCE_TEMPERATURE
        surface = REFERENCE_PRESSURE * scalars[..., block:].exp()
        shape = (members, self.levels.num_layers)
        upper = [
            self.transform.unpack_grid(field, torch.Size(shape)) for field in (temperature, u, v)
        ]
        return torch.cat(
            (self.transform.unpack_grid(surface, torch.Size((members, 1))), *upper), dim=1
        )

    def integrate(self, spectral: Tensor, num_steps: int) -> Tensor:
        """Take the steps, then scale surface pressure so that the mass is that of the start.

        The logarithm of surface pressure does not conserve mass by itself; the correction is of
        order 1e-6 a day.
        """
        result = super().integrate(spectral, num_steps).clone()
        surface = slice(3 * self._blocks(spectral)[1], None)
        ratio = self._mass(spectral[..., surface]) / self._mass(result[..., surface])
        result[0, 0, 0, surface] += ratio.log()
        return result

    def _mass(self, log_pressure: Tensor) -> Tensor:
        """Return the mean surface pressure (N,) over the reference of ln ps (2, M, L, N)."""
        return self.transform.analysis(self.transform.synthesis(log_pressure).exp())[0, 0, 0]

    def advance(self, previous: Tensor, current: Tensor, span: int) -> Tensor:
        """Return the coefficients ``span`` time steps after ``previous``."""
        step: Tensor = self._steps[span - 1](previous, self.tendency(current))
        return step

    def tendency(self, spectral: Tensor) -> PrimitiveFields:
        """Return the tendencies (2, M, L, N, layers) without friction and linear gravity waves."""
        air, log_pressure = self._on_grid(spectral)
        rates = column_tendencies(air, self.levels, REFERENCE_TEMPERATURE)
        target = equilibrium_temperature(log_pressure, self.levels.centers, self.latitude)
        deficit = target.sub_(REFERENCE_TEMPERATURE) - air.temperature
        return self._gather(air, rates, torch.addcmul(rates.heating, self.relaxation, deficit))

    def _on_grid(self, spectral: Tensor) -> tuple[Columns, Tensor]:
        """Return the columns and the logarithm of surface pressure (W, H, N).

        Every field has its own memory, since the columns are many small steps over all of it.
        """
        transform, layers = self.transform, self.levels.num_layers
        members, block = self._blocks(spectral)
        vorticity, divergence, temperature, surface = spectral.split(
            (block, block, block, members), dim=-1
        )

        def columns(field: Tensor) -> Tensor:
            return field.view(*field.shape[:2], members, layers)

        u, v = transform.wind_synthesis(vorticity, divergence)
        slope_x, slope_y = transform.gradient_synthesis(surface)
        air = Columns(
            u=columns(u),
            v=columns(v),
            slope_x=slope_x.unsqueeze(-1),
            slope_y=slope_y.unsqueeze(-1),
            absolute_vorticity=columns(transform.synthesis(vorticity)) + self.planetary,
            divergence=columns(transform.synthesis(divergence)),
            temperature=columns(transform.synthesis(temperature)),
        )
        return air, transform.synthesis(surface)

    def _gather(self, air: Columns, rates: ColumnTendencies, heating: Tensor) -> PrimitiveFields:
        """Turn the tendencies on the grid into those of the coefficients."""
        transform = self.transform
        x, y, heat_x, heat_y = (
            transform.fourier(field.flatten(-2))
            for field in (
                rates.force_x,
                rates.force_y,
                air.u * air.temperature,
                air.v * air.temperature,
            )
        )
        energy, warming, surface = (
            transform.analysis(field.flatten(-2))
            for field in (rates.energy, heating, rates.surface)
        )
        pull = torch.addcmul(
            transform.divergence(x, y), energy, transform.laplacian[:, None], value=-1
        )
        warming -= transform.divergence(heat_x, heat_y)

        def columns(field: Tensor) -> Tensor:
            return field.view(*field.shape[:3], -1, self.levels.num_layers)

        return PrimitiveFields(
            columns(transform.curl(x, y)), columns(pull), columns(warming), surface.unsqueeze(-1)
        )

    def _blocks(self, spectral: Tensor) -> tuple[int, int]:
        """Return the number of members and of columns of one upper field."""
        members = self.layout.members(spectral)
        return members, members * self.levels.num_layers


def filter_rates(transform: SphericalTransform, seconds: float) -> Tensor:
    """Return the damping rate of every total wavenumber, s-1, of the exponential filter.

    It is ``((k - 0.4) / 0.6)**36 / seconds`` for k = l / (T + 1) above 0.4, sharp enough to leave
    all but the last three wavenumbers alone (Gottlieb and Shu, 1997).
    """
    share = transform.degree / transform.size
    return ((share - FILTER_CUTOFF) / (1 - FILTER_CUTOFF)).clamp(min=0) ** FILTER_POWER / seconds
