"""Cross-entropy of several tasks, each over the rows in which it counts.

B rows, T tasks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from core_gates.collectives import Group, num_ranks
from core_gates.errors import check_at_least, check_positive
from core_gates.numerics import accumulation_dtype
from recsys.schema import Task


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
        """Return the losses L (T,), without the weights of the tasks; see :meth:`counted`."""
        return self.counted(logits, labels, mask, weight).losses

    def counted(self, logits: Tensor, labels: Tensor, mask: Tensor, weight: Tensor) -> TaskLosses:
        """Return the losses L (T,), without the weights of the tasks, and which tasks count.

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
