"""What the spectral models share: the planet's constants, random fields, and time stepping."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Self

import torch
from torch import Tensor, nn

from weather.grid import Grid
from weather.spherical import SphericalTransform
from weather.state import ChannelSpec

GRAVITY = 9.80616
"""m s-2."""

ROTATION = 7.292e-5
"""Angular velocity, s-1."""

GAS_CONSTANT = 287.0
"""Gas constant of dry air, J kg-1 K-1."""

KAPPA = 2 / 7
"""Gas constant over heat capacity at constant pressure."""

DAY = 86400.0
"""Seconds of a day."""


def random_coefficients(
    transform: SphericalTransform, degrees: tuple[int, int], generator: torch.Generator
) -> Tensor:
    """Return white Gaussian coefficients (M, L) in a band, scaled to mean square 1.

    Args:
        transform: The spherical transform.
        degrees: Smallest and largest total wavenumber.
        generator: Source of the numbers, which depend on the band alone, so that a pattern is
            the same at every truncation that holds the band.

    Raises:
        ValueError: The band does not fit into the truncation.
    """
    first, last = degrees
    if not 0 < first <= last <= transform.truncation:
        raise ValueError(
            f"total wavenumbers {first} to {last} do not fit into truncation {transform.truncation}"
        )
    draws = torch.randn(last + 1, last + 1, 2, generator=generator, dtype=torch.float64)
    draws[0, :, 1] = 0.0  # zonal means are real
    order = torch.arange(last + 1)[:, None]
    degree = torch.arange(last + 1)
    band = torch.view_as_complex(draws) * ((degree >= first) & (degree >= order))
    power = band.abs().square()
    power = power[0].sum() + 2 * power[1:].sum()
    coefficients = torch.zeros(transform.size, transform.size, dtype=torch.complex128)
    coefficients[: last + 1, : last + 1] = band / power.sqrt()
    return coefficients.to(transform.degree.device)


def num_steps(hours: float, step_hours: float) -> int:
    """Return the number of steps of a forecast.

    Args:
        hours: Length of the forecast.
        step_hours: Length of a step.

    Raises:
        ValueError: The hours are negative, or no multiple of the step.
    """
    steps = round(hours / step_hours)
    if hours < 0 or abs(steps * step_hours - hours) > 1e-6:
        raise ValueError(f"hours must be a multiple of the step of {step_hours:g} h, got {hours} h")
    return steps


REUSED_BYTES = 31 * 2**20
"""Below the 32 MiB up to which glibc adapts its thresholds."""


class LeapfrogModel(nn.Module, ABC):
    """A spectral model whose state between calls is the state on the grid.

    Every six hours the model starts again: grid to spectral, one semi-implicit forward step, then
    semi-implicit leapfrog steps with the Robert-Asselin filter (Asselin, 1972). A forecast is thus
    a function of the grid state alone, and one call over a day equals four calls over six hours.
    The arithmetic is float64; the state keeps its dtype, also where the model starts again.

    Args:
        grid: Grid of the state.
        channels: Channels of the state.
        time_step: Seconds; divides six hours. A member whose wind is too fast for it takes halves
            or quarters of it for six hours, see `halvings`.
        time_filter: Coefficient of the Robert-Asselin filter.
        settings: Everything that the model depends on, by name, for its description.

    Raises:
        ValueError: The time step does not divide six hours.
    """

    restart_hours = 6.0
    members_at_once = 64
    """Members of one block of a larger batch; more would not fit into the cache of a core."""

    def __init__(
        self,
        grid: Grid,
        channels: ChannelSpec,
        *,
        time_step: float,
        time_filter: float,
        settings: Mapping[str, float],
    ) -> None:
        super().__init__()
        steps = self.restart_hours * 3600 / time_step if time_step > 0 else 0.5
        if abs(steps - round(steps)) > 1e-9:
            raise ValueError(f"time_step must divide 21600 s, got {time_step} s")
        _keep_freed_memory()
        self.grid, self.channels, self.time_step = grid, channels, time_step
        self.time_filter = time_filter
        values = ", ".join(f"{name}={value:.12g}" for name, value in settings.items())
        self.description = f"{type(self).__name__}({values})"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow moves to another device, but stay float64 when all around is cast."""
        moved: Self = super()._apply(  # type: ignore[no-untyped-call]
            lambda tensor: tensor.to(fn(tensor).device), recurse
        )
        return moved

    @abstractmethod
    def initial_state(self, members: int, *, seed: int) -> Tensor:
        """Return a float32 state (N, C, H, W) from which the members diverge.

        A member depends on the seed and its number, not on how many members there are.
        """

    def forward(self, state: Tensor, hours: float) -> Tensor:
        """Integrate the state forwards in time.

        Args:
            state: (N, C, H, W), physical units, any floating dtype; members are independent.
            hours: Length of the forecast, a multiple of the time step; 0 returns the state.

        Returns:
            The state at the end, of the same shape and dtype.

        Raises:
            ValueError: The shape does not fit the model, or the hours no number of steps.
        """
        expected = (self.channels.num_channels, *self.grid.shape)
        if state.ndim != 4 or tuple(state.shape[1:]) != expected:
            shape = ", ".join(map(str, expected))
            raise ValueError(f"expected a state (N, {shape}), found {tuple(state.shape)}")
        steps = round(hours * 3600 / self.time_step)
        if hours < 0 or abs(steps * self.time_step - hours * 3600) > 1e-6:
            raise ValueError(
                f"hours must be a multiple of the time step {self.time_step:g} s, got {hours} h"
            )
        if len(state) > self.members_at_once:
            return torch.cat(
                [self.forward(block, hours) for block in torch.split(state, self.members_at_once)]
            )
        segment = round(self.restart_hours * 3600 / self.time_step)
        for first in range(0, steps, segment):
            state = self._segment(state, min(segment, steps - first))
        return state

    def halvings(self, state: Tensor) -> Tensor:
        """Return how often each member (N,) halves the time step; never in most models."""
        return torch.zeros(len(state), dtype=torch.long, device=state.device)

    def halved(self, times: int) -> LeapfrogModel:  # noqa: ARG002
        """Return the model with its time step halved ``times`` times; itself in most models."""
        return self

    def _segment(self, state: Tensor, num_steps: int) -> Tensor:
        """Take some time steps, each member with as many halves of them as it needs."""
        halvings = self.halvings(state.detach())
        often = halvings.unique().tolist()
        if len(often) > 1:
            later = state.clone()
            for times in often:
                rows = halvings == times
                later[rows] = self._segment(state[rows], num_steps)
            return later
        model = self.halved(often[0])
        spectral = model.integrate(model.to_spectral(state), num_steps * 2 ** often[0])
        return model.to_state(spectral).to(state.dtype)

    def integrate(self, spectral: Tensor, num_steps: int) -> Tensor:
        """Take one forward step and then leapfrog steps, in spectral space."""
        previous, current = spectral, self.advance(spectral, spectral, 1)
        for _ in range(num_steps - 1):
            following = self.advance(previous, current, 2)
            ends = torch.add(previous, following).mul_(self.time_filter)
            previous = ends.add_(current, alpha=1 - 2 * self.time_filter)
            current = following
        return current

    @abstractmethod
    def to_spectral(self, state: Tensor) -> Tensor:
        """Transform the grid state (N, C, H, W) to the prognostic coefficients, float64."""

    @abstractmethod
    def to_state(self, spectral: Tensor) -> Tensor:
        """Transform the prognostic coefficients to the grid state (N, C, H, W), float64."""

    @abstractmethod
    def advance(self, previous: Tensor, current: Tensor, span: int) -> Tensor:
        """Return the coefficients ``span`` time steps after ``previous``.

        The tendencies are those of ``current``: ``span`` is 1 for a forward step, where both states
        are the same, and 2 for a leapfrog step.
        """


def _keep_freed_memory() -> None:
    """Make the allocator reuse the arrays of a step instead of returning them to the kernel.

    glibc adapts its thresholds to the largest block that was freed. Without this, every step of a
    batch costs hundreds of page faults: a third of its time.
    """
    torch.empty(REUSED_BYTES, dtype=torch.uint8)
