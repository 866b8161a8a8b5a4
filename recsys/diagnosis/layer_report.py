"""The three faults of mixtures of experts at one layer, as numbers.

E experts, S gates, T tasks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DEAD = 0.01
"""An expert is dead if no gate gives it more than this on average."""
DEGRADED = 0.8
"""A shared expert is degraded if more than this part of its use, or gradient, is of one task."""
SHARED = "shared"


@dataclass(frozen=True, eq=False)
class LayerReport:
    """What the experts and gates of a layer do.

    Attributes:
        name: Of the layer.
        tasks: Names of the T tasks.
        expert_names: Name of each expert.
        expert_groups: Group of each: a task, a category or ``shared``.
        gate_names: Name of each gate.
        zero_rate: Fraction of activations that are exactly 0 (E,).
        near_zero_rate: Fraction below 0.05 standard deviations of the expert (E,).
        mean: Mean activation (E,).
        std: Its standard deviation (E,).
        effective_rank: exp of the entropy of the singular values (E,).
        weights: Mean weight of each gate for each expert (S, E), without residual paths.
        visible: Where a gate sees an expert (S, E), though its weight may be 0 in all rows; for
            gates without a mask, where it ever gave one any weight.
        row_entropy: Mean over rows of the entropy of a gate (S,), nats.
        residual: Mean weight of self gates or residual paths (S, E); None without.
        gradients: ‖∂L_t/∂θ_e‖ (T, E); None where none were computed.
        cosines: Between the gradients of tasks at the shared experts (T, T); None likewise.
    """

    name: str
    tasks: tuple[str, ...]
    expert_names: tuple[str, ...]
    expert_groups: tuple[str, ...]
    gate_names: tuple[str, ...]
    zero_rate: np.ndarray
    near_zero_rate: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    effective_rank: np.ndarray
    weights: np.ndarray
    visible: np.ndarray
    row_entropy: np.ndarray
    residual: np.ndarray | None = None
    gradients: np.ndarray | None = None
    cosines: np.ndarray | None = None

    @property
    def scale_ratio(self) -> float:
        """Largest over smallest standard deviation of an expert; infinite if one is constant."""
        low, high = float(self.std.min()), float(self.std.max())
        return high / low if low > 0 else float("inf")

    @property
    def largest(self) -> np.ndarray:
        """Largest mean weight of each gate (S,)."""
        return np.asarray(self.weights.max(1))

    @property
    def entropy(self) -> np.ndarray:
        """Entropy of the mean weights of each gate (S,), nats."""
        fractions = _fractions(np.clip(self.weights, 0, None), 1)
        return -np.sum(fractions * np.log(np.where(fractions > 0, fractions, 1)), 1)

    @property
    def dead(self) -> np.ndarray:
        """Experts to which no gate gives more than 1 % (E,)."""
        return np.asarray(self.weights.max(0) < DEAD)

    @property
    def users(self) -> np.ndarray:
        """Gates of tasks or groups, all but that of the shared path (S,)."""
        return np.array([name != SHARED for name in self.gate_names])

    @property
    def shared(self) -> np.ndarray:
        """Experts that several tasks or groups use, and that belong to none of them (E,)."""
        return shared_experts(self.expert_groups, self.gate_names, self.visible)

    @property
    def occupancy(self) -> np.ndarray:
        """Part of an expert's mean weight that each gate takes (S, E).

        o_te = ḡ_te / Σ_t ḡ_te over the gates of tasks or groups; NaN elsewhere, and for experts
        that are not shared.
        """
        used = np.where(self.users[:, None], np.clip(self.weights, 0, None), 0)
        found = np.where(self.users[:, None] & self.shared, _fractions(used, 0), np.nan)
        return np.asarray(found)

    @property
    def gradient_share(self) -> np.ndarray | None:
        """Part of the gradient norms at a shared expert that is of each task (T, E), else NaN."""
        if self.gradients is None:
            return None
        return np.where(self.shared, _fractions(self.gradients, 0), np.nan)

    @property
    def degraded(self) -> np.ndarray:
        """Shared experts of which one task has more than 80 %, by use or by gradient (E,)."""
        found = _largest(self.occupancy) > DEGRADED
        share = self.gradient_share
        return found if share is None else found | (_largest(share) > DEGRADED)

    @property
    def task_gates(self) -> np.ndarray:
        """Gates that are named like a task (S,)."""
        return np.array([name in self.tasks for name in self.gate_names])

    @property
    def own_weight(self) -> np.ndarray:
        """Mean weight that the gate of each task gives to its own experts (T,), NaN without any."""
        found = np.full(len(self.tasks), np.nan)
        for t, task in enumerate(self.tasks):
            own = np.array([group == task for group in self.expert_groups])
            if task in self.gate_names and own.any():
                found[t] = self.weights[self.gate_names.index(task), own].sum()
        return found

    @property
    def own_gradient(self) -> np.ndarray | None:
        """Part of the gradient norms of each task that its own experts get (T,)."""
        if self.gradients is None:
            return None
        own = np.array([[group == task for group in self.expert_groups] for task in self.tasks])
        total = self.gradients.sum(1)
        found = np.where(own, self.gradients, 0).sum(1)
        return np.divide(
            found, total, out=np.full(len(total), np.nan), where=(total > 0) & own.any(1)
        )


def shared_experts(
    groups: tuple[str, ...], gate_names: tuple[str, ...], visible: np.ndarray
) -> np.ndarray:
    """Return which experts several gates use and none owns (E,).

    Args:
        groups: Group of each expert.
        gate_names: Name of each gate; that named ``shared`` does not count as a user.
        visible: Where a gate sees an expert (S, E).
    """
    users = np.array([name != SHARED for name in gate_names])
    seen_by = visible[users].sum(0)
    owned = np.array([group != SHARED and group in gate_names for group in groups])
    return np.asarray((seen_by > 1) & ~owned)


def _fractions(values: np.ndarray, axis: int) -> np.ndarray:
    total = values.sum(axis, keepdims=True)
    none = np.full(values.shape, np.nan)
    return np.divide(values, total, out=none, where=np.broadcast_to(total > 0, values.shape))


def _largest(fractions: np.ndarray) -> np.ndarray:
    """Return the largest of each column (E,), 0 where all are NaN."""
    return np.where(np.isnan(fractions), 0.0, fractions).max(0)
