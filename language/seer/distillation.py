"""Training of block gates from records of the frozen model, which is not needed meanwhile."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from core_gates.attention.seer.decode import DecodeAttnGate
from core_gates.attention.seer.gate import AttnGate, gate_distillation_loss
from core_gates.errors import check_at_least, check_positive
from language.data import TrainingLoader
from language.module import scheduled
from language.seer.recording import logits_of

SCALE = 10.0
"""Factor of the loss (arXiv 2410.13276, training code)."""

LAST_RATE = 0.01
SKIPPED = 0.25  # of the rows of a prompt: in the first ones there is nothing to choose

Load = Callable[[int], Mapping[str, Tensor]]
"""Returns what was recorded of the sequence of a number, by layer and part."""


class BlockGateModule(L.LightningModule):
    """Gates of all layers, which learn the largest attention of each block.

    The loss is that of the published training: KL(target, softmax(logits)) averaged over all
    elements of a layer, summed over layers, times 10. Logged are ``train/loss``, and the divergence
    of a row in nats, ``train/row_kl`` and ``train/row_kl/LAYER``.

    Args:
        gates: The gates by the names of their layers.
        learning_rate: The largest learning rate of AdamW, without decay of weights.
        warmup_steps: Steps over which the learning rate rises, before it falls along a cosine to a
            hundredth.

    Raises:
        ValueError: A rate or a number of steps is out of range.
    """

    def __init__(
        self,
        gates: Mapping[str, AttnGate | DecodeAttnGate],
        learning_rate: float = 1e-3,
        warmup_steps: int = 20,
    ) -> None:
        super().__init__()
        check_positive(learning_rate=learning_rate)
        check_at_least(0, warmup_steps=warmup_steps)
        self.layers = list(gates)
        self.gates = nn.ModuleList(gates.values())
        self.learning_rate, self.warmup_steps = learning_rate, warmup_steps

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the divergence of each layer (layers,), averaged over all elements.

        Args:
            batch: What was recorded of B sequences, by layer and part.
        """
        losses = []
        for name, gate in zip(self.layers, self.gates, strict=True):
            record = {
                part.rpartition(".")[2]: value
                for part, value in batch.items()
                if part.rpartition(".")[0] == name
            }
            logits = logits_of(gate, record)  # type: ignore[arg-type]
            skip = SKIPPED if isinstance(gate, AttnGate) else 0.0
            losses.append(gate_distillation_loss(logits, record["target"], skip=skip))
        return torch.stack(losses)

    def rows(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the divergence of each layer (layers,) in nats per row."""
        found: Tensor = self(batch)
        return found * batch[f"{self.layers[0]}.target"].shape[-1]

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the scaled sum of the divergences."""
        rows = self.rows(batch)
        loss: Tensor = SCALE * rows.sum() / batch[f"{self.layers[0]}.target"].shape[-1]
        rows = rows.detach()
        self.log("train/loss", loss.detach())
        self.log("train/row_kl", rows.mean(), prog_bar=True)
        self.log_dict({f"train/row_kl/{n}": row for n, row in zip(self.layers, rows, strict=True)})
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return AdamW and the schedule of its learning rate."""
        optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate, weight_decay=0.0)
        return scheduled(optimizer, self.trainer, self.warmup_steps, LAST_RATE)


class RecordLoader(TrainingLoader):
    """Batches of what was recorded of sequences, in an order of the epoch.

    Args:
        load: Reads what was recorded of a sequence.
        count: Number of sequences.
        batch_size: Sequences of a step over all ranks.
        **options: See `language.data.TrainingLoader`.
    """

    def __init__(self, load: Load, count: int, batch_size: int, **options: Any) -> None:
        super().__init__(np.arange(count + 1), 1, batch_size, **options)
        self.load = load

    def starts(self) -> np.ndarray:
        """Return the sequences in the order of the epoch."""
        return np.random.default_rng((self.seed, self.epoch)).permutation(self.windows)

    def __iter__(self) -> Iterator[Any]:
        """Yield records of the sequences of this rank, stacked, by layer and part."""
        for windows in super().__iter__():
            parts = [self.load(number) for number in windows[:, 0].tolist()]
            yield {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


class RecordData(L.LightningDataModule):
    """Records of sequences, which are read when they are needed.

    Args:
        load: Reads what was recorded of a sequence.
        count: Number of sequences.
        batch_size: Sequences of a step over all ranks.
        seed: Of the order.
    """

    def __init__(self, load: Load, count: int, batch_size: int, seed: int = 0) -> None:
        super().__init__()
        self.load, self.count, self.batch_size, self.seed = load, count, batch_size, seed

    def train_dataloader(self) -> RecordLoader:
        """Return the batches of this rank."""
        rank, world = (
            (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        )
        return RecordLoader(
            self.load, self.count, self.batch_size, seed=self.seed, rank=rank, world=world
        )
