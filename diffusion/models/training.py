"""Training of a transformer, or of what is attached to one, by flow matching."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from diffusion.models.flow_matching import flow_matching_losses, logit_normal, noised
from diffusion.models.text import TextStates


class LatentBatch(NamedTuple):
    """Latents (B, C, h, w) and the states of their captions (B, L, D) and (B, D)."""

    latents: Tensor
    tokens: Tensor
    pooled: Tensor

    @property
    def text(self) -> TextStates:
        """The states of the captions."""
        return TextStates(self.tokens, self.pooled)


class Latents(Dataset[LatentBatch]):
    """Latents in memory, which are looked up a batch at a time.

    Args:
        latents: (N, C, h, w), scaled as the model sees them.
        text: Of their captions.
        rows: Those of an epoch, some of them several times; all once if None.
    """

    def __init__(
        self, latents: Tensor, text: TextStates, rows: Sequence[int] | None = None
    ) -> None:
        if len(latents) != len(text.pooled):
            raise ValueError(f"{len(latents)} latents have {len(text.pooled)} captions")
        self.latents, self.text = latents, text
        self.rows = torch.arange(len(latents)) if rows is None else torch.as_tensor(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, places: list[int]) -> LatentBatch:
        """Return the latents of some places of an epoch."""
        rows = self.rows[places]
        return LatentBatch(self.latents[rows], self.text.tokens[rows], self.text.pooled[rows])


class LatentDataModule(L.LightningDataModule):
    """Shuffled batches of latents that are all in memory.

    Args:
        latents: (N, C, h, w), scaled as the model sees them.
        text: Of their captions.
        batch_size: Of training; fewer where there are fewer latents.
        rows: Those of an epoch, some of them several times; all once if None.
    """

    def __init__(
        self,
        latents: Tensor,
        text: TextStates,
        batch_size: int = 64,
        rows: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.data = Latents(latents, text, rows)
        self.batch_size = min(batch_size, len(self.data))

    def train_dataloader(self) -> DataLoader[LatentBatch]:
        """Return batches in a new order each epoch; what does not fill a batch is left out."""
        batches: Iterable[list[int]] = BatchSampler(
            RandomSampler(self.data), self.batch_size, drop_last=True
        )
        return DataLoader(self.data, sampler=batches, batch_size=None)


class FlowMatchingModule(L.LightningModule):
    """Trains the parameters that require gradients by the loss of flow matching.

    Args:
        transformer: What predicts velocities; its parameters belong to this module only if
            ``parameters`` is None.
        empty: States of the empty caption, of batch size 1.
        parameters: What is trained and saved, by name, where that is not the transformer.
        steps: Steps of the training, over which the learning rate falls linearly to 0.
        learning_rate: Of AdamW, after the warm-up.
        warmup_steps: Steps over which the learning rate rises.
        weight_decay: Of AdamW.
        betas: Of AdamW.
        caption_dropout: Fraction of captions that are left empty, for classifier-free guidance.
    """

    def __init__(
        self,
        transformer: nn.Module,
        empty: TextStates,
        parameters: dict[str, nn.Parameter] | None = None,
        *,
        steps: int,
        learning_rate: float = 1.5e-3,
        warmup_steps: int = 80,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.95),
        caption_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self._transformer = (transformer,)
        if parameters is None:
            self.transformer = transformer
        else:
            for name, parameter in parameters.items():
                self.register_parameter(name.replace(".", "/"), parameter)
        self.empty, self.steps, self.learning_rate = empty, steps, learning_rate
        self.warmup_steps, self.weight_decay, self.betas = warmup_steps, weight_decay, betas
        self.caption_dropout = caption_dropout

    def training_step(self, batch: LatentBatch, batch_index: int) -> Tensor:
        """Return the loss of a batch, at logit-normal times."""
        del batch_index
        text, count = batch.text, len(batch.latents)
        dropped = torch.rand(count, device=self.device) < self.caption_dropout
        text = TextStates(
            torch.where(dropped.view(-1, 1, 1), self.empty.tokens.to(text.tokens), text.tokens),
            torch.where(dropped.view(-1, 1), self.empty.pooled.to(text.pooled), text.pooled),
        )
        at = noised(
            batch.latents, logit_normal(count, self.device), torch.randn_like(batch.latents)
        )
        loss = flow_matching_losses(self._transformer[0], at, text).mean()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """Return AdamW and a learning rate that rises, then falls linearly to 0."""
        optimizer = torch.optim.AdamW(
            list(self._trained()),
            self.learning_rate,
            betas=self.betas,
            weight_decay=self.weight_decay,
        )

        def factor(step: int) -> float:
            rising = min(1.0, (step + 1) / max(1, self.warmup_steps))
            return rising * max(0.0, 1 - step / self.steps)

        schedule = {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _trained(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self.parameters() if parameter.requires_grad)
