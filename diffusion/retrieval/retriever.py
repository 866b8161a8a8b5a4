"""Training of an encoder of adapters: contrastive losses between captions and adapters."""

import math
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.collectives import all_reduce, num_ranks, rank_in
from core_gates.errors import GatesError, check_at_least, check_option, check_positive
from diffusion.retrieval.encoder import LoraWeightEncoder
from diffusion.retrieval.encoder_config import EncoderConfig
from diffusion.retrieval.encoder_folder import TrainedEncoder
from diffusion.retrieval.retriever_data import Augmentation, Pairs, RetrieverData

LARGEST_SCALE = 100.0


def gathered_rows(rows: Tensor) -> Tensor:
    """Return the rows (W · n, ...) of all W ranks, in their order.

    The gradient of the rows of a rank is summed over the losses of all ranks, so that averaging
    gradients over ranks, as DDP does, gives those of the mean loss. Every rank has equally many
    rows and takes part in both passes.
    """
    if num_ranks() == 1:
        return rows
    before, after = rank_in() * len(rows), (num_ranks() - rank_in() - 1) * len(rows)
    shape = rows.shape[1:]
    padded = torch.cat([rows.new_zeros(before, *shape), rows, rows.new_zeros(after, *shape)])
    return all_reduce(padded)


def positives(adapters: Tensor, concepts: Tensor, own: slice) -> Tensor:
    """Return which pairs are no negatives: those of one adapter or of one concept.

    Args:
        adapters: (m,) number of the adapter of each pair.
        concepts: (m,) number of its concept.
        own: The pairs that are asked about.

    Returns:
        Boolean (n, m).
    """
    return (adapters[own, None] == adapters) | (concepts[own, None] == concepts)


class ContrastiveLoss(nn.Module):
    """InfoNCE over both directions, with a learned temperature and several positives.

    The target of a row is spread evenly over its positives (Khosla et al., 2020). Negatives come
    from all ranks.

    Args:
        scale: Initial inverse temperature; it never exceeds 100.

    Raises:
        ValueError: ``scale`` does not lie in (0, 100].
    """

    def __init__(self, scale: float = 1 / 0.07) -> None:
        super().__init__()
        if not 0 < scale <= LARGEST_SCALE:
            raise ValueError(f"scale must lie in (0, {LARGEST_SCALE:g}], got {scale}")
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    @property
    def scale(self) -> Tensor:
        """Inverse temperature, at most 100."""
        return self.log_scale.clamp(max=math.log(LARGEST_SCALE)).exp()

    @torch.no_grad()
    def limit(self) -> None:
        """Bring the temperature back into its range; to be called after an optimizer step."""
        self.log_scale.clamp_(max=math.log(LARGEST_SCALE))

    def forward(self, text: Tensor, lora: Tensor, adapters: Tensor, concepts: Tensor) -> Tensor:
        """Return the mean loss of the pairs of this rank.

        Args:
            text: Caption embeddings (n, e).
            lora: Adapter embeddings (n, e).
            adapters: (n,) number of the adapter of each pair.
            concepts: (n,) number of its concept.
        """
        text, lora = F.normalize(text, dim=-1), F.normalize(lora, dim=-1)
        here = slice(rank_in() * len(text), (rank_in() + 1) * len(text))
        match = positives(gathered_rows(adapters), gathered_rows(concepts), here)
        target = match / match.sum(1, keepdim=True)
        by_text = self.scale * text @ gathered_rows(lora).mT
        by_lora = self.scale * lora @ gathered_rows(text).mT
        losses = [-(target * s.log_softmax(1)).sum(1).mean() for s in (by_text, by_lora)]
        return (losses[0] + losses[1]) / 2


class PublishedLoss(nn.Module):
    """The loss of the published retriever: ten times both cross-entropies, at temperature 1.

    A second pair of one adapter counts as a negative, and negatives stay on their rank.
    """

    def forward(self, text: Tensor, lora: Tensor, *_: Tensor) -> Tensor:
        """Return the loss of caption and adapter embeddings, each (n, e)."""
        similarity = F.normalize(text, dim=-1) @ F.normalize(lora, dim=-1).mT
        diagonal = torch.arange(len(text), device=text.device)
        rows, columns = (
            F.cross_entropy(similarity, diagonal),
            F.cross_entropy(similarity.mT, diagonal),
        )
        return 10 * (rows + columns)


LossName = Literal["contrastive", "published"]


class LoraRetriever(L.LightningModule):
    """An encoder that is trained so that adapters lie where their captions lie.

    Args:
        config: Of the encoder; the published one is ``EncoderConfig.published(shape)``.
        loss: ``contrastive``: learned temperature, several positives, negatives of all ranks.
            ``published``: ten times both cross-entropies at temperature 1.
        learning_rate: Largest learning rate of AdamW.
        weight_decay: Decoupled decay of matrices; biases, norms and the temperature have none.
        warmup: Fraction of the steps in which the learning rate rises; then it falls along a
            cosine to 0.
        clip: Largest norm of the gradient; None for no limit.
        augmentation: Random changes of the adapters; None for none.

    Raises:
        ValueError: A rate is not positive, or there is no such loss.
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        loss: LossName = "contrastive",
        learning_rate: float = 2e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        clip: float | None = 1.0,
        augmentation: Augmentation | None = None,
    ) -> None:
        super().__init__()
        check_positive(learning_rate=learning_rate, clip=clip)
        check_at_least(0, weight_decay=weight_decay, warmup=warmup)
        check_option("loss", loss, ("contrastive", "published"))
        self.encoder = LoraWeightEncoder(config)
        self.loss = ContrastiveLoss() if loss == "contrastive" else PublishedLoss()
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.warmup, self.clip = warmup, clip
        self.augmentation = augmentation
        self._validated: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, pairs: Pairs) -> Tensor:
        """Return the vectors (n, out_dim) of adapters, of unit length."""
        return F.normalize(self.encoder(pairs.adapters), dim=-1)

    def training_step(self, pairs: Pairs, _: int) -> Tensor:
        """Return the loss of a batch."""
        adapters = pairs.adapters
        if self.augmentation is not None:
            adapters = self.augmentation(adapters, self.encoder.modules_read)
        vectors = self.encoder(adapters)
        loss: Tensor = self.loss(pairs.text, vectors, pairs.numbers, pairs.concepts)
        self.log("train_loss", loss, batch_size=len(vectors))
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        """Keep the temperature in its range."""
        if isinstance(self.loss, ContrastiveLoss):
            self.loss.limit()

    def on_validation_epoch_start(self) -> None:
        """Forget the vectors of the last validation."""
        self._validated.clear()

    def validation_step(self, pairs: Pairs, _: int) -> None:
        """Encode some adapters of validation."""
        self._validated.append((self(pairs).float(), pairs.text, pairs.numbers[pairs.owners]))

    def on_validation_epoch_end(self) -> None:
        """Search all adapters of validation by each of their captions."""
        vectors, text, owners = (torch.cat(parts) for parts in zip(*self._validated, strict=True))
        similarity = text @ vectors.mT
        of_owner = similarity.gather(1, owners[:, None])
        rank = (similarity > of_owner).sum(1) + 1
        values = {"val_recall@1": (rank == 1).float().mean(), "val_mrr": (1 / rank).mean()}
        self.log_dict(values, batch_size=len(rank))
        self._validated.clear()

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Limit the norm of the gradient."""
        if self.clip is not None:
            self.clip_gradients(optimizer, self.clip, "norm")

    def configure_optimizers(self) -> Any:
        """Return AdamW, and a learning rate that rises linearly and falls along a cosine."""
        named = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for _, p in named if p.ndim == 2]},
            {"params": [p for _, p in named if p.ndim != 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, weight_decay=self.weight_decay)
        steps = self._all_steps()
        rising = max(1, round(self.warmup * steps))

        def factor(step: int) -> float:
            if step < rising:
                return (step + 1) / rising
            return (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, steps - rising)))) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def _all_steps(self) -> int:
        """Return the optimizer steps of the whole run.

        Lightning's own estimate builds the loaders before a checkpoint is read, after which it no
        longer tells them where to resume.

        Raises:
            GatesError: The run has no end.
        """
        epochs, steps = self.trainer.max_epochs, self.trainer.max_steps
        data = getattr(self.trainer, "datamodule", None)
        if steps > 0:
            return steps
        if epochs is not None and epochs > 0 and isinstance(data, RetrieverData):
            return -(-data.steps * epochs // self.trainer.accumulate_grad_batches)
        raise GatesError(
            "the learning rate needs an end: set max_steps, or max_epochs with a RetrieverData"
        )

    def trained(self, text_fingerprint: str = "") -> TrainedEncoder:
        """Return the encoder for searching, see ``diffusion.retrieval.save_encoder``."""
        return TrainedEncoder(self.encoder, text_fingerprint)
