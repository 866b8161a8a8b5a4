"""The decoder: a transformer that transformers opens as a Llama, Qwen3, Mixtral or Qwen3-MoE."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core_gates.attention.head_gate import (
    INIT_STD,
    Granularity,
    KeyValueCache,
    RotaryTable,
    rotary_table,
)
from core_gates.attention.output_gate import GatedAttention, Position
from core_gates.errors import check_at_least, check_positive
from core_gates.moe.dense_mlp import GatedMlp
from core_gates.moe.layer import MoELayer
from core_gates.routing.base import Gate
from core_gates.routing.collect import refuse_coupled_gates

GateFactory = Callable[[int], Gate]
"""Returns the gate of one layer for tokens of ``dim`` features."""

ExpertsFactory = Callable[[int, int], nn.Module]
"""Returns ``num_experts`` experts of one layer for tokens of ``dim`` features."""


class DecoderBlock(nn.Module):
    """Attention and a network, each after a norm and with a residual connection.

    Args:
        attention: Causal attention.
        mlp: Dense network, or experts.
        dim: Features of a token.
        norm_eps: Added to the mean square in both norms.

    Shape:
        ``x`` (B, T, dim) to the same.
    """

    def __init__(
        self, attention: GatedAttention, mlp: nn.Module, dim: int, norm_eps: float
    ) -> None:
        super().__init__()
        self.self_attn, self.mlp = attention, mlp
        self.input_layernorm = nn.RMSNorm(dim, norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(dim, norm_eps)

    def forward(
        self,
        x: Tensor,
        rotary: RotaryTable,
        tokens: Tensor,
        padding_mask: Tensor | None,
        cache: KeyValueCache | None,
    ) -> Tensor:
        """Return the tokens after the block; see `Decoder.forward`."""
        x = x + self.self_attn(
            self.input_layernorm(x), padding_mask=padding_mask, cache=cache, rotary=rotary
        )
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoELayer):
            return x + cast(Tensor, self.mlp(normed, ids=tokens, padding_mask=padding_mask))
        return x + cast(Tensor, self.mlp(normed))


class Decoder(nn.Module):
    """A causal language model: RMSNorm, rotary grouped attention, gated networks or experts.

    Parameters have the names and shapes of ``LlamaForCausalLM``, with ``qk_norm`` of
    ``Qwen3ForCausalLM``, and with experts of ``Qwen3MoeForCausalLM`` in transformers, so that
    ``load_state_dict`` takes their states as they are.

    Args:
        vocab_size: Number of tokens V.
        dim: Features of a token.
        num_layers: Number of blocks.
        num_heads: Query heads.
        num_kv_heads: Key and value heads, a divisor of ``num_heads``, the default.
        head_dim: Features of a head; ``dim / num_heads`` if None.
        hidden_dim: Hidden features of the dense networks.
        context: Tokens of a sequence in training. The model computes longer ones, too.
        qk_norm: Whether queries and keys go through an RMSNorm over the features of a head.
        norm_eps: Added to the mean square in all norms.
        rope_theta: Base of the rotary embedding.
        tie_embeddings: Whether the output layer shares the weights of the embedding.
        gate: Returns the gate of a layer, called with ``dim``; all networks are dense if None.
        experts: Returns the experts of a layer, called with their number, that of the gate, and
            ``dim``; given if and only if ``gate`` is.
        attention_gate: Place of a gate in attention, see `GatedAttention`; none if None, as in the
            families of transformers.
        granularity: One gate of attention per feature, the default, or per head.
        moe_every: Every block whose number, counted from 1, is divisible by this has experts.
        allow_leak: Whether gates are accepted that route a token by later ones.
        checkpointing: Whether the activations of a block are computed again in the backward pass,
            which saves memory and takes a third more time.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``tokens`` (B, T), int64, to logits (B, T, V).

    Raises:
        ValueError: A size is below 1, heads do not divide or have an odd size, there is a gate
            without experts or the opposite, a gate couples tokens, attention has no such place for
            one, or no block has experts.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        hidden_dim: int,
        context: int,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        tie_embeddings: bool = False,
        attention_gate: Position | None = None,
        granularity: Granularity | None = None,
        gate: GateFactory | None = None,
        experts: ExpertsFactory | None = None,
        moe_every: int = 1,
        allow_leak: bool = False,
        checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"vocab_size": vocab_size, "dim": dim, "num_layers": num_layers}
        sizes |= {"num_heads": num_heads, "hidden_dim": hidden_dim, "moe_every": moe_every}
        check_at_least(1, context=context, head_dim=head_dim, **sizes)
        check_positive(rope_theta=rope_theta, norm_eps=norm_eps)
        if (gate is None) != (experts is None):
            missing = "experts" if experts is None else "gate"
            raise ValueError(f"experts need both gate and experts: {missing} is missing")
        if gate is not None and moe_every > num_layers:
            raise ValueError(f"moe_every={moe_every} leaves none of {num_layers} blocks experts")
        self.vocab_size, self.dim, self.hidden_dim = vocab_size, dim, hidden_dim
        self.context, self.norm_eps, self.rope_theta = context, norm_eps, rope_theta
        self.tie_embeddings, self.moe_every = tie_embeddings, moe_every
        self.checkpointing = checkpointing
        heads: dict[str, Any] = {"head_dim": head_dim, "qk_norm": qk_norm, "norm_eps": norm_eps}
        heads |= {"position": attention_gate or "none"}
        heads |= {} if granularity is None else {"granularity": granularity}
        layers = nn.ModuleList()
        with torch.device(torch.get_default_device() if device is None else device):
            for number in range(1, num_layers + 1):
                attention = GatedAttention(
                    dim, num_heads, num_kv_heads, rope_theta=rope_theta, **heads
                )
                network = _network(dim, hidden_dim, None if number % moe_every else gate, experts)
                layers.append(DecoderBlock(attention, network, dim, norm_eps))
            parts = {"embed_tokens": nn.Embedding(vocab_size, dim), "layers": layers}
            self.model = nn.ModuleDict({**parts, "norm": nn.RMSNorm(dim, norm_eps)})
            self.lm_head = nn.Linear(dim, vocab_size, bias=False)
        if attention.head_dim % 2:
            raise ValueError(f"rotary embedding needs an even head_dim, got {attention.head_dim}")
        self.to(dtype)
        for module in (self.model["embed_tokens"], self.lm_head):
            nn.init.normal_(cast(Tensor, module.weight), std=INIT_STD)
        self.tie_weights()
        refuse_coupled_gates(self, allow_leak=allow_leak)

    def tie_weights(self) -> None:
        """Make the output layer share the embedding, if it must.

        ``load_state_dict`` with ``assign=True`` replaces both parameters: call this afterwards.
        """
        if self.tie_embeddings:
            self.lm_head.weight = cast(nn.Parameter, self.model["embed_tokens"].weight)

    @property
    def blocks(self) -> list[DecoderBlock]:
        """The blocks in order."""
        return cast(list[DecoderBlock], [*cast(nn.ModuleList, self.model["layers"])])

    def caches(self) -> list[KeyValueCache]:
        """Return empty caches, one for each block."""
        return [KeyValueCache() for _ in self.blocks]

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        padding_mask: Tensor | None = None,
        caches: Sequence[KeyValueCache] | None = None,
        last: bool = False,
    ) -> Tensor:
        """Return the logits of the token after each token.

        Args:
            tokens: Tokens (B, T), int64.
            positions: Positions (B, T) or (T,); if None, tokens are counted from 0, those of the
                caches first and padding left out, so that it does not matter where it lies.
            padding_mask: True (B, T) at tokens to ignore, on any side; their logits are of no use.
            caches: What the blocks have seen before, see `caches`; the tokens are added.
            last: Whether only the logits of the last token of each sequence that is not ignored are
                computed, which is what generation needs.

        Returns:
            Logits (B, T, V), or (B, 1, V) with ``last``.

        Raises:
            ValueError: A mask or the caches do not fit.
        """
        if caches is not None and len(caches) != len(self.blocks):
            raise ValueError(
                f"got {len(caches)} caches for {len(self.blocks)} blocks: start with model.caches()"
            )
        x = self.model["embed_tokens"](tokens)
        if positions is None:
            positions = _positions(tokens, padding_mask, caches[0] if caches else None)
        attention = self.blocks[0].self_attn
        rotary = rotary_table(positions, attention.head_dim, self.rope_theta, dtype=x.dtype)
        again = self.checkpointing and caches is None and torch.is_grad_enabled()
        for number, block in enumerate(self.blocks):
            inputs = x, rotary, tokens, padding_mask, caches[number] if caches else None
            x = checkpoint(block, *inputs, use_reentrant=False) if again else block(*inputs)
        if last:
            x = _last(x, padding_mask)
        return cast(Tensor, self.lm_head(self.model["norm"](x)))


def _network(
    dim: int, hidden_dim: int, gate: GateFactory | None, experts: ExpertsFactory | None
) -> nn.Module:
    """Return the experts of a block, or its dense network where it has no gate."""
    if gate is None or experts is None:
        return GatedMlp(dim, hidden_dim)
    router = gate(dim)
    return MoELayer(router, experts(router.num_experts, dim), return_routing=False)


def _positions(tokens: Tensor, padding_mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
    """Return the positions (T,) of tokens, or (B, T) where some are ignored."""
    length, device = tokens.shape[1], tokens.device
    before = 0 if cache is None else len(cache)
    earlier = None if cache is None else cache.padding_mask
    if padding_mask is None and earlier is None:
        return torch.arange(before, before + length, device=device)
    here = torch.zeros_like(tokens, dtype=torch.bool) if padding_mask is None else padding_mask
    seen = here.new_full((len(tokens), 1), before, dtype=torch.int64)
    if earlier is not None:
        seen = seen - earlier.sum(1, keepdim=True)
    return (seen + (~here).cumsum(1) - 1).clamp(min=0)


def _last(x: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Return the last tokens (B, 1, D) that are not ignored; the first where all are."""
    if padding_mask is None:
        return x[:, -1:]
    place = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    last = place.masked_fill(padding_mask, 0).amax(1)
    return x[torch.arange(len(x), device=x.device), last].unsqueeze(1)
