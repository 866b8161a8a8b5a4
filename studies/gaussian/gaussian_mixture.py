"""The softmax Gaussian mixture of experts with temperature, its likelihood and gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, ndtr

Array = NDArray[np.float64]
Function = Callable[[Array], Array]


def _bell(x: Array) -> Array:
    return np.exp(-x * x / 2) / np.sqrt(2 * np.pi)


def _shares(logits: Array) -> tuple[Array, Array]:
    """Return the softmax of logits (n, K) and the logarithms of their sums (n, 1)."""
    top = logits.max(1, keepdims=True)
    parts = np.exp(logits - top)
    total = parts.sum(1, keepdims=True)
    return parts / total, np.log(total) + top


ACTIVATIONS: dict[str, tuple[Function, Function]] = {
    "identity": (lambda x: x, np.ones_like),
    "tanh": (np.tanh, lambda x: 1 - np.tanh(x) ** 2),
    "sigmoid": (expit, lambda x: expit(x) * expit(-x)),
    "gelu": (lambda x: x * ndtr(x), lambda x: ndtr(x) + x * _bell(x)),
}
"""Name -> σ and its derivative."""


class Mixture(NamedTuple):
    """Parameters of K experts on d features; the last expert is the reference of the gate.

    ``p(y | x) = Σ_i softmax_i((σ(β1_i · x) + β0_i) / τ) N(y; a_i · x + b_i, ν_i)``
    (Nguyen et al., 2024, arXiv 2401.13875), where σ the identity is the plain dense-to-sparse gate.

    Attributes:
        beta1: β1 (K, d).
        beta0: β0 (K,).
        tau: τ > 0.
        a: Slopes (K, d).
        b: Intercepts (K,).
        nu: Variances ν (K,) > 0.
    """

    beta1: Array
    beta0: Array
    tau: float
    a: Array
    b: Array
    nu: Array

    @property
    def num_experts(self) -> int:
        """K."""
        return len(self.beta0)

    @property
    def weights(self) -> Array:
        """Weights exp(β0 / τ) (K,) of the atoms, not scaled to sum 1."""
        return np.exp(self.beta0 / self.tau)

    def scaled(self, slope: float, temperature: float) -> Mixture:
        """Return the mixture with β1 times ``slope``, and β0 and τ times ``temperature``."""
        return self._replace(
            beta1=self.beta1 * slope, beta0=self.beta0 * temperature, tau=self.tau * temperature
        )


class Likelihood(NamedTuple):
    """What a mixture makes of a sample.

    Attributes:
        value: Mean log-likelihood of a sample point.
        gates: Prior weights of the experts (n, K).
        responsibilities: Posterior weights (n, K).
        logits: (σ(β1 · x) + β0) / τ (n, K).
        residuals: y − a · x − b (n, K).
    """

    value: float
    gates: Array
    responsibilities: Array
    logits: Array
    residuals: Array


def likelihood(mixture: Mixture, x: Array, y: Array, activation: str) -> Likelihood:
    """Return the mean log-likelihood of x (n, d) and y (n,), with gates and residuals."""
    function, _ = ACTIVATIONS[activation]
    logits = (function(x @ mixture.beta1.T) + mixture.beta0) / mixture.tau
    gates, normalizer = _shares(logits)
    residuals = y[:, None] - x @ mixture.a.T - mixture.b
    log_density = -0.5 * (np.log(2 * np.pi * mixture.nu) + residuals**2 / mixture.nu)
    responsibilities, total = _shares(logits - normalizer + log_density)
    return Likelihood(float(total.mean()), gates, responsibilities, logits, residuals)


def gradient(
    mixture: Mixture, x: Array, found: Likelihood, activation: str
) -> tuple[Array, Array, float, Array, Array, Array]:
    """Return the gradient of the mean log-likelihood by (β1, β0, log τ, a, b, log ν).

    Args:
        mixture: Where.
        x: Features (n, d).
        found: Of `likelihood`, there.
        activation: σ.
    """
    _, derivative = ACTIVATIONS[activation]
    n = len(x)
    surplus = (found.responsibilities - found.gates) / n
    by_score = surplus * derivative(x @ mixture.beta1.T) / mixture.tau
    pull = found.responsibilities * found.residuals / mixture.nu / n
    spread = found.responsibilities * (found.residuals**2 / mixture.nu - 1) / (2 * n)
    return (
        by_score.T @ x,
        surplus.sum(0) / mixture.tau,
        -float((surplus * found.logits).sum()),
        pull.T @ x,
        pull.sum(0),
        spread.sum(0),
    )


def drawn(
    mixture: Mixture, num: int, activation: str, generator: np.random.Generator
) -> tuple[Array, Array]:
    """Draw x (num, d), uniform in [−1, 1], and y (num,) of a mixture."""
    x = generator.uniform(-1, 1, (num, mixture.beta1.shape[1]))
    function, _ = ACTIVATIONS[activation]
    logits = (function(x @ mixture.beta1.T) + mixture.beta0) / mixture.tau
    expert = (logits + generator.gumbel(size=logits.shape)).argmax(1)
    mean = (x * mixture.a[expert]).sum(1) + mixture.b[expert]
    return x, mean + np.sqrt(mixture.nu[expert]) * generator.standard_normal(num)
