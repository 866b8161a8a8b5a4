"""A model of transformers with block gates, as `language.generation` calls a decoder."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from language.hf.pretrained import Pretrained
from language.seer.attach import block_cache, block_gates

UNLIMITED = 2**31


class StreamedModel(nn.Module):
    """A model of transformers with block gates, called as a decoder of ours is.

    Args:
        found: The model.

    Attributes:
        context: Tokens that it reads.
        vocab_size: Number of its tokens.
    """

    def __init__(self, found: Pretrained) -> None:
        super().__init__()
        self.model, self.context = found.model, found.context or UNLIMITED
        self.vocab_size: int = found.model.config.get_text_config().vocab_size
        self._seen: Tensor | None = None  # True (B, S) at tokens that are not padding

    def caches(self) -> list[Any]:
        """Return the empty cache of a batch, which all layers share."""
        self._seen = None
        decodes = next(iter(block_gates(self.model).values())).kind == "decode"
        return [block_cache(self.model) if decodes else DynamicCache(config=self.model.config)]

    def forward(
        self,
        tokens: Tensor,
        *,
        padding_mask: Tensor | None,
        caches: Sequence[Any],
        last: bool,  # noqa: ARG002
    ) -> Tensor:
        """Return the logits of the next token (B, 1, V); see `language.decoder.Decoder`."""
        here = torch.ones_like(tokens) if padding_mask is None else (~padding_mask).long()
        seen = here if self._seen is None else torch.cat([self._seen, here], 1)
        positions = (seen.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        self._seen = seen
        out = self.model(
            tokens, attention_mask=seen, position_ids=positions, cache=caches[0], logits_to_keep=1
        )
        logits: Tensor = out.logits
        return logits
