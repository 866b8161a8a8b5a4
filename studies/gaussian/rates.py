"""How fast the errors of the most likely mixture fall with the size of the sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from harness.evidence import Scores
from studies.gaussian.gaussian_mixture import Array, Mixture, drawn, likelihood
from studies.gaussian.maximum import Fit, fit
from studies.gaussian.voronoi import voronoi_loss

ERRORS = ("beta1", "tau", "beta1_over_tau", "a", "b", "nu", "voronoi", "merged_voronoi", "gain")
"""What is measured of a fit; ``gain`` is its mean log-likelihood less that of the truth."""


class Case(NamedTuple):
    """A mixture to be found again.

    Attributes:
        activation: σ.
        slope: β1 of the first expert.
        num_fitted: K; the truth has two experts.
        restarts: Starts, of which the most likely end is kept.
    """

    activation: str
    slope: float
    num_fitted: int = 2
    restarts: int = 1

    @property
    def truth(self) -> Mixture:
        """The mixture that samples are drawn from: d = 1, K* = 2."""
        return Mixture(
            np.array([[self.slope], [0.0]]), np.array([-0.3, 0.0]), 0.5, np.array([[2.0], [-1.5]]),
            np.array([0.5, -0.5]), np.array([0.25, 0.4]),
        )  # fmt: skip


CASES: Mapping[str, Case] = {
    "identity": Case("identity", 2.0),
    "tanh": Case("tanh", 4.0),
    "sigmoid": Case("sigmoid", 4.0),
    "gelu": Case("gelu", 4.0),
    "tanh-k3": Case("tanh", 4.0, num_fitted=3, restarts=5),
}
"""Method -> what it finds."""


def started(case: Case, spread: float, generator: np.random.Generator) -> Mixture:
    """Return a start: the truth, disturbed by a normal error of this standard deviation.

    τ and ν are disturbed as logarithms. Experts that the truth lacks double the first one, whose
    weight they split; the reference of the gate stays exact.
    """
    true, more = case.truth, case.num_fitted - case.truth.num_experts
    place = [0] * (more + 1) + list(range(1, true.num_experts))
    free = np.append(np.ones(len(place) - 1), 0.0)
    split = np.where(np.array(place) == 0, true.tau * np.log(more + 1), 0.0)

    def noise(*shape: int) -> Array:
        return spread * generator.standard_normal(shape)

    count, dim = len(place), true.a.shape[1]
    return Mixture(
        true.beta1[place] + free[:, None] * noise(count, dim),
        true.beta0[place] - split + free * noise(count),
        float(true.tau * np.exp(noise(1)[0])),
        true.a[place] + noise(count, dim),
        true.b[place] + noise(count),
        true.nu[place] * np.exp(noise(count)),
    )


def errors_of(case: Case, sizes: Sequence[int], spread: float, repeat: int) -> dict[str, Array]:
    """Fit samples of all sizes from the same starts.

    Args:
        case: What is to be found.
        sizes: Numbers of sample points (S,).
        spread: Standard deviation of the start around the truth.
        repeat: Number of the repeat, which seeds starts and samples.

    Returns:
        ``errors`` (S, P) of `ERRORS`, NaN where atoms and truth cannot be paired, and
        ``slope`` (S,), the largest entry of the gradient at the end.
    """
    errors, slopes = [], []
    for size in sizes:
        x, y = drawn(case.truth, size, case.activation, np.random.default_rng([repeat, size]))
        starts = np.random.default_rng([repeat])
        fits = [
            fit(started(case, spread, starts), x, y, case.activation) for _ in range(case.restarts)
        ]
        best = max(fits, key=lambda fit: fit.value)
        gain = best.value - likelihood(case.truth, x, y, case.activation).value
        errors.append([*_parameter_errors(best, case.truth), gain])
        slopes.append(best.slope)
    return {"errors": np.array(errors), "slope": np.array(slopes)}


def slopes(errors: Array, sizes: Sequence[int], names: Sequence[str] = ERRORS) -> Scores:
    """Return the function from weights of repeats to slopes of log median error over log size.

    Args:
        errors: (N, S, P), a repeat each.
        sizes: (S,).
        names: Of the P errors.
    """
    logs = np.log(np.asarray(sizes, dtype=float))
    line = (logs - logs.mean()) / ((logs - logs.mean()) ** 2).sum()

    def scores(weights: Array) -> dict[str, Array]:
        medians = weighted_medians(errors, weights)
        with np.errstate(invalid="ignore", divide="ignore"):
            slopes = np.einsum("rsp,s->rp", np.log(medians), line)
        return {name: slopes[:, place] for place, name in enumerate(names)}

    return scores


def weighted_medians(values: Array, weights: Array) -> Array:
    """Return the medians (R, ...) of values (N, ...) that count as often as the weights (R, N)."""
    columns = values.reshape(len(values), -1)
    medians = np.empty((len(weights), columns.shape[1]))
    for place, column in enumerate(columns.T):
        order = np.argsort(column, kind="stable")
        reached = weights[:, order].cumsum(1)
        half = reached[:, -1:] / 2
        low, high = (reached >= half).argmax(1), (reached > half).argmax(1)
        medians[:, place] = (column[order][low] + column[order][high]) / 2
    return medians.reshape(len(weights), *values.shape[1:])


def _parameter_errors(fit: Fit, true: Mixture) -> list[float]:
    fitted = fit.mixture
    losses = [voronoi_loss(fitted, true), voronoi_loss(fitted, true, merged=True)]
    if fitted.num_experts != true.num_experts:
        return [np.nan] * 6 + losses
    return [
        float(np.linalg.norm(fitted.beta1 - true.beta1)),
        abs(fitted.tau - true.tau),
        float(np.linalg.norm(fitted.beta1 / fitted.tau - true.beta1 / true.tau)),
        float(np.linalg.norm(fitted.a - true.a, axis=1).sum()),
        float(np.abs(fitted.b - true.b).sum()),
        float(np.abs(fitted.nu - true.nu).sum()),
        *losses,
    ]
