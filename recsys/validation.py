"""Losses and AUC over all rows of all ranks, intercepts of tasks, and averaged weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from core_gates.collectives import Group, num_ranks
from core_gates.errors import check_at_least, check_fraction, check_positive
from core_gates.numerics import accumulation_dtype, unrounded
from recsys.inputs import Batch
from recsys.schema import Task

if TYPE_CHECKING:
    from recsys.ranker import Ranker


class TaskSums(NamedTuple):
    """Sums over rows from which means over more rows are made.

    Attributes:
        losses: Σ s m BCE of each task (T,).
        weights: Σ s m of each task (T,).
    """

    losses: Tensor
    weights: Tensor


class TaskLosses(NamedTuple):
    """Losses of a batch, and of which tasks they are.

    Attributes:
        losses: Loss of each task (T,), 0 where it does not count.
        counted: True (T,) where a task counts in a row of the batch, on any rank.
    """

    losses: Tensor
    counted: Tensor


class MultiTaskLoss(nn.Module):
    """The binary cross-entropy of every task, on logits.

    ``L_t = mean_b(s_b m_bt BCE_bt) / max(mean_b(s_b m_bt), ε)`` with sample weights s and masks m.
    The denominator is that of the rows of all ranks, so that averaging gradients over ranks with
    equally many rows gives the gradient of all rows, also where ranks have different masks.

    Args:
        tasks: The tasks, with their weights.
        eps: ε, for tasks that count in no row of a batch; their loss is 0.
        group: Process group; all ranks if None.

    Attributes:
        weights: Weights w of the tasks (T,).

    Raises:
        ValueError: There is no task, or ``eps`` is not positive.
    """

    weights: Tensor

    def __init__(self, tasks: Sequence[Task], *, eps: float = 1e-8, group: Group = None) -> None:
        super().__init__()
        check_at_least(1, tasks=len(tasks))
        check_positive(eps=eps)
        self.eps, self.group = eps, group
        weights = torch.tensor([float(task.weight) for task in tasks])
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        """Return the unweighted losses L (T,) of the tasks; see `counted`."""
        return self.counted(logits, labels, mask, weight).losses

    def counted(self, logits: Tensor, labels: Tensor, mask: Tensor, weight: Tensor) -> TaskLosses:
        """Return the unweighted losses L (T,) of the tasks, and which tasks have any labeled row.

        Args:
            logits: Logits (B, T).
            labels: 0 or 1 (B, T); what they hold where the mask is False does not matter.
            mask: True (B, T) where a task counts.
            weight: Weights of the rows (B,).

        Raises:
            ValueError: The shapes do not fit.
        """
        sums = task_sums(logits, labels, mask, weight)
        mean = sums.weights / max(len(logits), 1)
        if num_ranks(self.group) > 1:
            dist.all_reduce(mean, group=self.group)
            mean = mean / num_ranks(self.group)
        losses = sums.losses / max(len(logits), 1) / mean.clamp(min=self.eps)
        return TaskLosses(losses, mean > 0)


def task_sums(logits: Tensor, labels: Tensor, mask: Tensor, weight: Tensor) -> TaskSums:
    """Return the sums of weighted losses and of weights of each task, in float32 at least.

    Args:
        logits: (B, T).
        labels: (B, T), 0 or 1; anything where masked.
        mask: (B, T), True where a task counts.
        weight: (B,) of the rows.

    Raises:
        ValueError: The shapes do not fit.
    """
    if not (logits.shape == labels.shape == mask.shape and logits.shape[:1] == weight.shape):
        raise ValueError(
            f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)}, mask {tuple(mask.shape)} "
            f"and weight {tuple(weight.shape)} must be (B, T) three times and (B,)"
        )
    logits = logits.to(accumulation_dtype(logits))
    labels = labels.to(logits.dtype).masked_fill(~mask, 0)
    losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    weights = mask * weight.to(logits.dtype).unsqueeze(1)
    return TaskSums((weights * losses).sum(0), weights.sum(0))


LARGEST = 30.0
"""Largest intercept: e³⁰ is beyond all odds."""

_HALVINGS = 60
_ROWS = 8192


def intercepts_of(logits: Tensor, labels: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """Return a_t (T,) with Σ s m σ(z + a) = Σ s m y for each task, in float64.

    It is 0 where a task has no positive or no negative row that counts.

    Args:
        logits: z (B, T).
        labels: y (B, T).
        mask: m (B, T).
        weight: s (B,).
    """
    z = logits.double()
    counted = mask.double() * weight.double().unsqueeze(1)
    rate = (counted * labels.double()).sum(0) / counted.sum(0)
    low = torch.full_like(rate, -LARGEST)
    high = -low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        mean = (counted * (z + middle).sigmoid()).sum(0) / counted.sum(0)
        low = torch.where(mean < rate, middle, low)
        high = torch.where(mean < rate, high, middle)
    defined = (rate > 0) & (rate < 1)
    return torch.where(defined, (low + high) / 2, torch.zeros_like(rate))


@torch.no_grad()
def calibrate(ranker: Ranker, rows: Batch) -> None:
    """Set the intercepts of a ranker in evaluation mode on rows that it was not trained on.

    Args:
        ranker: Built with ``calibrated=True``.
        rows: Held-out rows (B,).

    Raises:
        ValueError: The ranker has no intercepts, or is in training mode.
    """
    if ranker.intercepts is None or ranker.training:
        raise ValueError("expected a ranker with calibrated=True, in evaluation mode")
    ranker.intercepts.zero_()
    parts = [rows.take(slice(k, k + _ROWS)) for k in range(0, len(rows), _ROWS)]
    logits = torch.cat([ranker(part.sparse, part.dense, part.sequences) for part in parts])
    ranker.intercepts.copy_(intercepts_of(logits, rows.labels, rows.mask, rows.weight))


class ScoredRows:
    """Gathers the logits of batches, for metrics over all rows.

    Args:
        tasks: Names of the T tasks.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = tuple(tasks)
        self._parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def __len__(self) -> int:
        """Return the number of rows that this rank has gathered."""
        return sum(len(part[0]) for part in self._parts)

    def add(self, logits: Tensor, batch: Batch) -> None:
        """Keep the logits (B, T), labels, masks and weights of a batch, on the host."""
        numbers = [column.detach().float() for column in (logits, batch.labels, batch.weight)]
        logits, labels, weight = (column.cpu() for column in numbers)
        self._parts.append((logits, labels, batch.mask.cpu(), weight))

    def metrics(self) -> dict[str, float]:
        """Return the metrics over the rows of all ranks; every rank must call this.

        ``loss`` is the sum over tasks of their mean log-loss, weighted by sample; of each task
        ``loss_TASK`` and ``auc_TASK``, NaN where it cannot be taken. A task whose logits are not
        finite makes ``loss`` NaN: a network that has diverged is never the best.
        """
        rows = self._of_all_ranks()
        if not rows:
            return {}
        logits, labels, mask, weight = (torch.cat(column) for column in zip(*rows, strict=True))
        sums = task_sums(logits.double(), labels.double(), mask, weight.double())
        losses = sums.losses / sums.weights  # NaN where a task counts in no row
        finite = bool(losses[sums.weights > 0].isfinite().all())
        metrics = {"loss": float(losses.nansum()) if finite else float("nan")}
        for number, task in enumerate(self.tasks):
            seen = mask[:, number]
            metrics[f"loss_{task}"] = float(losses[number])
            metrics[f"auc_{task}"] = _auc(logits[seen, number], labels[seen, number], weight[seen])
        return metrics

    def _of_all_ranks(self) -> list[tuple[Tensor, ...]]:
        if num_ranks() == 1:
            return list(self._parts)
        own_parts = [torch.cat(column) for column in zip(*self._parts, strict=True)]
        everyone: list[list[Tensor]] = [[] for _ in range(num_ranks())]
        dist.all_gather_object(everyone, own_parts)
        return [tuple(rows) for rows in everyone if rows]


def _auc(logits: Tensor, labels: Tensor, weight: Tensor) -> float:
    from recsys.metrics.probabilities import auc

    if logits.isnan().any():
        return float("nan")
    return float(auc(logits.numpy(), labels.numpy(), weight.numpy()).value)


class WeightAverage(nn.Module):
    """``a ← d a + (1 - d) w`` after every step, with ``d = min(decay, (1 + n) / (10 + n))``.

    The averages are buffers, saved with the model; they start as the weights. n counts the steps,
    so that the first, worst weights are forgotten soon.

    Args:
        parameters: Weights by name; averages are kept in float32 at least.
        decay: Largest d, below 1.

    Raises:
        ValueError: ``decay`` is not in [0, 1).
    """

    steps: Tensor

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        super().__init__()
        check_fraction(ema=decay)
        self.decay = decay
        self._names = {name: name.replace(".", "/") for name in parameters}  # no dots in buffers
        for name, parameter in parameters.items():
            exact = torch.promote_types(parameter.dtype, torch.float32)
            start = parameter.detach().to(exact, copy=True)
            self.register_buffer(self._names[name], start)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor]) -> None:
        """Move the averages after a step."""
        steps = int(self.steps.add_(1))
        d = min(self.decay, (1 + steps) / (10 + steps))
        for name, parameter in parameters.items():
            average = self.average(name)
            average.lerp_(parameter.detach().to(average.dtype), 1 - d)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move between devices; averages are not rounded to half precision with the weights."""
        return super()._apply(unrounded(fn), recurse)  # type: ignore[no-untyped-call,no-any-return]

    def average(self, name: str) -> Tensor:
        """Return the average of a weight."""
        return self.get_buffer(self._names[name])

    @contextmanager
    def swapped(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Put the averages in place of the weights inside the ``with`` block."""
        kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.copy_to(parameters)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(kept[name])

    @torch.no_grad()
    def copy_to(self, parameters: Mapping[str, Tensor]) -> None:
        """Overwrite weights by their averages."""
        for name, parameter in parameters.items():
            parameter.copy_(self.average(name))
