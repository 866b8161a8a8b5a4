"""The three faults of mixtures of experts, at one layer and in a model: numbers, tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from scipy.stats import spearmanr

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
        shares = np.where(self.users[:, None] & self.shared, _fractions(used, 0), np.nan)
        return np.asarray(shares)

    @property
    def gradient_share(self) -> np.ndarray | None:
        """Part of the gradient norms at a shared expert that is of each task (T, E), else NaN."""
        if self.gradients is None:
            return None
        return np.where(self.shared, _fractions(self.gradients, 0), np.nan)

    @property
    def degraded(self) -> np.ndarray:
        """Shared experts of which one task has more than 80 %, by use or by gradient (E,)."""
        is_degraded = _largest(self.occupancy) > DEGRADED
        share = self.gradient_share
        return is_degraded if share is None else is_degraded | (_largest(share) > DEGRADED)

    @property
    def task_gates(self) -> np.ndarray:
        """Gates that are named like a task (S,)."""
        return np.array([name in self.tasks for name in self.gate_names])

    @property
    def own_weight(self) -> np.ndarray:
        """Mean weight that the gate of each task gives to its own experts (T,), NaN without any."""
        weight_of_task = np.full(len(self.tasks), np.nan)
        for t, task in enumerate(self.tasks):
            is_own = np.array([group == task for group in self.expert_groups])
            if task in self.gate_names and is_own.any():
                weight_of_task[t] = self.weights[self.gate_names.index(task), is_own].sum()
        return weight_of_task

    @property
    def own_gradient(self) -> np.ndarray | None:
        """Part of the gradient norms of each task that its own experts get (T,)."""
        if self.gradients is None:
            return None
        is_own = np.array([[group == task for group in self.expert_groups] for task in self.tasks])
        total = self.gradients.sum(1)
        own_sums = np.where(is_own, self.gradients, 0).sum(1)
        return np.divide(
            own_sums, total, out=np.full(len(total), np.nan), where=(total > 0) & is_own.any(1)
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


NO_EXPERTS = "the model has no layer of experts"


@dataclass(frozen=True, eq=False)
class ExpertReport:
    """Expert collapse, degradation and underfitting of a model (HoME, arXiv 2408.05430).

    Attributes:
        layers: One report per layer of experts; empty for models without.
        tasks: Names of the tasks.
        positives: Positive rows of each task (T,), where it counts.
        rows: Rows that were measured.
        notes: What could not be measured, and why.
    """

    layers: tuple[LayerReport, ...]
    tasks: tuple[str, ...]
    positives: tuple[int, ...]
    rows: int
    notes: tuple[str, ...] = ()

    def layer(self, name: str) -> LayerReport:
        """Return the layer of a name.

        Raises:
            KeyError: There is none.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(
            f"no layer {name!r}; there are {', '.join(layer.name for layer in self.layers)}"
        )

    def underfitting(self, layer: LayerReport) -> float:
        """Return the rank correlation of own-expert weight and positives over tasks.

        Near 1 where sparse tasks ignore their own experts; NaN with fewer than three tasks that
        have any, or where one of the two does not vary.
        """
        own_weight, counts = layer.own_weight, np.array(self.positives, dtype=float)
        finite = np.isfinite(own_weight)
        if finite.sum() < 3 or np.ptp(own_weight[finite]) == 0 or np.ptp(counts[finite]) == 0:
            return float("nan")
        return float(spearmanr(own_weight[finite], counts[finite]).statistic)

    def summary(self) -> dict[str, float]:
        """Return the worst figure of every fault over all layers; empty without experts.

        ``zero_rate_max``, ``near_zero_rate_max`` and ``scale_ratio`` (collapse);
        ``gate_weight_max``, and ``task_gate_weight_max`` of the gates of tasks, ``occupancy_max``,
        ``gradient_share_max`` and ``degraded``, the number of degraded experts (degradation);
        ``dead``, the number of dead ones; ``own_weight_min``, ``own_weight_correlation`` with the
        positives of the tasks, and ``own_gradient_min`` (underfitting) of the last layer where
        tasks have their own experts; ``task_cosine_min`` between gradients. What was not measured
        is absent.
        """
        figures: dict[str, float] = {}
        if not self.layers:
            return figures
        tasks = [layer.largest[layer.task_gates] for layer in self.layers]
        columns = {
            "zero_rate_max": [layer.zero_rate for layer in self.layers],
            "near_zero_rate_max": [layer.near_zero_rate for layer in self.layers],
            "scale_ratio": [np.array([layer.scale_ratio]) for layer in self.layers],
            "gate_weight_max": [layer.largest for layer in self.layers],
            "task_gate_weight_max": tasks,
            "occupancy_max": [layer.occupancy for layer in self.layers],
            "gradient_share_max": [layer.gradient_share for layer in self.layers],
        }
        figures |= _known({name: _extreme(parts, max) for name, parts in columns.items()})
        figures["degraded"] = float(sum(int(layer.degraded.sum()) for layer in self.layers))
        figures["dead"] = float(sum(int(layer.dead.sum()) for layer in self.layers))
        owning = [layer for layer in self.layers if np.isfinite(layer.own_weight).any()]
        if owning:
            last = owning[-1]
            figures |= _known(
                {
                    "own_weight_min": _extreme([last.own_weight], min),
                    "own_weight_correlation": self.underfitting(last),
                    "own_gradient_min": _extreme([last.own_gradient], min),
                }
            )
        cosines = _extreme([layer.cosines for layer in self.layers], min)
        return figures | _known({"task_cosine_min": cosines})

    def table(self) -> pl.DataFrame:
        """Return one row per expert.

        Columns ``layer``, ``expert``, ``group``, ``zero_rate``, ``near_zero_rate``, ``mean``,
        ``std``, ``effective_rank``, ``gate_weight_max``, ``gate``, the one that gives it,
        ``dead``, ``shared``, ``occupancy_max``, ``gradient_share_max`` and ``degraded``. What was
        not measured, or is not defined, is null.
        """
        rows = [row for layer in self.layers for row in _expert_rows(layer)]
        return pl.DataFrame(rows, schema=_EXPERT_COLUMNS).with_columns(
            pl.col(pl.Float64).fill_nan(None)
        )

    def gate_table(self) -> pl.DataFrame:
        """Return one row per gate.

        Columns ``layer``, ``gate``, ``largest`` weight and its ``expert``, ``entropy`` of the mean
        weights and mean ``row_entropy`` (nats); of gates of tasks ``positives``, ``own_weight``
        and ``own_gradient``. What is not defined is null.
        """
        rows = [row for layer in self.layers for row in self._gate_rows(layer)]
        return pl.DataFrame(rows, schema=_GATE_COLUMNS).with_columns(
            pl.col(pl.Float64).fill_nan(None)
        )

    def _gate_rows(self, layer: LayerReport) -> list[dict[str, Any]]:
        own_weight = dict(zip(self.tasks, layer.own_weight.tolist(), strict=True))
        positives = dict(zip(self.tasks, self.positives, strict=True))
        gradient = layer.own_gradient
        shares = {} if gradient is None else dict(zip(self.tasks, gradient.tolist(), strict=True))
        return [
            {
                "layer": layer.name,
                "gate": gate,
                "largest": float(layer.largest[s]),
                "expert": layer.expert_names[int(layer.weights[s].argmax())],
                "entropy": float(layer.entropy[s]),
                "row_entropy": float(layer.row_entropy[s]),
                "positives": positives.get(gate),
                "own_weight": own_weight.get(gate),
                "own_gradient": shares.get(gate),
            }
            for s, gate in enumerate(layer.gate_names)
        ]


_EXPERT_COLUMNS = {
    "layer": pl.String, "expert": pl.String, "group": pl.String, "zero_rate": pl.Float64,
    "near_zero_rate": pl.Float64, "mean": pl.Float64, "std": pl.Float64,
    "effective_rank": pl.Float64, "gate_weight_max": pl.Float64, "gate": pl.String,
    "dead": pl.Boolean, "shared": pl.Boolean, "occupancy_max": pl.Float64,
    "gradient_share_max": pl.Float64, "degraded": pl.Boolean,
}  # fmt: skip
_GATE_COLUMNS = {
    "layer": pl.String, "gate": pl.String, "largest": pl.Float64, "expert": pl.String,
    "entropy": pl.Float64, "row_entropy": pl.Float64, "positives": pl.Int64,
    "own_weight": pl.Float64, "own_gradient": pl.Float64,
}  # fmt: skip


def _expert_rows(layer: LayerReport) -> list[dict[str, Any]]:
    occupancy, share = layer.occupancy, layer.gradient_share
    return [
        {
            "layer": layer.name,
            "expert": name,
            "group": layer.expert_groups[e],
            "zero_rate": float(layer.zero_rate[e]),
            "near_zero_rate": float(layer.near_zero_rate[e]),
            "mean": float(layer.mean[e]),
            "std": float(layer.std[e]),
            "effective_rank": float(layer.effective_rank[e]),
            "gate_weight_max": float(layer.weights[:, e].max()),
            "gate": layer.gate_names[int(layer.weights[:, e].argmax())],
            "dead": bool(layer.dead[e]),
            "shared": bool(layer.shared[e]),
            "occupancy_max": _extreme([occupancy[:, e]], max),
            "gradient_share_max": None if share is None else _extreme([share[:, e]], max),
            "degraded": bool(layer.degraded[e]),
        }
        for e, name in enumerate(layer.expert_names)
    ]


def _extreme(parts: list[np.ndarray | None] | list[np.ndarray], of: Any) -> float:
    """Return the largest or smallest of all values; NaN without any."""
    values = [part[~np.isnan(part)] for part in parts if part is not None]
    numbers = np.concatenate([value.ravel() for value in values]) if values else np.zeros(0)
    return float(of(numbers)) if len(numbers) else float("nan")


def _known(figures: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if not np.isnan(value)}
