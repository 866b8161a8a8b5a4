"""Training of a SeqBoat: cross-entropy, AdamW with linear warm-up and decay, density by layer."""

import math
from functools import partial
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.errors import GatesError, check_at_least, check_option, check_positive
from core_gates.numerics import accumulation_dtype
from language.decoder import Decoder
from language.module import scheduled
from language.seqboat.front_ends import FilterBank
from language.seqboat.sequence_model import SeqBoat, recorded
from language.seqboat.sequences import SequenceBatch
from language.seqboat.speech_rivals import ConvolutionNetwork

IDLE = 0.01  # density below which attention hardly runs in a layer
Optimizer = Literal["adamw", "radam"]


class SeqBoatModule(L.LightningModule):
    """A SeqBoat that learns to classify sequences, or to predict the next byte.

    A batch is a `SequenceBatch`, or tokens (B, T + 1), int64, of a causal model. Logged are
    ``train/loss``, in nats; ``validation/accuracy``, or ``validation/bits_per_token`` of a causal
    model; and ``density/layer1`` and so on, the fraction of tokens that attend in each layer. A
    layer that has fallen below .01 in a validation is named in one line, once.

    The learning rate rises linearly over the warm-up, then falls linearly to 0 at the last step.
    Weights of linear maps and of the filter bank decay.

    Args:
        model: The model that is trained.
        learning_rate: The largest learning rate.
        weight_decay: Decoupled weight decay.
        warmup_steps: Steps over which the learning rate rises; none if 0.
        optimizer: ``adamw`` or ``radam``, both with betas .9 and .98.

    Raises:
        ValueError: A rate or a number of steps is out of range, or the optimizer is unknown.
    """

    def __init__(
        self,
        model: SeqBoat | ConvolutionNetwork | Decoder,
        learning_rate: float = 4e-3,
        *,
        weight_decay: float = 0.01,
        warmup_steps: int = 100,
        optimizer: Optimizer = "adamw",
    ) -> None:
        super().__init__()
        check_positive(learning_rate=learning_rate)
        check_at_least(0, weight_decay=weight_decay, warmup_steps=warmup_steps)
        check_option("optimizer", optimizer, get_args(Optimizer))
        self.model, self.learning_rate, self.weight_decay = model, learning_rate, weight_decay
        self.warmup_steps, self.optimizer = warmup_steps, optimizer
        self._layers = model.blocks if isinstance(model, SeqBoat) else []
        self._causal = getattr(model, "causal", True)  # as a decoder always is
        self._active: Tensor | None = None  # tokens that attended in each layer, and all tokens
        self._named = set[str]()  # layers that hardly attend, of which the user knows

    def training_step(self, batch: SequenceBatch | Tensor, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the cross-entropy of a batch.

        Raises:
            GatesError: The loss is not finite.
        """
        loss, _ = self._scores(batch)
        self.log("train/loss", loss.detach(), prog_bar=True)
        if not loss.isfinite():
            raise GatesError(
                f"the loss of step {self.global_step + 1} is {loss.item()}: lower the learning rate"
                f" (now at most {self.learning_rate:g}) or clip gradients by gradient_clip_val"
            )
        return loss

    def on_validation_epoch_start(self) -> None:
        """Begin to count tokens."""
        self._active = torch.zeros(len(self._layers) + 1, device=self.device)

    def validation_step(self, batch: SequenceBatch | Tensor, batch_idx: int) -> None:  # noqa: ARG002
        """Log the score, the mean over the sequences of all ranks."""
        with recorded(self.model) as passes:
            loss, right = self._scores(batch)
        assert self._active is not None
        for one in passes:
            counts = [*one.active.sum((1, 2)), (~one.padding_mask).sum()]
            self._active += torch.stack(counts)
        name = "bits_per_token" if self._causal else "accuracy"
        score = loss / math.log(2) if self._causal else right.double().mean()
        size = len(batch if isinstance(batch, Tensor) else batch.labels)
        self.log(
            f"validation/{name}", score, batch_size=size, prog_bar=True, sync_dist=True,
            on_epoch=True,
        )  # fmt: skip

    def on_validation_epoch_end(self) -> None:
        """Log the density of every layer, and name layers whose attention hardly runs."""
        counts = self.trainer.strategy.reduce(self._active, reduce_op="sum")
        densities = (counts[:-1] / counts[-1]).tolist()
        for number, density in enumerate(densities, 1):
            self.log(f"density/layer{number}", density, rank_zero_only=True)
        idle = [str(number) for number, density in enumerate(densities, 1) if density < IDLE]
        learned = any(hasattr(layer.configurator, "log_tau") for layer in self._layers)
        new = [layer for layer in idle if layer not in self._named]
        if new and learned and not self.trainer.sanity_checking:
            self.print(f"fewer than {IDLE:.0%} of the tokens attend in layer {', '.join(new)}")
            self._named.update(new)

    def _scores(self, batch: SequenceBatch | Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy, and which predictions are right."""
        if isinstance(batch, Tensor):
            logits, labels = self.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()
        else:
            logits, labels = self.model(batch.x, padding_mask=batch.padding_mask), batch.labels
        logits = logits.to(accumulation_dtype(logits))
        return F.cross_entropy(logits, labels), logits.argmax(-1) == labels

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return the optimizer in two groups and the schedule of its learning rate.

        Raises:
            GatesError: The trainer has no last step.
        """
        matrices = {
            id(m.bank if isinstance(m, FilterBank) else m.weight)
            for m in self.modules()
            if isinstance(m, nn.Linear | FilterBank)
        }
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.parameters() if (id(p) in matrices) is decays],
             "weight_decay": self.weight_decay * decays}
            for decays in (True, False)
        ]  # fmt: skip
        kinds: dict[str, Any] = {
            "radam": partial(torch.optim.RAdam, decoupled_weight_decay=True),
            "adamw": torch.optim.AdamW,
        }
        optimizer: torch.optim.Optimizer = kinds[self.optimizer](
            groups, lr=self.learning_rate, betas=(0.9, 0.98)
        )
        return scheduled(optimizer, self.trainer, self.warmup_steps, 0.0, curve="linear")
