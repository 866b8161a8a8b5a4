"""The cache of a policy, and the attention that hands it the queries of a model of transformers."""

import copy
import time
import warnings
from collections.abc import Mapping
from traceback import walk_stack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from core_gates.errors import GatesError
from core_gates.ops import block_sparse_attention
from language.hf.locate import attached, base_of, locate_attention, refuse_encoders
from language.seer.attach import BlockGate, detach_block_gates
from language.seer.attention import CHILD, FOREIGN, causal_attention
from language.seer.attention import NAME as BLOCKS

NAME = "gates_policy"
"""What this attention, and the mask that goes with it, are called in transformers."""

SLOT = "_policy_layer"
"""Where an attention module holds the layer of the cache between its call and its attention."""


class LayerState:
    """Keys and values that a layer holds of sequences of one length, without padding.

    Args:
        policy: The policy.
        index: Of the layer.
        num_layers: Layers of the model.
        scale: Factor of the scores of attention.

    Attributes:
        held: All tensors that stay in memory, batch first: ``keys`` and ``values`` (B, K, n, D),
            and what a policy adds, such as bounds of pages.
        seen: Tokens read, those that were dropped included.
    """

    def __init__(self, policy: Any, index: int, num_layers: int, scale: float) -> None:
        self.policy, self.index, self.num_layers, self.scale = policy, index, num_layers, scale
        self.held: dict[str, Tensor] = {}
        self.seen = 0

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens (B, K, T, D), and return all keys and values that attention may read."""
        self.seen += keys.shape[2]
        for name, new in (("keys", keys), ("values", values)):
            before = self.held.get(name)
            if before is None:  # a copy, as slices would hold on to what they were cut from
                self.held[name] = new.clone(memory_format=torch.contiguous_format)
                continue
            group = before.shape[1] // new.shape[1]  # query heads of a key head, or 1
            new = new if group == 1 else new.repeat_interleave(group, 1)
            self.held[name] = torch.cat([before, new], 2)
        return self.held["keys"], self.held["values"]

    def keep(self, kept: Tensor) -> None:
        """Drop all tokens but those at positions (B, K, n), or (B, H, n) of each query head."""
        for name in ("keys", "values"):
            tensor = self.held[name]
            tensor = tensor.repeat_interleave(kept.shape[1] // tensor.shape[1], 1)
            index = kept.unsqueeze(-1).expand(-1, -1, -1, tensor.shape[-1])
            self.held[name] = tensor.gather(2, index)


class PolicyLayer(DynamicLayer):  # type: ignore[misc]
    """The cache of one layer: one state, or one of each sequence if a batch is padded.

    Args:
        policy: The policy.
        index: Of the layer.
        num_layers: Layers of the model.

    Attributes:
        seconds: Spent on compression.
        read: Keys that single tokens have read, and those of all tokens before them.
        full_bytes: Keys and values of all tokens that were read.
    """

    is_croppable = False

    def __init__(self, policy: Any, index: int, num_layers: int) -> None:
        super().__init__()
        self.policy, self.index, self.num_layers = policy, index, num_layers
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.states: list[LayerState] = []
        self.seen, self.full_bytes, self.seconds, self._waits = 0, 0, 0.0, False
        self.read = torch.zeros(2, dtype=torch.float64)

    def get_seq_length(self) -> int:
        """Return the tokens that were read, so that true positions continue."""
        return self.seen

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Count new tokens, and return their keys and values for `attend`.

        Raises:
            GatesError: The attention of the tokens before did not go through this cache, or it
                holds another number of sequences.
        """
        if self._waits:
            raise GatesError(
                f"the model attends without its {type(self.policy).__name__}: make the cache by"
                " policy.make_cache(model) of the model that is called"
            )
        if self.states and len(key_states) != self.rows:
            raise GatesError(
                f"the cache holds {self.rows} sequences, the batch has {len(key_states)}: give"
                " every batch a new one of policy.make_cache(model)"
            )
        self.seen, self._waits = self.seen + key_states.shape[2], True
        return key_states, value_states

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """Return the attention (B, T, H, D) of new tokens, and hold what the policy keeps."""
        self._waits = False
        self.full_bytes += k.nbytes + v.nbytes
        if self.policy.exact:
            self.states = self.states or [self._state(scale)]
            k, v = self.states[0].extend(k, v)
            if q.shape[2] == 1:
                self._count(self.states[0], k.shape[2])
            return sdpa_attention_forward(module, q, k, v, mask, scaling=scale)[0]  # type: ignore[no-any-return]
        if not self.states:
            return self._prompt(module, q, k, v, mask, scale)
        if mask is not None and not bool(mask[..., -1, -q.shape[2] :].all()):
            raise GatesError(
                "tokens after the prompt have padding, which cache policies cannot hide: give"
                " sequences of one length, and an attention_mask of prompt and new tokens"
            )
        parts = zip(*(x.chunk(len(self.states)) for x in (q, k, v)), strict=True)
        out = [self._continue(state, *new) for state, new in zip(self.states, parts, strict=True)]
        return torch.cat(out).transpose(1, 2)

    def _prompt(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """Attend to the prompt, and compress it.

        Raises:
            GatesError: ``generate`` gives a part of it.
        """
        frames = (frame.f_locals.get("generation_config") for frame, _ in walk_stack(None))
        if any(getattr(config, "prefill_chunk_size", None) for config in frames):
            raise GatesError(
                "prefill_chunk_size gives a part of the prompt, which a cache policy would compress"
                " as if it were all: leave it out"
            )
        firsts = first_tokens(mask)
        rows = [x.chunk(len(firsts) or 1) for x in (q, k, v)]
        sparse = []
        for first, *whole in zip(firsts or [0], *rows, strict=True):
            own = [x[:, :, first:] for x in whole]
            self.states.append(state := self._state(scale))
            sparse.append(self.policy.attend(state, *own))
            started = clock(q.device)
            state.extend(*own[1:])
            kept = self.policy.prefill(state, *own)
            if kept is not None:
                state.keep(kept)
            self.seconds += clock(q.device) - started
        if sparse[0] is None:
            return sdpa_attention_forward(module, q, k, v, mask, scaling=scale)[0]  # type: ignore[no-any-return]
        out = [F.pad(x, (0, 0, q.shape[2] - x.shape[2], 0)) for x in sparse]
        return torch.cat(out).transpose(1, 2)

    def _continue(self, state: LayerState, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attention (B, H, T, D) of tokens after the prompt."""
        k, v = state.extend(k, v)
        pages = self.policy.decode(state, q, k) if q.shape[2] == 1 else None
        if pages is None:
            if q.shape[2] == 1:
                self._count(state, k.shape[2])
            return causal_attention(q, k, v, state.scale)
        page = self.policy.page
        sizes = torch.full(pages.shape[-1:], page, device=pages.device)
        sizes[-1] = k.shape[2] - page * (len(sizes) - 1)
        self._count(state, (pages * sizes).sum(-1).float().mean())
        width = v.shape[-1]
        if width < k.shape[-1]:  # as in multi-head latent attention
            v = F.pad(v, (0, k.shape[-1] - width))
        out = block_sparse_attention(q, k, v, pages.unsqueeze(2), page, scale=state.scale)
        return out[..., :width]

    def _count(self, state: LayerState, read: Tensor | float) -> None:
        """Add the keys that a token has read, and those of all tokens."""
        self.read = self.read.to(place := state.held["keys"].device)
        both = [torch.as_tensor(x, device=place, dtype=torch.float64) for x in (read, state.seen)]
        self.read += torch.stack(both)

    def _state(self, scale: float) -> LayerState:
        kind = self.policy.state
        return kind(self.policy, self.index, self.num_layers, scale)  # type: ignore[no-any-return]

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to forget tokens.

        Raises:
            GatesError: Always, for other than 0.
        """
        if tokens_to_remove:
            raise GatesError(
                f"a cache of {self.policy.name!r} does not forget {-tokens_to_remove} tokens:"
                " copy.deepcopy it before they are read"
            )

    @property
    def rows(self) -> int:
        """The sequences of the batch, once it holds tokens."""
        return len(self.states[0].held["values"]) if len(self.states) == 1 else len(self.states)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        self.batch_select_indices(torch.arange(self.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        if len(self.states) > 1:
            self.states = [copy.deepcopy(self.states[int(row)]) for row in indices]
            return
        for state in self.states:
            state.held = {name: x[indices.to(x.device)] for name, x in state.held.items()}

    reorder_cache = batch_select_indices  # type: ignore[assignment]


class PolicyCache(Cache):  # type: ignore[misc]
    """A cache of transformers that a policy compresses at the end of its first call, the prompt.

    Every batch needs a new one. ``copy.deepcopy`` keeps its state, such as for several questions
    about one context; ``get_seq_length`` counts the tokens that were read, not those held.

    Args:
        policy: The policy.
        num_layers: Layers of the model.
    """

    layers: list[Any]

    def __init__(self, policy: Any, num_layers: int) -> None:
        super().__init__(layers=[PolicyLayer(policy, i, num_layers) for i in range(num_layers)])

    @property
    def seconds(self) -> float:
        """Seconds spent on compression."""
        return sum(layer.seconds for layer in self.layers)

    @property
    def full_bytes(self) -> int:
        """Bytes of keys and values of all tokens that were read."""
        return sum(layer.full_bytes for layer in self.layers)

    @property
    def read(self) -> float | None:
        """Mean fraction of all keys that tokens, one a call, have read; None before the first."""
        read, seen = torch.stack([layer.read.cpu() for layer in self.layers]).sum(0)
        return float(read / seen) if seen else None

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that it holds."""
        states = [state for layer in self.layers for state in layer.states]
        return [tensor for state in states for tensor in state.held.values()]


def held_bytes(tensors: list[Tensor]) -> int:
    """Return the bytes of memory that tensors hold, each memory once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def first_tokens(mask: Tensor | None) -> list[int]:
    """Return the padding on the left of each prompt, nothing if there is none.

    Args:
        mask: True (B, 1, T, T) at pairs that are visible; None: all that causality allows.

    Raises:
        GatesError: It hides something else.
    """
    if mask is None:
        return []
    visible = mask[:, 0, -1].bool()
    causal = torch.ones(visible.shape[1:] * 2, dtype=torch.bool, device=mask.device).tril_()
    firsts = (~visible).sum(1)
    left = torch.arange(visible.shape[1], device=mask.device) >= firsts[:, None]
    fits = mask.dtype == torch.bool and bool(left.any(1).all())
    if not fits or not torch.equal(mask[:, 0], causal & left[:, None]):
        raise GatesError(
            "the mask hides more than padding on the left, or a whole row, which cache policies"
            " cannot: pad by tokenizer.padding_side = 'left', give one sequence a row and an"
            " attention_mask (B, T)"
        )
    return firsts.tolist() if bool(firsts.any()) else []


def clock(device: torch.device) -> float:
    """Return the clock after all work that was given to a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _remember(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Put the layer of a policy's cache where its attention finds it.

    Raises:
        GatesError: The model attends in another way, which would leave the policy out.
    """
    caches = (x for x in (*args, *kwargs.values()) if isinstance(x, PolicyCache))
    if (cache := next(caches, None)) is not None:  # its name differs between families
        attention = module.config._attn_implementation  # type: ignore[union-attr]
        if attention != NAME:
            raise GatesError(
                f"the model attends by {attention!r}, which leaves the policy of its cache out:"
                " call policy.make_cache(model) after another attention was set"
            )
        module.__dict__[SLOT] = cache.layers[module.layer_idx]  # type: ignore[index]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend through the cache of a policy, or plainly; see `transformers.AttentionInterface`.

    Raises:
        GatesError: What is asked for is not causal attention of this kind.
    """
    layer: PolicyLayer | None = module.__dict__.pop(SLOT, None)
    if layer is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    asked = [name for name in FOREIGN if options.get(name) is not None]
    asked += [name for name in ("dropout", "output_attentions") if options.get(name)]
    if asked:
        raise GatesError(
            f"{type(module).__name__} attends with {', '.join(asked)}, which cache policies"
            " cannot: give a model with plain causal attention, in evaluation mode"
        )
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    query, key = (x.to(value.dtype) for x in (query, key))  # float32 after rotation under autocast
    return layer.attend(module, query, key, value, attention_mask, scale), None


def take_gates_back(model: nn.Module) -> None:
    """Detach the block gates that a policy attached for its own cache."""
    if any(gate.lent for gate in attached(model, CHILD, BlockGate).values()):
        detach_block_gates(model)


def prepare(model: nn.Module) -> int:
    """Let a model attend through caches of policies; without one it attends by ``sdpa``.

    Args:
        model: A decoder of transformers with plain causal attention in all layers.

    Returns:
        The number of its layers.

    Raises:
        GatesError: The model does not fit.

    Warns:
        UserWarning: It attended otherwise than by ``sdpa``.
    """
    base = base_of(model)
    refuse_encoders(base.config, type(base).__name__)
    kinds = [type(layer) for layer in DynamicCache(config=base.config).layers]
    other = next((i for i, kind in enumerate(kinds) if kind is not DynamicLayer), None)
    if other is not None or not getattr(base, "_supports_attention_backend", False):
        why = "attends by itself" if other is None else f"has a {kinds[other].__name__}"
        where = "" if other is None else f"layer {other} of "
        raise GatesError(
            f"{where}{type(base).__name__} {why}, which no cache policy compresses: give a decoder"
            " whose layers all attend to everything before, such as Llama or Qwen3"
        )
    take_gates_back(model)
    attentions = locate_attention(model)
    for name, module in ((attention.name, attention.module) for attention in attentions):
        extras = ("sinks", "attn_logit_softcapping")
        if has := [extra for extra in extras if getattr(module, extra, None) is not None]:
            raise GatesError(
                f"{name} ({type(module).__name__}) has {', '.join(has)}, which cache policies"
                " cannot: give a decoder with plain causal attention, such as Llama or Qwen3"
            )
    if (former := base.config._attn_implementation) not in ("sdpa", NAME, BLOCKS):
        warnings.warn(
            f"{type(base).__name__} attended by {former!r}, and from now on by 'sdpa', without"
            f" attentions: model.set_attn_implementation({former!r}) takes that back",
            stacklevel=3,
        )
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    for attention in attentions:
        if _remember not in attention.module._forward_pre_hooks.values():
            attention.module.register_forward_pre_hook(_remember, with_kwargs=True)
    base.set_attn_implementation(NAME)
    return max(int(attention.module.layer_idx) for attention in attentions) + 1  # type: ignore[arg-type]
