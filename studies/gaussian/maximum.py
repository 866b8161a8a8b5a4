"""The most likely mixture from a start: quasi-Newton in float64, and one step of EM."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize

from studies.gaussian.gaussian_mixture import Array, Mixture, gradient, likelihood

TAU = (1e-2, 1e2)  # box of τ
FLOOR = 1e-6  # of ν, in variances of y
GTOL, FTOL, CORRECTIONS = 1e-7, 1e-16, 30
MOST_STEPS = 5000


class Fit(NamedTuple):
    """A local maximum of the likelihood.

    Attributes:
        mixture: Where it is.
        value: Mean log-likelihood there.
        slope: Largest entry of the gradient, those aside that a bound stops.
    """

    mixture: Mixture
    value: float
    slope: float


def fit(start: Mixture, x: Array, y: Array, activation: str) -> Fit:
    """Climb the mean log-likelihood: a step of EM, then L-BFGS-B.

    β1 and β0 of the last expert stay as they are.

    Args:
        start: Where to begin.
        x: Features (n, d).
        y: Values (n,).
        activation: σ.
    """
    start = improved_experts(start, x, y, activation)
    low = np.full(len(_packed(start)), -np.inf)
    high = -low
    place = start.beta1[:-1].size + len(start.beta0) - 1
    low[place], high[place] = np.log(TAU)
    low[-start.num_experts :] = np.log(FLOOR * y.var())

    def cost(vector: Array) -> tuple[float, Array]:
        mixture = _unpacked(vector, start)
        value = likelihood(mixture, x, y, activation)
        by_beta1, by_beta0, *rest = gradient(mixture, x, value, activation)
        parts: list[Any] = [by_beta1[:-1], by_beta0[:-1], *rest]
        return -value.value, -np.concatenate([np.ravel(part) for part in parts])

    begin = np.clip(_packed(start), low, high)
    options = {"maxiter": MOST_STEPS, "maxfun": 2 * MOST_STEPS, "gtol": GTOL, "ftol": FTOL,
               "maxcor": CORRECTIONS}  # fmt: skip
    optimum = minimize(
        cost, begin, jac=True, method="L-BFGS-B", bounds=list(zip(low, high, strict=True)),
        options=options,
    )  # fmt: skip
    projected = optimum.x - np.clip(optimum.x - optimum.jac, low, high)
    return Fit(_unpacked(optimum.x, start), -float(optimum.fun), float(np.abs(projected).max()))


def improved_experts(mixture: Mixture, x: Array, y: Array, activation: str) -> Mixture:
    """Return the mixture after an E step and the M step of its experts (weighted least squares)."""
    weights = likelihood(mixture, x, y, activation).responsibilities
    design = np.column_stack([x, np.ones(len(x))])
    slopes = [
        np.linalg.solve(design.T @ (w[:, None] * design), design.T @ (w * y)) for w in weights.T
    ]
    a, b = np.array(slopes)[:, :-1], np.array(slopes)[:, -1]
    squares = (y[:, None] - x @ a.T - b) ** 2
    nu = np.maximum((weights * squares).sum(0) / weights.sum(0), FLOOR * y.var())
    return mixture._replace(a=a, b=b, nu=nu)


def _packed(mixture: Mixture) -> Array:
    """Return what is free as one vector: τ and ν as logarithms, no gate of the reference."""
    parts: tuple[Any, ...] = (
        mixture.beta1[:-1], mixture.beta0[:-1], np.log(mixture.tau), mixture.a, mixture.b,
        np.log(mixture.nu),
    )  # fmt: skip
    return np.concatenate([np.ravel(part) for part in parts])


def _unpacked(vector: Array, like: Mixture) -> Mixture:
    shapes = [like.beta1[:-1].shape, like.beta0[:-1].shape, (1,), like.a.shape, like.b.shape,
              like.nu.shape]  # fmt: skip
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    parts = [p.reshape(s) for p, s in zip(np.split(vector, ends[:-1]), shapes, strict=True)]
    beta1, beta0, log_tau, a, b, log_nu = parts
    return Mixture(
        np.concatenate([beta1, like.beta1[-1:]]), np.concatenate([beta0, like.beta0[-1:]]),
        float(np.exp(log_tau[0])), a, b, np.exp(log_nu),
    )  # fmt: skip
