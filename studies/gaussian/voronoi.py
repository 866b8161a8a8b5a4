"""How far a fitted mixture is from the true one, by the cells of its atoms."""

from __future__ import annotations

import numpy as np

from studies.gaussian.gaussian_mixture import Array, Mixture

EXPONENTS = {2: 4, 3: 6}
"""Atoms in a cell -> r̄ of the losses of its b and ν."""


def cells(fitted: Mixture, true: Mixture) -> Array:
    """Return for each fitted atom the nearest true one (K,), by β1, a, b and ν."""
    points = [np.column_stack([m.beta1, m.a, m.b, m.nu]) for m in (fitted, true)]
    return np.linalg.norm(points[0][:, None] - points[1][None], axis=2).argmin(1)


def voronoi_loss(fitted: Mixture, true: Mixture, *, merged: bool = False) -> float:
    """Return D_1, or with ``merged`` D_V, whose exponents grow where atoms share a cell.

    Args:
        fitted: With K atoms.
        true: With K* ≤ K atoms.
        merged: Whether cells of several atoms have the losses ‖Δβ1‖², |Δτ|, ‖Δa‖², |Δb|^r̄ and
            |Δν|^(r̄/2).
    """
    cell, loss = cells(fitted, true), 0.0
    for j in range(true.num_experts):
        inside = np.flatnonzero(cell == j)
        weights = fitted.weights[inside]
        several = merged and len(inside) > 1
        r = EXPONENTS.get(len(inside), 1) if several else 1
        square = 2 if several else 1
        errors = (
            np.linalg.norm(fitted.beta1[inside] - true.beta1[j], axis=1) ** square
            + abs(fitted.tau - true.tau)
            + np.linalg.norm(fitted.a[inside] - true.a[j], axis=1) ** square
            + np.abs(fitted.b[inside] - true.b[j]) ** r
            + np.abs(fitted.nu[inside] - true.nu[j]) ** (r / 2 if several else 1)
        )
        loss += abs(weights.sum() - true.weights[j]) + float((weights * errors).sum())
    return float(loss)
