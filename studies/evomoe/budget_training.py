"""Training that ends where its FLOPs are spent, and notes its curve on the way."""

import math
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from core_gates.moe.layer import MoELayer
from core_gates.moe.spawn import advance_gates
from core_gates.routing.collect import collect_routing
from language.decoder import Decoder
from language.module import LAST_RATE, LanguageModule
from studies.evomoe.budget import kept_choices, num_mixtures, step_flops
from studies.evomoe.methods import Method

POINTS = 20  # of a curve
WARM_UP = 0.05  # of the budget
COLUMNS = ("FLOPs", "updates", "held-out bits", "active experts")
SECONDS = "seconds"


class BudgetModule(LanguageModule):
    """A decoder that is trained until a budget of FLOPs is spent, as closely as updates allow.

    The learning rate rises and falls with the part of the budget that is spent. All ranks count the
    FLOPs of all, so that they end at the same update.

    Args:
        model: The decoder.
        method: Its losses, masks, and when its gates freeze.
        learning_rate: The largest.
        budget: FLOPs, see `studies.evomoe.budget.step_flops`.
        held_out: Windows (N, context + 1) that the loss is measured on.
        seed: Of the masks of spawned experts.

    Attributes:
        spent: FLOPs so far ().
        curve: A row (20, 4) each time that another twentieth is spent: `COLUMNS`; NaN where
            it is not yet.
        seconds: CPU seconds of the updates until each row of the curve, kept in checkpoints aside
            from the state, which depends on no clock.
    """

    spent: Tensor
    curve: Tensor

    def __init__(
        self,
        model: Decoder,
        method: Method,
        learning_rate: float,
        budget: int,
        held_out: Tensor,
        seed: int = 0,
    ) -> None:
        super().__init__(model, learning_rate, warmup_steps=0, losses=dict(method.losses))
        self.method, self.budget, self.held_out, self.seed = method, budget, held_out, seed
        self.register_buffer("spent", torch.zeros((), dtype=torch.int64))
        curve = torch.full((POINTS, len(COLUMNS)), math.nan, dtype=torch.float64)
        self.register_buffer("curve", curve)
        self.seconds = POINTS * [math.nan]
        self._kept, self._shape, self._elapsed, self._begin = 0, (0, 0), 0.0, 0.0

    @property
    def ended(self) -> bool:
        """Whether the budget is spent."""
        return bool(self.curve[-1].isfinite().all())

    def on_train_start(self) -> None:
        """Train no further where a killed training had spent all."""
        self._begin = time.process_time() - self._elapsed
        if self.ended:
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the seconds of training in the checkpoint."""
        checkpoint[SECONDS] = [time.process_time() - self._begin, *self.seconds]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the seconds of training from the checkpoint."""
        self._elapsed, *self.seconds = checkpoint[SECONDS]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the loss, see `language.module.LanguageModule`, and count kept choices."""
        if int(self.spent) >= self.method.frozen_after * self.budget:
            self.losses = {}
            for block in self.model.blocks:
                if isinstance(block.mlp, MoELayer):
                    block.mlp.gate.requires_grad_(False)
        with collect_routing(self.model) as routings:
            loss = super().training_step(batch, batch_idx)
        kept = sum(kept_choices(output) for outputs in routings.values() for output in outputs)
        self._kept = int(self.trainer.strategy.reduce(torch.tensor(kept), reduce_op="sum"))
        self._shape = self.trainer.world_size * len(batch), batch.shape[1] - 1
        return loss

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step, advance the gates, spawn experts where they ask for it, and pay."""
        L.LightningModule.optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure)
        optimizer = getattr(optimizer, "optimizer", optimizer)
        advance_gates(self.model, optimizer, mask_prob=self.method.mask_prob, seed=self.seed)
        before, cost = int(self.spent), step_flops(self.model, *self._shape, self._kept)
        self.spent += cost
        ends = self.budget - int(self.spent) < cost / 2
        first, last = (POINTS * spent // self.budget for spent in (before, int(self.spent)))
        last = POINTS if ends else min(last, POINTS - 1)
        if last > first:
            elapsed = time.process_time() - self._begin
            self.seconds[first:last] = (last - first) * [round(elapsed, 2)]
            tokens = math.prod(self._shape) * max(1, num_mixtures(self.model))
            updates = self.trainer.global_step + 1  # it is counted afterwards
            row = [int(self.spent), updates, held_out_bits(self.model, self.held_out)]
            self.curve[first:last] = self.curve.new_tensor([*row, self._kept / tokens])
            self._begin = time.process_time() - elapsed
        if ends:
            self.trainer.should_stop = True

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return AdamW, and a learning rate that follows the budget."""
        optimizer = torch.optim.AdamW(self._groups(), self.learning_rate, self.betas, fused=True)

        def factor(_: int) -> float:
            done = min(1.0, int(self.spent) / self.budget)
            if done < WARM_UP:
                return (done + 0.1 * WARM_UP) / (1.1 * WARM_UP)
            fallen = (done - WARM_UP) / (1 - WARM_UP)
            return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * fallen))

        schedule = {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}  # type: ignore[typeddict-item]


@torch.no_grad()
def held_out_bits(model: Decoder, windows: Tensor) -> float:
    """Return the bits of a token of windows (N, T + 1), in evaluation; its mode stays as it was."""
    training = model.training
    model.eval()
    logits = model(windows[:, :-1]).flatten(0, 1)
    nats = F.cross_entropy(logits.double(), windows[:, 1:].flatten())
    model.train(training)
    return float(nats) / math.log(2)
