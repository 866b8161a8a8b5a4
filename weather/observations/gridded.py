"""Observations on the model grid: value and error standard deviation of every cell."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class _Fields(NamedTuple):
    values: Tensor
    errors: Tensor


class GriddedObservations(_Fields):
    """Observed values and their error standard deviation on the model grid.

    Absence has one representation: an infinite error, with the value 0. Weights ``1 / errors**2``
    are therefore right without any mask. A value that is not finite is absent, whatever its error.

    Attributes:
        values: (..., C, H, W) in physical units, 0 where nothing was observed.
        errors: (..., C, H, W) error standard deviation in the same units, ``inf`` where absent.
    """

    __slots__ = ()

    def __new__(cls, values: Tensor, errors: Tensor) -> "GriddedObservations":
        """Take fields of one shape; what is not finite becomes absent."""
        finite = values.isfinite()
        errors = torch.where(finite, errors, torch.inf)
        return super().__new__(cls, torch.where(finite, values, 0), errors)

    @classmethod
    def from_values(cls, values: Tensor, errors: Tensor) -> "GriddedObservations":
        """Take any values and errors; a non-finite value or error counts as absent.

        Args:
            values: (..., C, H, W); NaN marks what is absent.
            errors: Broadcastable to ``values``; a (C,) tensor holds one error per channel.

        Raises:
            ValueError: If an error of a finite value is zero, negative or NaN.
        """
        errors = per_channel(errors).to(values).expand_as(values)
        present = values.isfinite()
        if (present & ~(errors > 0)).any():
            raise ValueError(
                "an observation error is zero, negative or NaN, expected a positive standard "
                "deviation; mark absent observations by a NaN value or an infinite error"
            )
        return cls(values, errors).withhold(present & errors.isfinite())

    @classmethod
    def absent(
        cls, shape: Sequence[int], *, device: torch.device | None = None
    ) -> "GriddedObservations":
        """Return observations of the given (..., C, H, W) shape that hold nothing."""
        values = torch.zeros(tuple(shape), device=device)
        return cls(values, torch.full_like(values, torch.inf))

    @classmethod
    def stack(cls, observations: Sequence["GriddedObservations"]) -> "GriddedObservations":
        """Stack along a new first dimension, for example independent timelines."""
        values, errors = zip(*observations, strict=True)
        return cls(torch.stack(values), torch.stack(errors))

    @property
    def mask(self) -> Tensor:
        """Boolean (..., C, H, W), true where a value was observed."""
        return self.errors.isfinite()

    def withhold(self, keep: Tensor) -> "GriddedObservations":
        """Keep observations where ``keep`` is true and make the others absent.

        Args:
            keep: Boolean, broadcastable to (..., C, H, W).
        """
        return GriddedObservations(
            self.values.masked_fill(~keep, 0.0), self.errors.masked_fill(~keep, torch.inf)
        )

    def to(self, target: torch.device | torch.dtype | str) -> "GriddedObservations":
        """Move to a device or convert to a floating-point type."""
        return GriddedObservations(self.values.to(target), self.errors.to(target))


def per_channel(value: Tensor) -> Tensor:
    """Return a (C,) tensor as (C, 1, 1), so that it broadcasts over fields; others unchanged."""
    return value[:, None, None] if value.ndim == 1 else value


def confidence(
    observations: GriddedObservations, reference_sd: Tensor, kind: str = "error"
) -> Tensor:
    """Return how far an observation may be believed, from 0 (absent) to 1.

    ``binary`` is availability. ``error`` is ``1 / (1 + errors**2 / reference_sd**2)``: the weight
    of the observation in a scalar optimal interpolation with background error ``reference_sd``.

    Args:
        observations: Fields (..., C, H, W).
        reference_sd: (C,) standard deviation of the background error, in the units of the values.
        kind: ``"error"`` or ``"binary"``.

    Returns:
        (..., C, H, W) with the type of the values.

    Raises:
        ValueError: For another ``kind``.
    """
    if kind == "binary":
        return observations.mask.to(observations.values.dtype)
    if kind != "error":
        raise ValueError(f"confidence {kind!r} is unknown, expected 'error' or 'binary'")
    ratio = observations.errors / per_channel(reference_sd).to(observations.errors)
    return 1.0 / (1.0 + ratio**2)


def gross_check(
    observations: GriddedObservations,
    background: Tensor,
    sigma_b: Tensor,
    factor: float = 5.0,
) -> GriddedObservations:
    """Make observations absent that the background contradicts beyond doubt.

    An observation y passes if ``|y - background| <= factor * sqrt(sigma_b**2 + errors**2)``; NaN
    never passes.

    Args:
        observations: Fields (..., C, H, W).
        background: (..., C, H, W) in the same units.
        sigma_b: Background error standard deviation, (C,) or broadcastable to the fields.
        factor: Accepted departure in standard deviations.
    """
    expected = torch.hypot(per_channel(sigma_b).to(observations.errors), observations.errors)
    passes = (observations.values - background).abs() <= factor * expected
    return observations.withhold(passes & observations.mask)
