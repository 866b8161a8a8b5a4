"""Training of a decoder: cross-entropy, losses of its gates, AdamW with warm-up and cosine."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from core_gates.errors import GatesError, check_at_least, check_fraction, check_positive
from core_gates.moe.spawn import advance_gates
from core_gates.numerics import accumulation_dtype
from core_gates.routing.collect import collect_routing
from core_gates.routing.losses import balance_loss, entropy_loss, z_loss
from core_gates.routing.output import RoutingOutput
from language.decoder import Decoder

LAST_RATE = 0.1
"""The learning rate after the last step, as a fraction of the largest one."""

LOSSES: dict[str, Callable[..., Tensor]] = {
    "balance": partial(balance_loss, scope="global"),  # the mean over ranks is that of one process
    "entropy": entropy_loss,
    "z": z_loss,
}
"""Losses of the routings of any gate that returns what they need, see `core_gates.routing`."""


def scheduled(
    optimizer: torch.optim.Optimizer,
    trainer: L.Trainer,
    warmup_steps: int,
    last_rate: float,
    curve: Literal["cosine", "linear"] = "cosine",
) -> OptimizerLRSchedulerConfig:
    """Let the learning rate rise linearly, then fall along a curve until the last step.

    Args:
        optimizer: Whose learning rate is the largest one.
        trainer: Knows the number of steps.
        warmup_steps: Over which the learning rate rises.
        last_rate: The learning rate after the last step, as a fraction of the largest one.
        curve: Along which it falls.

    Raises:
        GatesError: The trainer has no last step.
    """
    total = trainer.estimated_stepping_batches
    if not math.isfinite(total):
        raise GatesError(
            "the learning rate falls until the last step, but the trainer has none: give it"
            " max_steps or max_epochs"
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = min(1.0, (step - warmup_steps) / max(1, total - warmup_steps))
        left = 1 - done if curve == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return last_rate + (1 - last_rate) * left

    schedule = {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}
    return {"optimizer": optimizer, "lr_scheduler": schedule}  # type: ignore[typeddict-item]


class LanguageModule(L.LightningModule):
    """A decoder that learns to predict the next token.

    A batch (B, context + 1) of tokens, int64, gives inputs and targets. Logged are ``train/loss``,
    the cross-entropy in nats per token, ``train/NAME`` for each loss of the gates, unweighted, and
    ``validation/bits_per_token``.

    Matrices decay; norms, biases and embeddings do not. The learning rate rises linearly, then
    falls along a cosine to a tenth at the last step, whose number the trainer knows; the trainer
    also clips (``gradient_clip_val``).

    Under ``ModelParallelStrategy`` of Lightning every block is sharded (FSDP2).

    Args:
        model: The decoder that is trained.
        learning_rate: The largest learning rate of AdamW.
        weight_decay: Decoupled weight decay of the matrices.
        betas: Decay of the two moments of AdamW.
        warmup_steps: Steps over which the learning rate rises; none if 0.
        losses: Weights of further losses by name, each the mean over the gates that have it:
            ``balance`` over the tokens of all ranks, ``entropy``, ``z``, and what gates compute
            themselves (``RoutingOutput.aux``), which comes first where names are the same.

    Raises:
        ValueError: A rate, a weight or a number of steps is out of range.
    """

    def __init__(
        self,
        model: Decoder,
        learning_rate: float = 1e-3,
        *,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup_steps: int = 100,
        losses: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        check_positive(learning_rate=learning_rate)
        check_at_least(0, weight_decay=weight_decay, warmup_steps=warmup_steps, **(losses or {}))
        check_fraction(first_beta=betas[0], second_beta=betas[1])
        self.model = model
        self.learning_rate, self.weight_decay, self.betas = learning_rate, weight_decay, betas
        self.warmup_steps, self.losses = warmup_steps, dict(losses or {})

    def configure_model(self) -> None:
        """Shard every block, then the rest, where the strategy has a mesh of devices."""
        if self._device_mesh is None:
            return
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if not isinstance(self.model, FSDPModule):
            for part in (*self.model.blocks, self.model):
                fully_shard(part, mesh=self._device_mesh["data_parallel"])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the cross-entropy of a batch and the weighted losses of the gates.

        Raises:
            GatesError: The loss is not finite, or no gate has a loss of a name.
        """
        if self.losses:
            with collect_routing(self.model) as routings:
                loss = self._cross_entropy(batch)
            further = losses_of_gates(routings, self.losses)
        else:
            loss, further = self._cross_entropy(batch), {}
        self.log("train/loss", loss.detach(), prog_bar=True)
        for name, value in further.items():
            self.log(f"train/{name}", value.detach())
            loss = loss + self.losses[name] * value
        if not loss.isfinite():
            raise GatesError(
                f"the loss of step {self.global_step + 1} is {loss.item()}: lower the learning rate"
                f" (now at most {self.learning_rate:g}) or clip gradients by gradient_clip_val"
            )
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:  # noqa: ARG002
        """Log ``validation/bits_per_token``, the mean over the tokens of all ranks."""
        bits = self._cross_entropy(batch) / math.log(2)
        name, size = "validation/bits_per_token", batch.shape[0]
        self.log(name, bits, batch_size=size, prog_bar=True, sync_dist=True)

    def _cross_entropy(self, batch: Tensor) -> Tensor:
        length, context = batch.shape[1] - 1, self.model.context
        if length > context:
            raise GatesError(
                f"data.context is {length}, but the model's is {context}: lower data.context, or "
                f"set model.model.init_args.context to {length}"
            )
        logits = self.model(batch[:, :-1])
        logits = logits.to(accumulation_dtype(logits))
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step, then advance the gates, and spawn experts where a gate asks for it."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        advance_gates(self.model, getattr(optimizer, "optimizer", optimizer))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return AdamW in two groups and the schedule of its learning rate.

        Raises:
            GatesError: The trainer has no last step.
        """
        fused = "mixed" not in str(self.trainer.precision)  # there Lightning refuses to clip
        optimizer = torch.optim.AdamW(self._groups(), self.learning_rate, self.betas, fused=fused)
        return scheduled(optimizer, self.trainer, self.warmup_steps, LAST_RATE)

    def _groups(self) -> list[dict[str, Any]]:
        """Return the parameters that decay and those that do not, each in the order of the model.

        Checkpoints of FSDP2 number parameters so.
        """
        embeddings = {
            id(module.weight) for module in self.model.modules() if isinstance(module, nn.Embedding)
        }
        decayed: list[Tensor] = []
        kept: list[Tensor] = []
        for name, parameter in self.model.named_parameters():
            matrix = parameter.ndim > 1 and "bias" not in name and id(parameter) not in embeddings
            (decayed if matrix else kept).append(parameter)
        return [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": kept, "weight_decay": 0.0},
        ]


def losses_of_gates(
    routings: Mapping[str, Sequence[RoutingOutput]], names: Mapping[str, float]
) -> dict[str, Tensor]:
    """Return each loss as the mean over the gates that have it.

    Args:
        routings: Gate -> its routings, of `core_gates.routing.collect.collect_routing`.
        names: Losses to their weights; see `LanguageModule`.

    Raises:
        GatesError: No gate has a loss of a name, or returns what it is computed from.
    """
    ran = [(gate, routing) for gate, several in routings.items() for routing in several]
    own = {name for _, routing in ran for name in routing.aux or {}}
    allowed = sorted({*own, *LOSSES}) if ran else []
    losses = {}
    for name in names:
        if name not in allowed:
            raise GatesError(
                f"losses weighs {name!r}, but the gates of this model have"
                f" {', '.join(allowed) or 'none, since there are no gates'}"
            )
        try:
            values = (
                [routing.aux[name] for _, routing in ran if routing.aux and name in routing.aux]
                if name in own
                else [LOSSES[name](routing, gate=gate) for gate, routing in ran]
            )
        except ValueError as error:
            raise GatesError(f"losses weighs {name!r}: {error}") from error
        losses[name] = torch.stack(values).mean()
    return losses
