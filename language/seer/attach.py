"""Attach block gates to the attention of a model of transformers, and take them off again."""

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from core_gates.attention.head_gate import RotaryTable, rotate_by
from core_gates.attention.seer.decode import BlockSelector, DecodeAttnGate
from core_gates.attention.seer.gate import AttnGate
from core_gates.errors import GatesError, check_option, check_whole
from core_gates.ops import block_sparse_attention
from language.hf.locate import (
    Attention,
    base_of,
    locate_attention,
    refuse_absent,
    require_attached,
)
from language.seer.attention import (
    CHILD,
    NAME,
    AttentionInputs,
    attend_to_all,
    register_block_attention,
    unrotated,
)
from language.seer.budgets import Budgets
from language.seer.cache import BlockCache
from language.seer.kept import KeptTokens

Kind = Literal["prefill", "decode"]
EVERY = 8
"""Tokens that are decoded with the same blocks."""

Attend = Callable[["BlockGate", AttentionInputs], Tensor]
"""What may take the place of attention, such as to record or to measure: returns (B, H, T, D)."""


class BlockGate(nn.Module):
    """The gate of an attention module of transformers, and the attention that it leads to.

    Args:
        attention: Where it belongs.
        gate: What scores blocks.
        first: Whether the module is the first one that is called.
        former: Name of the attention that the model had before.

    Attributes:
        selector: Turns scores into blocks, or knows by which scores and how many of each head;
            None: attention reads everything.
        attend: Takes the place of all this; None for nothing.
        context: Tokens of the sequences that the gate was distilled from; None: not known.
        every: Tokens that read the blocks which a ``decode`` gate has chosen for the first of them.
        dense_below: Tokens of a cache below which a token that is decoded reads everything.
        lent: Whether a cache policy attached it, and detaches it again.
        density: Fraction of the blocks that were read since a rule was set, of those that
            causality allows: by ``prefill`` gates in all calls of several tokens, by ``decode``
            gates in all calls after the prompt; None before the first one.
    """

    def __init__(
        self, attention: Attention, gate: AttnGate | DecodeAttnGate, *, first: bool, former: str
    ) -> None:
        super().__init__()
        self.gate, self.name = gate, attention.name
        self.first, self.former = first, former
        self.layer: int = attention.module.layer_idx  # type: ignore[assignment]
        self.kind: Kind = "decode" if isinstance(gate, DecodeAttnGate) else "prefill"
        self.selector: BlockSelector | Budgets | None = None
        self.attend: Attend | None = None
        self.context: int | None = None
        self.every, self.dense_below = EVERY, 0
        self.lent, self._warned, self._short = False, False, False
        self._kept: tuple[Any, Any] | None = None  # blocks read and allowed; tensors in graphs
        self._hooks: list[Any] = []
        self._call: list[Any] = [None, None]  # cosines and sines, and the cache

    @property
    def density(self) -> float | None:
        """The fraction, see the attributes of the class."""
        return None if self._kept is None else float(self._kept[0] / self._kept[1])

    def choose_by(
        self, selector: BlockSelector | Budgets | None, every: int, dense_below: int
    ) -> None:
        """Set the rule, and forget what was kept before."""
        self.selector, self._kept = selector, None
        self.every, self.dense_below = every, dense_below

    def hook(self, module: nn.Module) -> None:
        """Become the gate of an attention module."""
        module.add_module(CHILD, self)
        self._hooks = [module.register_forward_pre_hook(self._read, with_kwargs=True)]

    def unhook(self, module: nn.Module) -> None:
        """Undo `hook`."""
        for handle in self._hooks:
            handle.remove()
        delattr(module, CHILD)

    def _read(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep what a call says of positions and of the past.

        Raises:
            GatesError: The model attends in another way, which would leave the gate out, or the
                cache is another one than the gate needs.
        """
        config: Any = module.config
        if self.first and config._attn_implementation != NAME:
            raise GatesError(
                f"{self.name} attends by {config._attn_implementation!r}, which leaves its block"
                f" gate out: call model.set_attn_implementation({NAME!r}), or"
                " detach_block_gates(model) before another attention is set"
            )
        cache = kwargs.get("cache")
        angles = kwargs.get("position_embeddings")
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if not isinstance(cache, BlockCache):
            self._refuse(cache, hidden.shape[1])
        table = angles if angles is not None else args[1]
        self._call[:] = table, cache if isinstance(cache, BlockCache) else None
        if self.first and isinstance(cache, BlockCache):
            cache.turn(table, len(hidden))

    def _refuse(self, cache: Any, length: int) -> None:
        """Refuse a cache of another type, or none, unless its keys are all that is needed.

        Raises:
            GatesError: It is refused.
        """
        past = 0 if cache is None else cache.get_seq_length(self.layer)
        needs = past > 0 and length > self.gate.block_size
        if self.kind == "decode":
            needs = past > 0 or cache is None
        if (needs and self.selector is not None) or getattr(cache, "is_compileable", False):
            raise GatesError(
                f"{self.name} got {'no cache' if cache is None else f'a {type(cache).__name__}'},"
                " in which block gates do not find what they need: give cache=block_cache(model),"
                " a new one for every batch, or choose_blocks(model, None) to read everything"
            )

    def table(self, length: int) -> RotaryTable:
        """Return the cosines and sines of the queries, once; see `AttentionInputs`.

        Raises:
            GatesError: They are not those of this call.
        """
        table: RotaryTable | None = self._call[0]
        self._call[0] = None
        if table is None or table[0].shape[1] != length:
            raise GatesError(f"{self.name} was called without its positions: call the whole model")
        return table

    def forward(self, seen: AttentionInputs) -> Tensor:
        """Return the output of attention (B, H, T, D)."""
        cache, self._call[1] = self._call[1], None
        if self.attend is not None:
            return self.attend(self, seen)
        if self.selector is None:
            return attend_to_all(seen)
        self._warn(seen.k.shape[2])
        if cache is not None and self.kind == "decode":
            return self._decode(seen, self.selector, cache)
        mask = self.choose(seen, self.selector, cache)
        self._count(seen, None if mask is None else mask.sum())
        if mask is None:
            return attend_to_all(seen)
        return block_sparse_attention(
            seen.q, seen.k, seen.v, mask, self.gate.block_size,
            scale=seen.scale, padding_mask=seen.padding,
        )  # fmt: skip

    def _warn(self, length: int) -> None:
        """Warn once, in the first layer, of a sequence longer than those that were learned from."""
        if self.first and self.context is not None and length > self.context and not self._warned:
            self._warned = True
            warnings.warn(
                f"block gates were distilled from sequences of {self.context:,} tokens, this one is"
                " longer: they may choose worse than the first block and the last ones; distill"
                " with a longer --context",
                stacklevel=2,
            )

    def _decode(
        self, seen: AttentionInputs, selector: BlockSelector | Budgets, cache: BlockCache
    ) -> Tensor:
        """Return attention to the blocks that are chosen now, or were for a token before."""
        layer, length = cache.layers[self.layer], seen.k.shape[2]
        kept: KeptTokens | None = layer.kept
        if length < self.dense_below:
            kept = None
        elif kept is None or self._kept is None or not kept.continues(length):
            mask, size = self.choose(seen, selector, cache), self.gate.block_size
            kept = None if mask is None else KeptTokens(seen, mask, size, self.every)
        layer.kept = kept if self.every > 1 else None
        out = attend_to_all(seen) if kept is None else kept.attend(seen)
        self._count(seen, None if kept is None else kept.read)
        return out

    def _count(self, seen: AttentionInputs, read: Tensor | int | None) -> None:
        """Add the blocks that a call reads, None for all, and those that it might have read."""
        size, length = self.gate.block_size, seen.k.shape[2]
        first = length - seen.q.shape[2]
        if self.kind == "prefill":
            counts, heads = length - first > 1, self.gate.num_heads
            allowed = _rows((length - 1) // size + 1, 1) - _rows(first // size, 1)
        else:
            counts, heads = first > 0 or read is not None, self.gate.num_kv_heads
            allowed = _rows(length, size) - _rows(first, size)
        if counts:
            allowed *= heads * len(seen.q)
            number = torch.tensor(allowed) if self.kind == "prefill" else allowed
            before = self._kept or (0, 0)
            self._kept = before[0] + (number if read is None else read), before[1] + number

    def choose(
        self, seen: AttentionInputs, selector: BlockSelector | Budgets, cache: BlockCache | None
    ) -> Tensor | None:
        """Return the kept blocks of a prompt, or of a token that is decoded; None for all.

        A prompt may come in chunks, of which one of a block or less reads everything, as the tokens
        do that assisted decoding checks; the last rows of each read everything, as of a prompt.
        """
        number, length = seen.q.shape[2], seen.k.shape[2]
        if isinstance(self.gate, AttnGate):
            if number == 1 or (number < length and number <= self.gate.block_size):
                return None
            scored = partial(self._score, self.gate, seen, cache)
            if isinstance(selector, Budgets):
                if length >= 2 * self.gate.block_size:
                    return selector.choose(self.name, scored, seen)
                self._say_short(length)
                return None
            logits = scored()
            mask: Tensor = selector(logits)
            if number < length and (last := selector.dense_rows):
                mask[..., -last:, :] |= logits[..., -last:, :] > torch.finfo(logits.dtype).min
            return mask
        if number > 1 or cache is None or isinstance(selector, Budgets):
            return None
        keys = cache.layers[self.layer].keys_for(self.gate, seen, cache.table)
        return selector(self.gate.decode(seen.raw()[0], keys))

    @staticmethod
    def _score(gate: AttnGate, seen: AttentionInputs, cache: BlockCache | None) -> Tensor:
        """Return the logits of a prompt, or of a part of it after what a cache holds."""
        q, k = seen.raw()
        if q.shape[1] < seen.k.shape[2] and cache is not None:
            k = unrotated(seen.k, cache.table)
        logits: Tensor = gate(q, k, padding_mask=seen.padding)
        return logits

    def _say_short(self, length: int) -> None:
        """Say once, in the first layer, that a text is too short to choose blocks of."""
        if self.first and not self._short:
            self._short = True
            warnings.warn(
                f"a text of {length} tokens has less than two blocks of {self.gate.block_size}:"
                " everything is read, of this one and others as short",
                stacklevel=2,
            )


def _rows(number: int, size: int) -> int:
    """Return the blocks that the first tokens may read together, each its own one and all before.

    Args:
        number: Tokens.
        size: Tokens of a block.
    """
    whole, rest = divmod(number, size)
    return (size * whole + 2 * rest) * (whole + 1) // 2


def attach_block_gates(
    model: nn.Module, kind: Kind = "prefill", *, block_size: int = 64
) -> dict[str, BlockGate]:
    """Put a gate that chooses blocks of keys into each attention of a model.

    ``prefill`` chooses while a prompt is read and reads everything afterwards (SeerAttention, arXiv
    2410.13276), ``decode`` chooses for every token that is generated (SeerAttention-R, 2506.08889),
    with the cache of `block_cache`. Attention reads everything until `choose_blocks`
    sets a rule. The gates score queries and keys before their rotation, which are had by rotating
    back what arrives; they have the width of the heads, and are float32. Nothing is frozen.

    Args:
        model: A decoder of transformers whose attention is causal, without window or soft cap, and
            rotates the halves of all features, such as Llama, Qwen2, Qwen3 or OLMo.
        kind: What the gates choose for.
        block_size: Tokens of a block.

    Returns:
        The gates by the names of their attention modules, such as ``layers.0.self_attn``.

    Raises:
        GatesError: The model does not fit, has such gates already, or weights that are offloaded.
        ValueError: ``block_size`` is not a whole number from 1 on.
    """
    check_option("kind", kind, get_args(Kind), GatesError)
    check_whole(1, block_size=block_size)
    base, attentions = base_of(model), locate_attention(model)
    for attention in attentions:
        if CHILD in attention.module._modules:
            raise GatesError(
                f"{attention.name} has block gates already: call detach_block_gates(model) before"
            )
        refuse_absent(attention.name, attention.module)
        refuse_unfit(base, attention)
    register_block_attention()
    build = AttnGate if kind == "prefill" else DecodeAttnGate
    frequencies = base.rotary_emb.inv_freq
    gates: dict[str, BlockGate] = {}
    for attention in attentions:
        heads = attention.num_heads, attention.num_kv_heads, attention.head_dim
        gate = build(
            *heads, block_size=block_size, gate_dim=attention.head_dim, frequencies=frequencies,
            device=frequencies.device,
        )  # fmt: skip
        own = BlockGate(attention, gate, first=not gates, former=base.config._attn_implementation)
        own.hook(attention.module)
        gates[attention.name] = own.train(attention.module.training)
    base.set_attn_implementation(NAME)
    return gates


def refuse_unfit(base: Any, attention: Attention) -> None:
    """Refuse attention that block gates cannot stand for.

    Raises:
        GatesError: It is not reached through transformers' interface, has a window, a soft cap,
            sinks or other parameters of the module itself, such as those of differential attention,
            or rotates otherwise than the halves of all features.
    """
    module, why = attention.module, ""
    if not getattr(base, "_supports_attention_backend", False):
        why = "attends by itself and not through transformers.AttentionInterface"
    elif "position_embeddings" not in inspect.signature(module.forward).parameters:
        why = "has no rotary positions that the model computes for all layers"
    else:
        config = base.config.get_text_config()
        for name in ("sliding_window", "attn_logit_softcapping", "sinks", *module._parameters):
            if getattr(module, name, getattr(config, name, None)) is not None:
                why = f"has {name}"
        if not getattr(module, "use_rope", True):
            why = "does not rotate, while other layers do"
        if "query_layernorm" in module._modules:
            why = "norms queries and keys after their rotation"
        why = why or _rotation(base, attention)
    if why:
        raise GatesError(
            f"{attention.name} ({type(module).__name__}) {why}: block gates need plain causal"
            " attention that rotates the halves of all features, as in Llama, Qwen2, Qwen3 or OLMo"
        )


def _rotation(base: Any, attention: Attention) -> str:
    """Return what is wrong with the rotation of a model; empty if nothing is."""
    rotary = getattr(base, "rotary_emb", None)
    theirs = getattr(sys.modules[type(attention.module).__module__], "apply_rotary_pos_emb", None)
    frequencies = getattr(rotary, "inv_freq", None)
    if theirs is None or frequencies is None or rotary is None:
        return "has no rotation that is known"
    dim = attention.head_dim
    if 2 * len(frequencies) != dim:
        return f"rotates {2 * len(frequencies)} of {dim} features"
    x = torch.linspace(-1, 1, 3 * dim, device=frequencies.device).view(1, 1, 3, dim)
    cos, sin = rotary(x, torch.arange(1, 4, device=x.device)[None])
    table = tuple(part[..., : dim // 2].unsqueeze(1) for part in (cos, sin))
    try:
        assert_close(theirs(x, x, cos, sin)[0], rotate_by(x, table), rtol=1e-5, atol=1e-5)
    except (AssertionError, RuntimeError):
        return "rotates its features in another way"
    return ""


def block_gates(model: nn.Module) -> dict[str, BlockGate]:
    """Return the block gates of a model by the names of their attention modules.

    Raises:
        GatesError: The model has none, or does not fit.
    """
    return require_attached(model, CHILD, BlockGate, "attach_block_gates")


def detach_block_gates(model: nn.Module) -> dict[str, BlockGate]:
    """Take the block gates off a model, which then computes what it did before them.

    Returns:
        The gates by the names of their attention modules.

    Raises:
        GatesError: The model has none.
    """
    gates = block_gates(model)
    for attention in locate_attention(model):
        gates[attention.name].unhook(attention.module)
    base_of(model).set_attn_implementation(next(iter(gates.values())).former)
    return gates


@contextmanager
def detached(model: nn.Module) -> Iterator[None]:
    """Take the block gates off a model for a while."""
    gates = detach_block_gates(model)
    try:
        yield
    finally:
        for attention in locate_attention(model):
            gates[attention.name].hook(attention.module)
        base_of(model).set_attn_implementation(NAME)


def choose_blocks(
    model: nn.Module,
    selector: BlockSelector | Budgets | None,
    *,
    every: int = EVERY,
    dense_below: int = 0,
) -> None:
    """Let attention read the blocks that a rule selects by the scores of the gates.

    Gates for decoding lose least with a rule that always reads the first block and spends most of
    its budget on the last ones (`recent_blocks`), such as ``BlockSelector(k=16, sinks=1,
    recent=12)``.

    Args:
        model: With block gates.
        selector: The rule, or of prompts what `language.seer.budgets.load_budgets` returned; None:
            everything is read.
        every: Tokens that are decoded with the blocks that were chosen for the first of them.
        dense_below: Tokens of a cache below which each of them reads everything.

    Raises:
        GatesError: The model has no gates, or they have blocks of another size or, with budgets,
            are not those that were calibrated.
        ValueError: ``every`` is not a whole number from 1 on, or ``dense_below`` from 0 on.
    """
    check_whole(1, every=every)
    check_whole(0, dense_below=dense_below)
    gates = block_gates(model)
    size = next(iter(gates.values())).gate.block_size
    if isinstance(selector, Budgets):
        selector.require({name: gate.gate for name, gate in gates.items()})
    elif selector is not None and selector.rule == "token_budget" and selector.block_size != size:
        raise GatesError(
            f"the token budget is in blocks of {selector.block_size}, the gates have {size}: give"
            f" BlockSelector(token_budget=..., block_size={size})"
        )
    for gate in gates.values():
        gate.choose_by(selector, every, dense_below)


def block_cache(model: nn.Module) -> BlockCache:
    """Return an empty cache for a model with gates for decoding.

    Every batch needs a new one: ``model.generate(..., cache=block_cache(model))``.

    Raises:
        GatesError: The model has no block gates.
    """
    gates = block_gates(model)
    size = next(iter(gates.values())).gate.block_size
    return BlockCache(max(gate.layer for gate in gates.values()) + 1, size)
