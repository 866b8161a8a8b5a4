"""Optimizer and learning rate of the networks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from lightning import Trainer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn

from core_gates.errors import GatesError
from weather.training.one_cycle import OneCycle


def adamw_one_cycle(
    parameters: Iterable[nn.Parameter],
    total_steps: int,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    warmup: float,
) -> OptimizerLRSchedulerConfig:
    """AdamW under a one-cycle schedule with a cosine (FengWu-Adas training options).

    Args:
        parameters: To be optimized.
        total_steps: Length of the schedule.
        learning_rate: Its peak.
        betas: Both betas of AdamW.
        weight_decay: Weight decay of AdamW.
        warmup: Fraction of the steps in which the learning rate rises.
    """
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay
    )
    schedule = OneCycle(
        optimizer,
        max_lr=learning_rate,
        total_steps=total_steps,
        pct_start=warmup,
        div_factor=100,
        final_div_factor=1e4,
        cycle_momentum=False,
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def schedule_steps(trainer: Trainer, steps: int) -> int:
    """Return the optimizer steps of the whole run, were it not stopped.

    Lightning's own estimate builds the loaders before a checkpoint is read, after which it no
    longer tells them where to resume.

    Args:
        trainer: Says how long the run is.
        steps: Batches of an epoch.

    Raises:
        GatesError: The run has no end.
    """
    epochs, most = trainer.max_epochs, trainer.max_steps
    if epochs is not None and epochs > 0:
        return -(-steps * epochs // trainer.accumulate_grad_batches)
    if most > 0:
        return most
    raise GatesError("the learning rate needs an end: set trainer.max_epochs or max_steps")
