"""Losses over channels of unlike difficulty, and the optimizer with its learning rate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from lightning import Trainer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from core_gates.errors import GatesError

SMALLEST_LOSS = 1e-12


def channel_errors(
    analysis: Tensor,
    truth: Tensor,
    *,
    kind: Literal["mae", "mse"] = "mae",
    area_weights: Tensor | None = None,
) -> Tensor:
    """Return the mean error of each sample and channel.

    Args:
        analysis: ``(B, C, H, W)``, normalised.
        truth: Of the same shape.
        kind: ``"mae"`` for absolute, ``"mse"`` for squared errors.
        area_weights: Weight of each latitude row ``(H,)``, mean 1; equal weights if absent.

    Returns:
        ``(B, C)``.

    Raises:
        ValueError: The shapes differ, or ``kind`` is unknown.
    """
    if analysis.shape != truth.shape or analysis.ndim != 4:
        raise ValueError(
            "analysis and truth must both be (B, C, H, W), found "
            f"{tuple(analysis.shape)} and {tuple(truth.shape)}"
        )
    if kind not in ("mae", "mse"):
        raise ValueError(f"kind must be 'mae' or 'mse', found {kind!r}")
    error = analysis - truth
    error = error.abs() if kind == "mae" else error.square()
    if area_weights is not None:
        error = error * area_weights.to(error)[:, None]
    return error.mean((-2, -1))


def unify_loss(
    analysis: Tensor,
    truth: Tensor,
    *,
    kind: Literal["mae", "mse"] = "mae",
    area_weights: Tensor | None = None,
) -> Tensor:
    """Unified loss of FengWu-Adas (UnifyMAE, UnifyMSE), averaged over samples.

    With ``l_c`` the error of channel c of one sample and ``sg`` the stop-gradient::

        L = (l_0 + sum over c >= 1 of l_c * sg(l_0 / l_c)) / C

    Its gradient is that of ``l_0 / C * sum over c of log l_c``, which treats all channels alike,
    but its *value* is ``l_0``, the error of the first channel, whatever the others do. Select
    checkpoints by `normalized_rmse`, never by this value. A batch is the mean over its samples, as
    if each were alone on its own device.

    Args:
        analysis: ``(B, C, H, W)``, normalised.
        truth: Of the same shape.
        kind: ``"mae"`` or ``"mse"``.
        area_weights: Weight of each latitude row ``(H,)``, mean 1; the published loss has none.

    Returns:
        A scalar. A channel without error adds nothing, neither infinite nor NaN.

    Raises:
        ValueError: The shapes differ, or ``kind`` is unknown.
    """
    errors = channel_errors(analysis, truth, kind=kind, area_weights=area_weights)
    constant = errors.detach()
    scale = constant[:, :1] / constant.clamp_min(SMALLEST_LOSS)
    return torch.cat((errors[:, :1], errors[:, 1:] * scale[:, 1:]), dim=1).mean()


def log_loss(
    analysis: Tensor,
    truth: Tensor,
    *,
    kind: Literal["mae", "mse"] = "mae",
    area_weights: Tensor | None = None,
    epsilon: float = 1e-6,
) -> Tensor:
    """Mean over samples and channels of ``log(l_c + epsilon)``.

    The direction of `unify_loss` for one sample, with a step that does not shrink with the error of
    the first channel and a value in which every channel counts.

    Args:
        analysis: ``(B, C, H, W)``, normalised.
        truth: Of the same shape.
        kind: ``"mae"`` or ``"mse"``.
        area_weights: Weight of each latitude row ``(H,)``, mean 1; equal weights if absent.
        epsilon: Keeps the logarithm finite.

    Returns:
        A scalar.

    Raises:
        ValueError: The shapes differ, or ``kind`` is unknown.
    """
    errors = channel_errors(analysis, truth, kind=kind, area_weights=area_weights)
    return (errors + epsilon).log().mean()


def gaussian_loss(
    mean: Tensor, log_variance: Tensor, target: Tensor, *, area_weights: Tensor | None = None
) -> Tensor:
    """Mean negative log-likelihood of independent normal distributions, less ``log(2 pi) / 2``.

    ``(log s^2 + (x - mu)^2 / s^2) / 2``: channels and places that are hard to predict weigh less,
    as the network learns where they are (the uncertainty loss of FengWu, arXiv 2304.02948).

    Args:
        mean: ``(B, C, H, W)``.
        log_variance: Logarithm of the variance, of the same shape.
        target: Of the same shape.
        area_weights: Weight of each latitude row ``(H,)``, mean 1; equal weights if absent.

    Returns:
        A scalar.

    Raises:
        ValueError: The shapes differ.
    """
    if not mean.shape == log_variance.shape == target.shape or mean.ndim != 4:
        raise ValueError(
            "mean, log_variance and target must all be (B, C, H, W), found "
            f"{tuple(mean.shape)}, {tuple(log_variance.shape)} and {tuple(target.shape)}"
        )
    loss = (log_variance + (target - mean).square() * (-log_variance).exp()) / 2
    if area_weights is not None:
        loss = loss * area_weights.to(loss)[:, None]
    return loss.mean()


def normalized_rmse(error: Tensor, std: Tensor, area_weights: Tensor | None = None) -> Tensor:
    """Score a forecast or analysis by the mean over channels of RMSE over standard deviation.

    Args:
        error: ``(B, C, H, W)``, physical units; normalised ones with ``std`` of one.
        std: Standard deviation of each channel ``(C,)``, units of ``error``.
        area_weights: Weight of each latitude row ``(H,)``, mean 1; equal weights if absent.

    Returns:
        ``(B,)``, one score per sample; 1 is as bad as climatology.

    Raises:
        ValueError: The shapes do not fit.
    """
    if error.ndim != 4 or std.shape != error.shape[1:2]:
        raise ValueError(
            "expected an error (B, C, H, W) and a standard deviation (C,), found "
            f"{tuple(error.shape)} and {tuple(std.shape)}"
        )
    squared = error.square()
    if area_weights is not None:
        squared = squared * area_weights.to(squared)[:, None]
    return (squared.mean((-2, -1)).sqrt() / std).mean(-1)


LENGTH = ("total_steps", "_schedule_phases")


class OneCycle(OneCycleLR):
    """`torch.optim.lr_scheduler.OneCycleLR` that keeps its own length when state is loaded.

    The learning rate of a lengthened training continues on the longer cycle, at the same step.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up everything but the length."""
        super().load_state_dict({**state_dict, **{name: getattr(self, name) for name in LENGTH}})


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
    if warmup * total_steps == 1:  # OneCycleLR divides by the length of a rise of one step
        warmup *= 1 - 1e-9
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
