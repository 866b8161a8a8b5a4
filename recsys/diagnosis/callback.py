"""Reports of the experts while a model trains."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from core_gates.errors import check_at_least
from recsys.diagnosis.diagnose import Forward, Labeled, diagnose
from recsys.diagnosis.expert_report import ExpertReport
from recsys.diagnosis.layer_activity import (
    TaskLosses,
    cross_entropies,
)


class ExpertReportCallback(Callback):
    """Log the faults of experts every few steps, on the same rows each time.

    Figures are named ``experts/zero_rate_max`` and so on, those of
    :meth:`~recsys.diagnosis.expert_report.ExpertReport.summary`. Training is not changed: the rows
    pass through the model in evaluation mode, without randomness. Every rank measures its own
    rows, since sharded tables need all ranks; the figures of the first rank are logged.

    Args:
        every: Optimizer steps between two reports; the first comes after the first step.
        rows: Of the first training batch, measured if ``batches`` are not given.
        batches: What to measure instead.
        gradients: Whether to compute the gradients of tasks: one backward pass per task.
        losses: Loss of every task, for the gradients.
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
        losses: TaskLosses = cross_entropies,
        forward: Forward | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, every=every, rows=rows)
        self.every, self.rows, self.gradients = every, rows, gradients
        self.report: ExpertReport | None = None
        self._batches = None if batches is None else list(batches)
        self._losses, self._forward = losses, forward
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
            [_on(pl_module.device, one) for one in self._batches],
            self._losses,
            forward=self._forward or _module_forward(pl_module),
            gradients=self.gradients,
            rank_rows=min(self.rows, 512),
        )
        figures = {f"experts/{name}": value for name, value in self.report.summary().items()}
        for logger in trainer.loggers if figures and trainer.is_global_zero else []:
            logger.log_metrics(figures, step=step)


def _module_forward(module: LightningModule) -> Callable[[Any], torch.Tensor]:
    def forward(batch: Any) -> torch.Tensor:
        logits: torch.Tensor = module(batch)
        return logits

    return forward


def _on(device: torch.device, batch: Any) -> Any:
    return batch.to(device)
