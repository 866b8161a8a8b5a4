"""From the weights of an adapter to a vector in the space of a text encoder (arXiv 2508.02107).

One token per layer of the base and probe, then a transformer.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion.lora_file import Factors, LoraBundle, LoraFileError
from diffusion.lora_file.family import Placed
from diffusion.retrieval.encoder_config import EncoderConfig, Normalization, modules_of


class AdapterBatch(NamedTuple):
    """The factors of n adapters, by layer; layers that none of them changes are left out.

    Attributes:
        down: diffusers name -> A (n, r, in_features).
        up: diffusers name -> scale · B (n, out_features, r).
        present: (n, M) whether each fused layer of the encoder is changed.
    """

    down: dict[str, Tensor]
    up: dict[str, Tensor]
    present: Tensor

    def rows(self, index: Tensor) -> "AdapterBatch":
        """Return some adapters, in the order of ``index``."""
        return AdapterBatch(
            {name: factor[index] for name, factor in self.down.items()},
            {name: factor[index] for name, factor in self.up.items()},
            self.present[index],
        )

    def like(self, like: Tensor) -> "AdapterBatch":
        """Return the batch with the dtype and on the device of a tensor."""
        return AdapterBatch(
            {name: factor.to(like) for name, factor in self.down.items()},
            {name: factor.to(like) for name, factor in self.up.items()},
            self.present.to(like.device),
        )


def collate(
    bundles: Sequence[LoraBundle],
    modules: Sequence[Placed],
    dtype: torch.dtype = torch.float32,
) -> AdapterBatch:
    """Put adapters into one batch.

    Of a DoRA adapter the direction is taken. A layer whose change is zero counts as unchanged.

    Args:
        bundles: The adapters; layers of them that ``modules`` lacks are ignored.
        modules: Fused layers that the encoder reads.
        dtype: Of the result.

    Raises:
        LoraFileError: A factor has another size, or is not finite.
    """
    down: dict[str, Tensor] = {}
    up: dict[str, Tensor] = {}
    present = torch.zeros(len(bundles), len(modules), dtype=torch.bool)
    for number, module in enumerate(modules):
        for part, outputs in zip(module.parts, module.sizes, strict=True):
            pairs = {
                row: _checked(bundle.modules[part], part, module.in_features, outputs, dtype)
                for row, bundle in enumerate(bundles)
                if part in bundle.modules
            }
            pairs = {row: pair for row, pair in pairs.items() if pair[0].any() and pair[1].any()}
            if not pairs:
                continue
            rank = max(len(pair[0]) for pair in pairs.values())
            down[part] = torch.zeros(len(bundles), rank, module.in_features, dtype=dtype)
            up[part] = torch.zeros(len(bundles), outputs, rank, dtype=dtype)
            for row, (a, b) in pairs.items():
                down[part][row, : len(a)] = a
                up[part][row, :, : len(a)] = b
                present[row, number] = True
    return AdapterBatch(down, up, present)


def _checked(
    factors: Factors, name: str, inputs: int, outputs: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return A and scale · B of a layer.

    Raises:
        LoraFileError: A factor has another size, or is not finite.
    """
    if (factors.in_features, factors.out_features) != (inputs, outputs):
        raise LoraFileError(
            f"{name} is {factors.in_features} → {factors.out_features}, expected {inputs} → "
            f"{outputs}: give an adapter of the base that the encoder was trained for"
        )
    down, up = factors.down.to(dtype), factors.up.to(dtype) * factors.scale
    if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise LoraFileError(f"{name} is not finite; get the file again")
    return down, up


DOT = "___"  # stands for a dot in the name of a layer or a type


def escaped(name: str) -> str:
    """Return a name as published files write it."""
    return name.replace(".", DOT)


class Probe(nn.Module):
    """The probes of one layer.

    Args:
        probes: Their number L.
        in_features: Inputs of the layer.
        out_features: Outputs, which the LayerNorm is over.
        layer_norm: Whether there is one.
    """

    def __init__(
        self, probes: int, in_features: int, out_features: int, *, layer_norm: bool
    ) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.randn(1, probes, in_features))
        if layer_norm:
            self.layer_norm = nn.LayerNorm(out_features)


class ModuleTokens(nn.Module):
    """Tokens of adapters; published files name its parameters in the same way.

    Args:
        modules: M fused layers of the base, in order.
        dim: Features e of a token.
        probes: Probes L per layer.
        normalization: See `diffusion.retrieval.encoder_config.EncoderConfig`.

    Shape:
        Result (n, M · L, e): the probes of a layer are neighbours.
    """

    def __init__(
        self, modules: Sequence[Placed], dim: int, probes: int, normalization: Normalization
    ) -> None:
        super().__init__()
        self.modules_read, self.probes, self.dim = tuple(modules), probes, dim
        self.normalization = normalization
        layer_norm = normalization == "layer"
        self.model_dict = nn.ModuleDict(
            {
                escaped(m.name): Probe(probes, m.in_features, m.out_features, layer_norm=layer_norm)
                for m in modules
            }
        )
        outputs = {module.type: module.out_features for module in modules}
        self.proj_dict = nn.ModuleDict(
            {escaped(kind): nn.Linear(size, dim) for kind, size in outputs.items()}
        )

    def forward(self, batch: AdapterBatch) -> Tensor:
        """Return the tokens; those of layers that are not changed have no meaning."""
        responses = [self.response(module, batch) for module in self.modules_read]
        if self.normalization == "file":
            responses = _by_file(responses, batch.present)
        tokens = []
        for module, u in zip(self.modules_read, responses, strict=True):
            tokens.append(self.proj_dict[escaped(module.type)](self._normalized(module, u)))
        return torch.cat(tokens, 1)

    def response(self, module: Placed, batch: AdapterBatch) -> Tensor:
        """Return u (n, L, out_features) of a layer, zero where it is not changed."""
        probe = cast(Probe, self.model_dict[escaped(module.name)]).x[0]
        zero = 0 * probe.sum()  # DDP wants every parameter to take part
        parts = []
        for part, size in zip(module.parts, module.sizes, strict=True):
            if part in batch.down:
                inner = torch.matmul(batch.down[part], probe.mT)  # (n, r, L)
                parts.append(torch.matmul(batch.up[part], inner).mT)
            else:
                parts.append(zero.expand(len(batch.present), self.probes, size))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _normalized(self, module: Placed, u: Tensor) -> Tensor:
        if self.normalization == "layer":
            norm: Tensor = cast(Probe, self.model_dict[escaped(module.name)]).layer_norm(u)
            return norm
        if self.normalization == "token":
            return F.normalize(u, dim=-1, eps=torch.finfo(u.dtype).tiny) * u.shape[-1] ** 0.5
        return u


def _by_file(responses: list[Tensor], present: Tensor) -> list[Tensor]:
    """Return responses whose mean square over the changed layers of an adapter is 1."""
    squares = torch.stack([u.square().mean((1, 2)) for u in responses], 1)
    mean = squares.sum(1) / present.sum(1).clamp_min(1)
    scale = mean.clamp_min(torch.finfo(mean.dtype).tiny).rsqrt()[:, None, None]
    return [u * scale for u in responses]


def quick_gelu(x: Tensor) -> Tensor:
    """Return ``x * sigmoid(1.702 x)``, which CLIP approximates GELU by."""
    return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention with biases.

    Args:
        dim: Features of a token.
        heads: Number of heads.
        head_dim: Features of a head.
    """

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, heads * head_dim)
        self.to_k = nn.Linear(dim, heads * head_dim)
        self.to_v = nn.Linear(dim, heads * head_dim)
        self.to_out = nn.Linear(heads * head_dim, dim)

    def forward(self, x: Tensor, visible: Tensor | None) -> Tensor:
        """Return the attention output of each token.

        Args:
            x: Tokens (n, S, dim).
            visible: Whether a query may see a key, broadcast to (n, heads, S, S); None for all.
        """
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.to_q, self.to_k, self.to_v)
        )
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        out: Tensor = self.to_out(seen.transpose(1, 2).flatten(2))
        return out


class EncoderLayer(nn.Module):
    """Attention and a feed-forward network, each after a LayerNorm and added to its input.

    Args:
        dim: Features of a token.
        heads: Attention heads.
        head_dim: Features of a head.
        hidden_dim: Features of the hidden layer.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, head_dim)
        self.layer_norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return the tokens (n, S, dim) after the layer."""
        x = x + self.attn(self.layer_norm1(x), visible)
        out: Tensor = x + self.fc2(quick_gelu(self.fc1(self.layer_norm2(x))))
        return out


class LoraWeightEncoder(nn.Module):
    """A transformer over one token per layer of the base.

    Its parameters have the names of published files, of AutoLoRA and of DiffSynth-Studio.

    Args:
        config: Sizes and form.

    Attributes:
        modules_read: The M fused layers of the base that it reads, in order.

    Shape:
        `AdapterBatch` of n adapters -> (n, out_dim), not normalized.
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
            diagonal = torch.eye(size, dtype=torch.bool, device=present.device)
            visible = causal if visible is None else (visible & causal) | diagonal
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
