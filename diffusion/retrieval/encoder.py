"""From the weights of an adapter to a vector in the space of a text encoder (arXiv 2508.02107)."""

import torch
from torch import Tensor, nn

from diffusion.lora_file.family import Placed
from diffusion.retrieval.batch import AdapterBatch
from diffusion.retrieval.config import EncoderConfig
from diffusion.retrieval.modules import modules_of
from diffusion.retrieval.tokens import ModuleTokens, escaped
from diffusion.retrieval.transformer import EncoderLayer


class LoraWeightEncoder(nn.Module):
    """A transformer over one token per layer of the base.

    Its parameters have the names of published files, of AutoLoRA and of DiffSynth-Studio.

    Args:
        config: Sizes and form.

    Attributes:
        modules_read: The M fused layers of the base that it reads, in order.

    Shape:
        :class:`AdapterBatch` of n adapters -> (n, out_dim), not normalized.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.modules_read: tuple[Placed, ...] = modules_of(config.shape, config.types)
        self.embedder = ModuleTokens(
            self.modules_read, config.dim, config.probes, config.normalization
        )
        length = len(self.modules_read) * config.probes
        if config.positions:
            self.position_embeds = nn.Parameter(torch.zeros(1, length, config.dim))
        if config.missing == "token":
            kinds = dict.fromkeys(escaped(module.type) for module in self.modules_read)
            self.absent = nn.ParameterDict(
                {kind: nn.Parameter(0.02 * torch.randn(config.dim)) for kind in kinds}
            )
        if config.pooling == "token":
            self.special_embeds = nn.Parameter(torch.randn(1, 1, config.dim))
        self.encoders = nn.ModuleList(
            EncoderLayer(config.dim, config.heads, config.head_dim, config.hidden_dim)
            for _ in range(config.depth)
        )
        self.final_layer_norm = nn.LayerNorm(config.dim)
        if config.text_dim is not None:
            self.final_linear = nn.Linear(config.dim, config.text_dim)

    def forward(self, batch: AdapterBatch) -> Tensor:
        """Return a vector per adapter.

        Args:
            batch: Adapters, each of which changes at least one of the layers that are read.
        """
        tokens, present = self.tokens(batch)
        if self.config.positions:
            tokens = tokens + self.position_embeds
        if self.config.pooling == "token":
            special = self.special_embeds.to(tokens.dtype).expand(len(tokens), -1, -1)
            tokens = torch.cat([special, tokens], 1)
            present = torch.cat([present.new_ones(len(present), 1), present], 1)
        visible = self._visible(present)
        for layer in self.encoders:
            tokens = layer(tokens, visible)
        return self._pooled(tokens, present)

    def tokens(self, batch: AdapterBatch) -> tuple[Tensor, Tensor]:
        """Return the tokens (n, M · L, dim) before positions, and whether each counts.

        In the published form all of them do, also that of a layer whose change is zero.
        """
        tokens = self.embedder(batch)
        present = batch.present.repeat_interleave(self.config.probes, 1)
        if self.config.missing == "refuse":
            present = torch.ones_like(present)
        if self.config.missing == "token":
            absent = torch.stack([self.absent[escaped(m.type)] for m in self.modules_read])
            absent = absent.repeat_interleave(self.config.probes, 0).to(tokens.dtype)
            tokens = torch.where(present[..., None], tokens, absent)
        return tokens, present

    def _visible(self, present: Tensor) -> Tensor | None:
        """Return which keys a query sees, (n or 1, 1, S or 1, S); None for all of them."""
        visible = None
        if self.config.missing == "mask":
            visible = present[:, None, None]
        if self.config.attention_mask == "causal":
            size = present.shape[1]
            causal = torch.ones(size, size, dtype=torch.bool, device=present.device).tril()
            own = torch.eye(size, dtype=torch.bool, device=present.device)
            visible = causal if visible is None else (visible & causal) | own
        return visible

    def _pooled(self, tokens: Tensor, present: Tensor) -> Tensor:
        """Return the vectors (n, out_dim)."""
        if self.config.pooling == "token":
            pooled = self.final_layer_norm(tokens[:, 0])
        else:
            weight = present.to(tokens.dtype)[..., None]
            total = (self.final_layer_norm(tokens) * weight).sum(1)
            pooled = total / weight.sum(1).clamp_min(1)
        out: Tensor = pooled if self.config.text_dim is None else self.final_linear(pooled)
        return out
