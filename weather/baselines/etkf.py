"""The ensemble transform Kalman filter: an analysis in the space of ensemble weights."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


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
