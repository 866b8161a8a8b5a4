"""The three faults of mixtures of experts in a model: numbers, tables, JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from scipy.stats import spearmanr

from recsys.diagnosis.layer_report import LayerReport

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
        raise KeyError(f"no layer {name!r}; there are {', '.join(one.name for one in self.layers)}")

    def underfitting(self, layer: LayerReport) -> float:
        """Return the rank correlation of own-expert weight and positives over tasks.

        Near 1 where sparse tasks ignore their own experts; NaN with fewer than three tasks that
        have any, or where one of the two does not vary.
        """
        own, counts = layer.own_weight, np.array(self.positives, dtype=float)
        known = np.isfinite(own)
        if known.sum() < 3 or np.ptp(own[known]) == 0 or np.ptp(counts[known]) == 0:
            return float("nan")
        return float(spearmanr(own[known], counts[known]).statistic)

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
        found: dict[str, float] = {}
        if not self.layers:
            return found
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
        found |= _known({name: _extreme(parts, max) for name, parts in columns.items()})
        found["degraded"] = float(sum(int(layer.degraded.sum()) for layer in self.layers))
        found["dead"] = float(sum(int(layer.dead.sum()) for layer in self.layers))
        owning = [layer for layer in self.layers if np.isfinite(layer.own_weight).any()]
        if owning:
            last = owning[-1]
            found |= _known(
                {
                    "own_weight_min": _extreme([last.own_weight], min),
                    "own_weight_correlation": self.underfitting(last),
                    "own_gradient_min": _extreme([last.own_gradient], min),
                }
            )
        cosines = _extreme([layer.cosines for layer in self.layers], min)
        return found | _known({"task_cosine_min": cosines})

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
        own = dict(zip(self.tasks, layer.own_weight.tolist(), strict=True))
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
                "own_weight": own.get(gate),
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
    known = np.concatenate([value.ravel() for value in values]) if values else np.zeros(0)
    return float(of(known)) if len(known) else float("nan")


def _known(figures: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if not np.isnan(value)}
