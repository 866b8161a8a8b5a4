"""SeqBoat: layers that average all tokens, and attend among those that a gate activates."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from core_gates.attention.sma import (
    ScaleNorm,
    SeqBoatLayer,
    SeqBoatState,
    TokenActivation,
    TokenBatchNorm,
    prefill,
    step,
)
from core_gates.attention.sma.gated_attention_unit import PositionEncoding, Weighting
from core_gates.errors import GatesError, check_at_least, check_option
from core_gates.training.batch_norm import SyncBatchNorm
from language.seqboat.activation import RuleActivation
from language.seqboat.front_ends import FilterBank, FrameProjection, SymbolEmbedding

Norm = Literal["layer", "scale", "batch", "sync_batch"]
FrontEnd = SymbolEmbedding | FrameProjection | FilterBank
ENDLESS = 2**40  # tokens that fit the state of a causal model: any number


class SeqBoat(nn.Module):
    """Classify sequences, or predict the next symbol (Ren et al., 2023, arXiv 2306.11197).

    Every layer averages all tokens with fading weights, and a gate activates the tokens among which
    attention runs, see `core_gates.attention.sma.SeqBoatLayer`. A causal model predicts the symbol
    after every symbol; else the mean over all tokens is classified.

    Args:
        front: Turns inputs into tokens; its ``dim`` is that of the model.
        outputs: Classes, or symbols that may come next.
        num_layers: Number of layers.
        key_dim: Features of queries and keys.
        hidden_dim: Features of values.
        num_states: States of a feature of the average.
        window: Farthest neighbor in attention, in active tokens.
        causal: Whether the model predicts symbols rather than classes.
        weighting: ``softmax`` or ``relu2``.
        position: ``simple``, ``local`` or ``rotary``.
        max_positions: Distances that ``simple`` positions distinguish.
        truncation: Longest lag of the average, in tokens; None for all.
        tau_scale: First temperature of the gates, in units of the root of ``dim``.
        norm: ``layer``, ``scale``, ``batch``, or ``sync_batch``, which is of all ranks.
        prenorm: Whether a norm comes before a layer, and one after the last, or after each layer.
        dropout: Rate of dropout in every layer.
        head_dim: Hidden features of the head; linear if None.
        densities: Instead of learned gates, the fraction of the tokens that each layer activates:
            1 for all, 0 for none, between them at random; learned if None.

    Shape:
        Inputs (B, T), int64 symbols or float samples, to logits (B, outputs), or (B, T, outputs) of
        a causal model.

    Raises:
        ValueError: A size is below 1, an option is unknown, or a causal model has no symbols.
    """

    def __init__(
        self,
        front: FrontEnd,
        outputs: int,
        num_layers: int = 4,
        key_dim: int = 32,
        hidden_dim: int = 128,
        *,
        num_states: int = 16,
        window: int = 32,
        causal: bool = False,
        weighting: Weighting = "softmax",
        position: PositionEncoding = "simple",
        max_positions: int = 1024,
        truncation: int | None = None,
        tau_scale: float = 1.0,
        norm: Norm = "layer",
        prenorm: bool = True,
        dropout: float = 0.0,
        head_dim: int | None = None,
        densities: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, outputs=outputs, num_layers=num_layers, head_dim=head_dim)
        check_option("norm", norm, get_args(Norm))
        if causal and not isinstance(front, SymbolEmbedding):
            raise ValueError("a causal model predicts symbols: front must be a SymbolEmbedding")
        if densities is not None and len(densities) != num_layers:
            raise ValueError(f"densities has {len(densities)} numbers for {num_layers} layers")
        dim = front.dim
        self.front, self.causal = front, causal
        self.vocab_size, self.context = outputs, ENDLESS
        self.layers = nn.ModuleList(
            SeqBoatLayer(
                dim, key_dim, hidden_dim, num_states=num_states, window=window, causal=causal,
                weighting=weighting, position=position, max_positions=max_positions,
                truncation=truncation, tau_scale=tau_scale, dropout=dropout,
                norm=_norm(norm, dim), prenorm=prenorm,
            )
            for _ in range(num_layers)
        )  # fmt: skip
        for number, density in enumerate(densities or ()):
            rule = cast(nn.Module, RuleActivation(density, number))
            self.blocks[number].configurator = rule  # type: ignore[assignment]
        self.norm = _norm(norm, dim) if prenorm else nn.Identity()
        sizes = [dim, outputs] if head_dim is None else [dim, head_dim, outputs]
        linears = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        for linear in linears:
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.head = nn.Sequential(
            *linears[:1], *(part for f in linears[1:] for part in (nn.GELU(), f))
        )

    @property
    def blocks(self) -> list[SeqBoatLayer]:
        """The layers in order."""
        return cast(list[SeqBoatLayer], [*self.layers])

    def caches(self) -> list["LayerCache"]:
        """Return empty caches, one for each layer of a causal model."""
        return [LayerCache() for _ in self.blocks]

    def forward(
        self,
        x: Tensor,
        *,
        padding_mask: Tensor | None = None,
        caches: Sequence["LayerCache"] | None = None,
        last: bool = False,
    ) -> Tensor:
        """Return logits.

        Args:
            x: Inputs (B, T), as the front end takes them.
            padding_mask: True (B, T) at inputs to ignore. With caches, padding comes first.
            caches: What the layers of a causal model keep of the symbols before, see `caches`; the
                symbols are added.
            last: Whether only the logits (B, 1, outputs) after the last place are computed, of a
                causal model, where padding then comes first.

        Raises:
            GatesError: There is not a cache for every layer, or a symbol is out of range.
        """
        if caches is not None and len(caches) != len(self.layers):
            raise GatesError(
                f"{len(caches)} caches for {len(self.layers)} layers: give those of model.caches()"
            )
        tokens, mask = self.front(x, padding_mask)
        for number, layer in enumerate(self.blocks):
            if caches is None:
                tokens = layer(tokens, padding_mask=mask)
            else:
                tokens = caches[number].advance(layer, tokens, mask)
        last = last and self.causal
        tokens = tokens[:, -1:] if last else tokens
        if isinstance(self.norm, TokenBatchNorm):
            tokens = self.norm(tokens, padding_mask=None if last else mask)
        else:
            tokens = self.norm(tokens)
        if not self.causal:
            tokens = mean_token(tokens, mask)
        return cast(Tensor, self.head(tokens))


class LayerCache:
    """The state of one causal layer: equally many bytes after any number of symbols.

    Attributes:
        state: None before the first symbol.
    """

    def __init__(self) -> None:
        self.state: SeqBoatState | None = None

    def advance(self, layer: SeqBoatLayer, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Return what the layer makes of further tokens (B, T, D)."""
        if self.state is None:
            y, self.state = prefill(layer, x, padding_mask=padding_mask)
            return y
        results = []
        for place, token in enumerate(x.unbind(1)):
            ignored = None if padding_mask is None else padding_mask[:, place]
            y, self.state = step(layer, token, self.state, padding_mask=ignored)
            results.append(y)
        return torch.stack(results, 1)


def mean_token(tokens: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Return the mean (B, D) of the tokens (B, T, D) that are not padding, zeros where all are."""
    if padding_mask is None:
        return tokens.sum(1) / max(1, tokens.shape[1])
    seen = (~padding_mask).unsqueeze(-1).to(tokens.dtype)
    return (tokens * seen).sum(1) / seen.sum(1).clamp(min=1)


class Activations(NamedTuple):
    """Which tokens were activated in one pass.

    Attributes:
        active: True (layers, B, T) where attention ran.
        padding_mask: True (B, T) at tokens that are ignored.
    """

    active: Tensor
    padding_mask: Tensor

    @property
    def density(self) -> Tensor:
        """The fraction of the tokens that each layer activated (layers,); NaN without tokens."""
        return self.active.sum((1, 2)) / (~self.padding_mask).sum()


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[Activations]]:
    """Record which tokens every pass activates; whole sequences, not single steps.

    Args:
        model: A `SeqBoat`, of which nothing is changed; of another model nothing is recorded.

    Yields:
        A list that gets one `Activations` a pass.
    """
    passes: list[Activations] = []
    masks: list[Tensor] = []
    blocks = model.blocks if isinstance(model, SeqBoat) else []

    def keep(
        configurator: nn.Module,
        inputs: tuple[Tensor],
        options: dict[str, Tensor | None],
        activation: TokenActivation,
    ) -> None:
        del configurator, inputs
        masks.append(activation.mask.detach())
        if len(masks) == len(blocks):
            padding = options.get("padding_mask")
            ignored = torch.zeros_like(masks[0]) if padding is None else padding
            passes.append(Activations(torch.stack(masks), ignored))
            masks.clear()

    handles = [layer.configurator.register_forward_hook(keep, with_kwargs=True) for layer in blocks]
    handles.append(model.register_forward_pre_hook(lambda *_: masks.clear()))  # of a broken pass
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


def _norm(kind: Norm, dim: int) -> nn.Module:
    if kind == "layer":
        return nn.LayerNorm(dim)
    if kind == "scale":
        return ScaleNorm()
    return TokenBatchNorm(nn.BatchNorm1d(dim) if kind == "batch" else SyncBatchNorm(dim))
