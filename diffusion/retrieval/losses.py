"""Contrastive losses between captions and adapters."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.collectives import all_reduce, num_ranks, rank_in

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
    same = adapters[own, None] == adapters
    return same | (concepts[own, None] == concepts)


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
        own = slice(rank_in() * len(text), (rank_in() + 1) * len(text))
        match = positives(gathered_rows(adapters), gathered_rows(concepts), own)
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
        own = torch.arange(len(text), device=text.device)
        rows, columns = F.cross_entropy(similarity, own), F.cross_entropy(similarity.mT, own)
        return 10 * (rows + columns)
