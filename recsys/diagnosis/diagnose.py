"""Measuring the layers of experts of a model on fixed batches; permutation importance."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import polars as pl
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from numpy.typing import ArrayLike
from torch import Tensor, nn

from core_gates.errors import GatesError, check_at_least
from harness.evidence import Difference, Resamples
from recsys.diagnosis.expert_report import NO_EXPERTS, ExpertReport, LayerReport, shared_experts
from recsys.diagnosis.layer_activity import (
    LayerActivity,
    TaskGradients,
    TaskLosses,
    cross_entropies,
    observed,
    visible_experts,
)
from recsys.metrics.resampled import summed_log_loss, user_resamples
from recsys.models.net import ExpertLayer, MultiTaskNet


class Labeled(Protocol):
    """What every batch has, such as `recsys.inputs.Batch`."""

    @property
    def labels(self) -> Tensor: ...  # noqa: D102
    @property
    def mask(self) -> Tensor: ...  # noqa: D102
    @property
    def weight(self) -> Tensor: ...  # noqa: D102


class Rows(NamedTuple):
    """Inputs of a network by itself, with labels.

    Attributes:
        v: Inputs (B, D), or (B, copies, D).
        labels: 0 or 1 (B, T).
        mask: True where the task counts (B, T).
        weight: Sample weights (B,).
        prior: Prior (B, P) of networks that take one.
        ids: Rows (B,) of networks whose gates route by identity.
    """

    v: Tensor
    labels: Tensor
    mask: Tensor
    weight: Tensor
    prior: Tensor | None = None
    ids: Tensor | None = None

    def take(self, rows: Tensor | slice) -> "Rows":
        """Return some of the rows."""
        return self._each(lambda column: column[rows])

    def to(self, device: torch.device | str) -> "Rows":
        """Return the rows on a device."""
        return self._each(lambda column: column.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Rows":
        made: list[Any] = [None if column is None else change(column) for column in self]
        return Rows(*made)


Forward = Callable[[Any], Tensor]
"""Batch -> logits (B, T)."""


def diagnose(
    model: nn.Module,
    batches: Iterable[Labeled],
    losses: TaskLosses = cross_entropies,
    *,
    forward: Forward | None = None,
    gradients: bool = True,
    rank_rows: int = 1024,
) -> ExpertReport:
    """Return the report of the experts of a model, in evaluation mode; it stays as it was.

    Args:
        model: A network, a ranker, or any module that holds a `MultiTaskNet`.
        batches: Rows to measure; always the same ones, for reports to be compared. Those of a
            ranker are ``Batch``, those of a network `Rows`.
        losses: Loss of every task, for the gradients.
        forward: From a batch to logits (B, T); by default that of a ranker or network.
        gradients: Whether to compute the gradients that tasks send to experts: one backward pass
            per task and batch.
        rank_rows: Rows of which effective ranks are computed.

    Raises:
        GatesError: There is no batch, or the model holds no network.
    """
    net = network_of(model)
    layers = net.expert_layers()
    tasks = tuple(task.name for task in net.tasks)
    activity = [
        LayerActivity(
            len(layer.expert_names),
            len(layer.gate_names),
            expert_of_output=getattr(layer.experts, "expert_of_output", None),
            rank_rows=rank_rows,
            visible=visible_experts(layer.mixture),
        )
        for layer in layers
    ]
    task_gradients = TaskGradients(layers)
    positives, rows = torch.zeros(len(tasks), dtype=torch.int64), 0
    logits_of = forward or _forward_of(model)
    with evaluating(model), observed(layers, activity):
        for batch in batches:
            count = len(batch.labels)
            rows += count
            positives += ((batch.labels > 0.5) & batch.mask).sum(0).cpu()
            if not layers:
                continue
            with torch.set_grad_enabled(gradients):
                logits = logits_of(batch)
                if gradients:
                    task_losses = losses(logits, batch.labels, batch.mask, batch.weight)
                    task_gradients.add(task_losses, count)
    if not rows:
        raise GatesError("there is no row to diagnose a model on, expected a batch at least")
    seen = [pair for pair in zip(layers, activity, strict=True) if pair[1].seen]
    reports = tuple(_report(layer, sums, tasks, task_gradients) for layer, sums in seen)
    notes = _notes(layers, activity, task_gradients.left_out if gradients else [], tasks, positives)
    return ExpertReport(reports, tasks, tuple(positives.tolist()), rows, notes)


def network_of(model: nn.Module) -> MultiTaskNet:
    """Return the multi-task network that a model is or holds.

    Raises:
        GatesError: There is none.
    """
    for module in model.modules():
        if isinstance(module, MultiTaskNet):
            return module
    raise GatesError(f"{type(model).__name__} holds no MultiTaskNet, so it has no experts to show")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode inside the block, and back into its mode after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _forward_of(model: nn.Module) -> Forward:
    def forward(batch: Any) -> Tensor:
        if isinstance(batch, Rows):
            further = {"prior": batch.prior, "ids": batch.ids}
            given = {name: value for name, value in further.items() if value is not None}
            return cast(Tensor, model(batch.v, **given))
        return cast(Tensor, model(batch.sparse, batch.dense, batch.sequences))

    return forward


def _report(
    layer: ExpertLayer, sums: LayerActivity, tasks: tuple[str, ...], task_gradients: TaskGradients
) -> LayerReport:
    visible = sums.visible.numpy()
    shared = shared_experts(layer.expert_groups, layer.gate_names, visible)
    gradients = task_gradients.of(layer, torch.from_numpy(shared))
    numbers = {name: part.numpy() for name, part in (sums.activations() | sums.gates()).items()}
    return LayerReport(
        layer.name,
        tasks,
        layer.expert_names,
        layer.expert_groups,
        layer.gate_names,
        visible=visible,
        gradients=None if gradients is None else gradients.norms.numpy(),
        cosines=None if gradients is None else gradients.cosines.numpy(),
        **numbers,
    )


def _notes(
    layers: Sequence[ExpertLayer],
    activity: Sequence[LayerActivity],
    left_out: Sequence[str],
    tasks: Sequence[str],
    positives: Tensor,
) -> tuple[str, ...]:
    if not layers:
        return (NO_EXPERTS,)
    unseen = [layer.name for layer, sums in zip(layers, activity, strict=True) if not sums.seen]
    none = [task for task, count in zip(tasks, positives.tolist(), strict=True) if not count]
    notes = [f"{name} did not run: is the model compiled?" for name in unseen]
    notes += [f"no gradients at {name}: its parameters mix experts" for name in left_out]
    if none:
        notes.append(f"no positive row of {', '.join(none)}")
    return tuple(notes)


Score = Callable[[pl.DataFrame], np.ndarray]
"""Table of N rows -> probabilities (N, T)."""


class Importance(NamedTuple):
    """What the log-loss gains when a field is permuted over the rows.

    Attributes:
        field: Its name.
        total: Of the sum over tasks, with an interval over users and permutations.
        tasks: Of each task, by name.
    """

    field: str
    total: Difference
    tasks: dict[str, Difference]


def permutation_importance(
    score: Score,
    table: pl.DataFrame,
    fields: Sequence[str] | Mapping[str, Sequence[str]],
    tasks: Sequence[str],
    labels: ArrayLike,
    users: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    repeats: int = 3,
    draws: Resamples | None = None,
    seed: int = 0,
) -> list[Importance]:
    """Return the importance of every field, the largest first (Breiman, 2001; Fisher et al., 2019).

    Values are moved between rows of the table, so that crossed features and histories made of it
    change, too. A field whose information other fields repeat looks unimportant: permute such
    fields together.

    Args:
        score: Of the model, raw rows to probabilities.
        table: N rows that were not trained on.
        fields: Columns; or name of a group to its columns, which are permuted together.
        tasks: T names.
        labels: (N, T), 0 or 1; anything where masked.
        users: (N,) user of each row.
        mask: (N, T) true where a task counts; everywhere by default.
        weights: (N,) sample weights; 1 by default.
        repeats: Permutations of each field.
        draws: Resamples of users; 1,000 by default.
        seed: Of the permutations.

    Raises:
        GatesError: The table lacks a column, or shapes differ.
        ValueError: ``repeats`` is below 1.
    """
    check_at_least(1, repeats=repeats)
    groups = dict(fields) if isinstance(fields, Mapping) else {name: (name,) for name in fields}
    if missing := sorted({c for g in groups.values() for c in g} - set(table.columns)):
        raise GatesError(
            f"the table lacks {', '.join(missing)}; its columns are {', '.join(table.columns)}"
        )
    draws = draws or user_resamples(users)
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(len(table)) for _ in range(repeats)]

    def losses(of: pl.DataFrame) -> Callable[[np.ndarray], Mapping[str, np.ndarray]]:
        return summed_log_loss(labels, score(of), users, mask=mask, weights=weights, tasks=tasks)

    plain, importances = losses(table), []
    for name, columns in groups.items():
        moved = [table.with_columns(table[c].gather(order) for c in columns) for order in orders]
        gaps = draws.differences([losses(predicted) for predicted in moved], plain)
        importances.append(Importance(name, gaps.pop("log_loss"), gaps))
    return sorted(importances, key=lambda importance: -importance.total.value)


class ExpertReportCallback(Callback):
    """Log the faults of experts every few steps, on the same rows each time.

    Figures are named ``experts/zero_rate_max`` and so on, those of
    `recsys.diagnosis.expert_report.ExpertReport.summary`. Training is not changed: the rows
    pass through the model in evaluation mode, without randomness. Every rank measures its own
    rows, since sharded tables need all ranks; the figures of the first rank are logged.

    Args:
        every: Optimizer steps between two reports; the first comes after the first step.
        rows: Of the first training batch, measured if ``batches`` are not given.
        batches: What to measure instead.
        gradients: Whether to compute the gradients of tasks: one backward pass per task.
        forward: From a batch to logits; by default the module itself.

    Attributes:
        report: The last report; None before the first.

    Raises:
        ValueError: ``every`` or ``rows`` is below 1.
    """

    def __init__(
        self,
        every: int = 100,
        *,
        rows: int = 1024,
        batches: Sequence[Labeled] | None = None,
        gradients: bool = False,
        forward: Forward | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, every=every, rows=rows)
        self.every, self.rows, self.gradients = every, rows, gradients
        self.report: ExpertReport | None = None
        self._batches: list[Any] | None = None if batches is None else list(batches)
        self._forward = forward
        self._reported = 0

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Report after the first step, and then every ``every`` steps."""
        if self._batches is None:
            self._batches = [batch.take(slice(0, self.rows))]
        step = trainer.global_step
        if step == self._reported or (step - 1) % self.every:
            return  # a step of several batches is reported once
        self._reported = step
        self.report = diagnose(
            pl_module,
            [batch.to(pl_module.device) for batch in self._batches],
            forward=self._forward or pl_module,
            gradients=self.gradients,
            rank_rows=min(self.rows, 512),
        )
        figures = {f"experts/{name}": value for name, value in self.report.summary().items()}
        for logger in trainer.loggers if figures and trainer.is_global_zero else []:
            logger.log_metrics(figures, step=step)
