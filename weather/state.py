"""What the channels of a gridded state are, and how they are normalised."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

SHORT_NAMES = {
    "10m_u_component_of_wind": "u10",
    "10m_v_component_of_wind": "v10",
    "2m_temperature": "t2m",
    "mean_sea_level_pressure": "msl",
    "surface_pressure": "sp",
    "geopotential": "z",
    "specific_humidity": "q",
    "u_component_of_wind": "u",
    "v_component_of_wind": "v",
    "temperature": "t",
    "height": "h",
}
"""Short forms of the WeatherBench-2 variable names; a name that is absent is its own short form."""


@dataclass(frozen=True)
class ChannelSpec:
    """Order and meaning of the channels of a state ``(..., C, H, W)``.

    Surface variables come first, then each upper variable with all its levels in the order of
    ``levels``.

    Args:
        surface: Names of the variables without a level, as WeatherBench-2 spells them.
        upper: Names of the variables on levels.
        levels: Level values (hPa, or the index of a model layer), in the order of the channels.

    Raises:
        ValueError: A name or level is repeated, there is no channel at all, or only one of
            ``upper`` and ``levels`` is given.
    """

    surface: tuple[str, ...] = ()
    upper: tuple[str, ...] = ()
    levels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in ("surface", "upper", "levels"):
            values = tuple(getattr(self, field))
            object.__setattr__(self, field, values)
            if len(set(values)) != len(values):
                raise ValueError(f"{field} must not repeat an entry, found {values}")
        object.__setattr__(self, "levels", tuple(int(level) for level in self.levels))
        if bool(self.upper) != bool(self.levels):
            raise ValueError(
                f"upper variables and levels belong together, found upper {self.upper} and levels "
                f"{self.levels}: give both or neither"
            )
        if not self.num_channels:
            raise ValueError("a state needs at least one surface or upper variable")

    @property
    def num_channels(self) -> int:
        """C, the number of channels."""
        return len(self.surface) + len(self.upper) * len(self.levels)

    @property
    def labels(self) -> tuple[str, ...]:
        """Short unique name of every channel, such as ``t2m`` and ``z500``."""
        return tuple(
            SHORT_NAMES.get(name, name) + ("" if level is None else str(level))
            for name, level in self
        )

    def __iter__(self) -> Iterator[tuple[str, int | None]]:
        """Yield ``(variable, level)`` of every channel; the level of a surface field is None."""
        for name in self.surface:
            yield name, None
        for name in self.upper:
            for level in self.levels:
                yield name, level

    def index(self, variable: str, level: int | None = None) -> int:
        """Return the channel of a variable, at a level for an upper variable.

        Raises:
            KeyError: The state has no such channel.
        """
        if level is None and variable in self.surface:
            return self.surface.index(variable)
        if variable in self.upper and level in self.levels:
            offset = len(self.surface) + self.upper.index(variable) * len(self.levels)
            return offset + self.levels.index(level)
        where = "at the surface" if level is None else f"at level {level}"
        raise KeyError(f"no {variable} {where}: the channels are {', '.join(self.labels)}")

    def positions(self, target: "ChannelSpec") -> list[int]:
        """Return the index in this state of each channel of ``target``.

        Channels are matched by variable name and level value, never by position.

        Raises:
            KeyError: This state lacks a channel of ``target``.
        """
        return [self.index(name, level) for name, level in target]

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Split ``(..., C, H, W)`` into surface ``(..., S, H, W)`` and upper ``(..., V, L, H, W)``.

        Both are views; a group that the state lacks has S = 0 or V = L = 0.

        Raises:
            ValueError: The number of channels differs.
        """
        if x.shape[-3] != self.num_channels:
            raise ValueError(
                f"expected {self.num_channels} channels ({', '.join(self.labels)}), "
                f"found shape {tuple(x.shape)}"
            )
        num_surface = len(self.surface)
        surface, upper = x[..., :num_surface, :, :], x[..., num_surface:, :, :]
        shape = (*x.shape[:-3], len(self.upper), len(self.levels), *x.shape[-2:])
        return surface, upper.reshape(shape)


FENGWU = ChannelSpec(
    surface=(
        "10m_u_component_of_wind",
        "10m_v_component_of_wind",
        "2m_temperature",
        "mean_sea_level_pressure",
    ),
    upper=(
        "geopotential",
        "specific_humidity",
        "u_component_of_wind",
        "v_component_of_wind",
        "temperature",
    ),
    levels=(50, 100, 150, 200, 250, 300, 400, 500, 600, 700, 850, 925, 1000),
)
"""The 69 channels of FengWu and FengWu-Adas (arXiv 2304.02948); levels in hPa."""

SHALLOW_WATER = ChannelSpec(surface=("height", "u_component_of_wind", "v_component_of_wind"))
"""State of the shallow-water model; m and m/s."""

ERA5_SAMPLE = ChannelSpec(upper=("geopotential", "temperature"), levels=(850, 500))
"""The shipped ERA5 ensemble sample; m2 s-2 and K; levels in hPa, in the order of the file."""


class Normalizer(nn.Module):
    """Affine normalisation of every channel, ``(x - mean) / std``.

    Args:
        mean: Mean of each channel ``(C,)``, physical units.
        std: Standard deviation of each channel ``(C,)``, physical units, positive.

    Raises:
        ValueError: The shapes differ, or a standard deviation is not positive and finite.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        mean, std = torch.as_tensor(mean), torch.as_tensor(std)
        if mean.ndim != 1 or mean.shape != std.shape:
            raise ValueError(
                f"mean and std must both be (C,), found {tuple(mean.shape)} and {tuple(std.shape)}"
            )
        bad = ((std <= 0) | ~std.isfinite() | ~mean.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"channels {bad} have a standard deviation that is not positive or a statistic "
                "that is not finite: leave constant channels out of the state"
            )
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("std", std.detach().clone())

    def normalize(self, x: Tensor) -> Tensor:
        """Return ``(..., C, H, W)`` in physical units as normalised values, in the dtype of x."""
        self._check(x)
        return (x - self._channel(self.mean, x)) / self._channel(self.std, x)

    def denormalize(self, x: Tensor) -> Tensor:
        """Return normalised ``(..., C, H, W)`` in physical units, in the dtype of x."""
        self._check(x)
        return x * self._channel(self.std, x) + self._channel(self.mean, x)

    def forward(self, x: Tensor) -> Tensor:
        """Same as `normalize`."""
        return self.normalize(x)

    @classmethod
    def fit(cls, states: Tensor | Iterable[Tensor], *, area_weights: Tensor | None = None) -> Self:
        """Estimate mean and standard deviation over all samples and grid points.

        Args:
            states: ``(..., C, H, W)`` in physical units, or an iterable of such chunks; only one
                chunk is held at a time.
            area_weights: Weight of each latitude row ``(H,)``; equal weights if absent.

        Returns:
            A float32 normalizer; the sums run in float64 around a running mean.

        Raises:
            ValueError: There is no state, or a value is not finite.
        """
        total, mean, square = torch.zeros(()), torch.zeros(()), torch.zeros(())
        for chunk in (states,) if isinstance(states, Tensor) else states:
            x = chunk.detach().to("cpu", torch.float64).movedim(-3, -1)  # (..., H, W, C)
            if not x.isfinite().all():
                raise ValueError("cannot fit statistics to values that are not finite: mask them")
            weights = x.new_ones(x.shape[-3]) if area_weights is None else area_weights.to(x)
            weights = weights[:, None, None].expand((*x.shape[:-1], 1))
            count = weights.sum()
            delta = (x * weights).flatten(0, -2).sum(0) / count
            spread = ((x - delta).square() * weights).flatten(0, -2).sum(0)
            shift, new_total = delta - mean, total + count
            square = square + spread + shift.square() * total * count / new_total
            mean = mean + shift * count / new_total
            total = new_total
        if mean.ndim == 0:
            raise ValueError("cannot fit statistics: there is no state")
        return cls(mean.float(), (square / total).sqrt().float())

    def select(self, source: ChannelSpec, target: ChannelSpec) -> "Normalizer":
        """Return the statistics of ``target`` out of these, which are in the order of ``source``.

        Statistics published for other levels or in another order are matched by variable name and
        level value.

        Raises:
            KeyError: ``source`` lacks a channel of ``target``.
            ValueError: ``source`` has another number of channels than this normalizer.
        """
        if source.num_channels != len(self.mean):
            raise ValueError(
                f"source has {source.num_channels} channels, the statistics {len(self.mean)}"
            )
        positions = source.positions(target)
        return Normalizer(self.mean[positions], self.std[positions])

    def _check(self, x: Tensor) -> None:
        if x.ndim < 3 or x.shape[-3] != len(self.mean):
            raise ValueError(
                f"expected (..., {len(self.mean)}, H, W), found shape {tuple(x.shape)}"
            )

    @staticmethod
    def _channel(statistic: Tensor, x: Tensor) -> Tensor:
        return statistic.to(x.dtype)[:, None, None]
