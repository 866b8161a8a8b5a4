"""The local ensemble transform Kalman filter: analyses in the space of ensemble weights."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from weather.baselines.assimilator import check_shapes
from weather.baselines.covariance import DistanceWeights, GaspariCohnTaper
from weather.grid import Grid
from weather.observations.gridded import GriddedObservations


class EnsembleWeights(NamedTuple):
    """How an analysis ensemble is composed of the background ensemble, in factors.

    With eigenvectors V and eigenvalues of ``Y' R^-1 Y``, the mean moves by ``X (V shift)`` and the
    anomalies become ``X V diag(shrink) V'``.

    Attributes:
        vectors: (..., M, M) orthonormal columns V.
        shift: (..., M).
        shrink: (..., M), positive.
    """

    vectors: Tensor
    shift: Tensor
    shrink: Tensor

    def update(self, mean: Tensor, anomalies: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean (..., C) and anomalies (..., C, M) of the analysis."""
        rotated = anomalies @ self.vectors.to(anomalies)
        shift, shrink = self.shift.to(anomalies), self.shrink.to(anomalies)
        moved = mean + (rotated @ shift.unsqueeze(-1)).squeeze(-1)
        return moved, (rotated * shrink.unsqueeze(-2)) @ self.vectors.mT.to(anomalies)


def ensemble_weights(signal: Tensor, projection: Tensor, inflation: float) -> EnsembleWeights:
    """Solve the analysis in weight space (Hunt et al. 2007, equations 21 to 24).

    Args:
        signal: ``Y' R^-1 Y`` (..., M, M) of the background anomalies at the observations; only the
            lower triangle is read.
        projection: ``Y' R^-1 (y - mean)`` (..., M).
        inflation: Factor on the background covariance.

    Returns:
        Weights in float64, whatever the inputs.

    Raises:
        ValueError: There are fewer than two members.
    """
    num_members = signal.shape[-1]
    if num_members < 2:
        raise ValueError(f"an ensemble filter needs at least two members, found {num_members}")
    values, vectors = torch.linalg.eigh(signal.double())
    precision = values.clamp(min=0.0) + (num_members - 1) / inflation
    turned = (vectors.mT @ projection.double().unsqueeze(-1)).squeeze(-1)
    return EnsembleWeights(
        vectors, turned / precision, (math.sqrt(num_members - 1) / precision.sqrt())
    )


_POINT_BLOCK = 8192  # grid points whose eigenproblems are held at a time


class LETKF:
    """Local ensemble transform Kalman filter with localisation of R (Hunt et al. 2007).

    Every grid point is analyzed separately from the observations within 2c, whose precision is
    tapered by the Gaspari-Cohn function of the distance. Afterwards the spread is relaxed to the
    prior spread (RTPS, Whitaker and Hamill 2012).

    Args:
        grid: Grid of the fields.
        members: Ensemble size M, at least 2.
        localization_km: Half width c of the taper, km; infinite for none. A sequence gives one for
            each analyzed channel.
        inflation: Factor on the background covariance.
        inflate_unobserved: Whether to inflate points without an observation within 2c too, as the
            equations have it, also where nothing is observed at all; such spread grows without
            bound in a cycle. They keep their background by default.
        relaxation: RTPS coefficient, 0 (none) to 1 (the prior spread is restored).
        coupling: (C, C) factors from 0 to 1 on the observation precision: row = analyzed channel,
            column = observed channel. The identity analyses every channel from its own
            observations alone; None couples all.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        grid: Grid,
        members: int,
        *,
        localization_km: float | Sequence[float] = math.inf,
        inflation: float = 1.0,
        inflate_unobserved: bool = False,
        relaxation: float = 0.0,
        coupling: Tensor | Sequence[Sequence[float]] | None = None,
    ) -> None:
        if members < 2:
            raise ValueError(f"an ensemble filter needs at least two members, got {members}")
        if not inflation > 0:
            raise ValueError(f"inflation must be positive, got {inflation}")
        if not 0 <= relaxation <= 1:
            raise ValueError(f"relaxation must lie between 0 and 1, got {relaxation}")
        widths = (
            tuple(localization_km) if isinstance(localization_km, Sequence) else (localization_km,)
        )
        if not all(width > 0 for width in widths):
            raise ValueError(f"localization_km must be positive, got {localization_km}")
        self.members, self.inflation = members, inflation
        self.inflate_unobserved, self.relaxation = inflate_unobserved, relaxation
        self.coupling = None if coupling is None else torch.as_tensor(coupling)
        if self.coupling is not None and not ((self.coupling >= 0) & (self.coupling <= 1)).all():
            raise ValueError(
                f"coupling must lie between 0 and 1, found {self.coupling.tolist()}: it is a "
                "factor on the precision of observations"
            )
        self._widths = widths
        self._tapers = {width: DistanceWeights(grid, GaspariCohnTaper(width)) for width in widths}

    def analyze(self, background: Tensor, observations: GriddedObservations) -> Tensor:
        """Return the analysis; see `weather.baselines.assimilator.Assimilator`.

        A timeline that is no longer finite, or whose squares are not, is returned as it is.

        Raises:
            ValueError: Shapes differ, or an observation error is not positive.
        """
        check_shapes(background, observations, math.prod(background.shape[2:]), self.members)
        if not (observations.errors > 0).all():
            raise ValueError("an observation error is not positive, expected standard deviations")
        analysis = background.clone()
        for timeline, states in enumerate(background.flatten(3)):
            values = observations.values[timeline].flatten(1)
            errors = observations.errors[timeline].flatten(1)
            if states.isfinite().all():
                analysis[timeline] = self._timeline(states, values, errors).view_as(
                    analysis[timeline]
                )
        return analysis

    def _timeline(self, states: Tensor, values: Tensor, errors: Tensor) -> Tensor:
        """Analyze (M, C, P) with observations (C, P)."""
        mean = states.mean(0)
        anomalies = states - mean
        innovation = torch.where(errors.isfinite(), values.to(mean) - mean, 0.0)
        analysis = states.clone()
        for channels, width, factors in self._groups(len(mean)):
            precision = factors.to(mean)[:, None] / errors.to(mean).square()
            seen = (precision > 0).any(0).nonzero().flatten()
            if not len(seen) and not self.inflate_unobserved:
                continue
            scale = precision[:, seen].sqrt()
            signal, projection = _point_signals(
                anomalies[:, :, seen] * scale, innovation[:, seen] * scale
            )
            # The taper is at most 1, so these sums bound those of every grid point.
            if not torch.cat((signal, projection), 1).abs().sum(0).isfinite().all():
                return states
            taper = self._tapers[width].at(seen, mean.dtype)
            self._update(analysis, mean, anomalies, channels, taper, signal, projection)
        return analysis

    def _update(
        self,
        analysis: Tensor,
        mean: Tensor,
        anomalies: Tensor,
        channels: list[int],
        taper: Tensor,
        signal: Tensor,
        projection: Tensor,
    ) -> None:
        """Write the analysis (M, C, P) of some channels at the points that see an observation.

        The taper is (U, P), the signals of the U observed points are (U, M (M+1) / 2) and (U, M).
        """
        local = (taper > 0).any(0) | self.inflate_unobserved
        row, column = torch.tril_indices(self.members, self.members)
        for points in torch.split(local.nonzero().flatten(), _POINT_BLOCK):
            weight = taper[:, points].T
            matrix = weight.new_zeros(len(points), self.members, self.members)
            matrix[:, row, column] = weight @ signal
            weights = ensemble_weights(matrix, weight @ projection, self.inflation)
            cells = (slice(None), torch.tensor(channels)[:, None], points)
            prior = anomalies[cells].permute(2, 1, 0)  # (points, channels, M)
            moved, posterior = weights.update(mean[cells[1:]].T, prior)
            posterior = relax_to_prior_spread(prior, posterior, self.relaxation)
            analysis[cells] = (moved[:, :, None] + posterior).permute(2, 1, 0)

    def _groups(self, num_channels: int) -> list[tuple[list[int], float, Tensor]]:
        """Return channels that share an analysis, with their width and coupling (C,)."""
        if len(self._widths) not in (1, num_channels):
            raise ValueError(
                f"localization_km has {len(self._widths)} values, expected 1 or {num_channels}"
            )
        coupling = torch.ones(num_channels, num_channels)
        if self.coupling is not None:
            if tuple(self.coupling.shape) != (num_channels, num_channels):
                raise ValueError(
                    f"coupling is {tuple(self.coupling.shape)}, expected "
                    f"{(num_channels, num_channels)} for {num_channels} channels"
                )
            coupling = self.coupling
        groups: dict[tuple[float, ...], list[int]] = {}
        for channel, factors in enumerate(coupling.tolist()):
            width = self._widths[channel % len(self._widths)]
            groups.setdefault((width, *factors), []).append(channel)
        return [(rows, key[0], torch.tensor(key[1:])) for key, rows in groups.items()]


def relax_to_prior_spread(prior: Tensor, posterior: Tensor, relaxation: float) -> Tensor:
    """Scale the anomalies to ``(1 - a) spread + a prior spread`` (Whitaker and Hamill 2012, eq. 2).

    Args:
        prior: Background anomalies (..., M).
        posterior: Analysis anomalies (..., M).
        relaxation: a, from 0 to 1.
    """
    if relaxation == 0:
        return posterior
    before, after = prior.square().sum(-1).sqrt(), posterior.square().sum(-1).sqrt()
    factor = 1 + relaxation * torch.where(after > 0, before / after - 1, 0.0)
    return posterior * factor.unsqueeze(-1)


def _point_signals(observed: Tensor, innovation: Tensor) -> tuple[Tensor, Tensor]:
    """Return lower triangles of Y'Y (U, M (M+1) / 2) and Y'd (U, M) of every observed point.

    Both arguments are in units of the observation error: (M, C, U) and (C, U). The channels of a
    point are added here, so that the sum over points is one matmul.
    """
    per_point, members = observed.permute(2, 0, 1), len(observed)
    row, column = torch.tril_indices(members, members)
    signal = (per_point @ per_point.mT)[:, row, column]
    return signal, (per_point @ innovation.T.unsqueeze(-1)).squeeze(-1)
