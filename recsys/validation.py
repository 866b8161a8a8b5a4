"""Losses and areas under the curve over all rows of all ranks.

B rows, T tasks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from core_gates.collectives import num_ranks
from recsys.batch import Batch
from recsys.losses import task_sums


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
        found = {"loss": float(losses.nansum()) if finite else float("nan")}
        for number, task in enumerate(self.tasks):
            seen = mask[:, number]
            found[f"loss_{task}"] = float(losses[number])
            found[f"auc_{task}"] = _auc(logits[seen, number], labels[seen, number], weight[seen])
        return found

    def _of_all_ranks(self) -> list[tuple[Tensor, ...]]:
        if num_ranks() == 1:
            return list(self._parts)
        own = [torch.cat(column) for column in zip(*self._parts, strict=True)]
        everyone: list[list[Tensor]] = [[] for _ in range(num_ranks())]
        dist.all_gather_object(everyone, own)
        return [tuple(rows) for rows in everyone if rows]


def _auc(logits: Tensor, labels: Tensor, weight: Tensor) -> float:
    from recsys.metrics.auc import auc

    if logits.isnan().any():
        return float("nan")
    return float(auc(logits.numpy(), labels.numpy(), weight.numpy()).value)
