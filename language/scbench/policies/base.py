"""What a policy of a KV cache is: which tokens are kept, which are read, and what that holds."""

import inspect
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from core_gates.errors import GatesError, check_option, check_whole
from language.hf.locate import base_of
from language.scbench.policies.cache import LayerState, PolicyCache, held_bytes, prepare

VARIANTS = ("kvpress", "published")
ZERO = ("sinks", "last", "residual")
"""Options that may be 0; other whole numbers are at least 1."""


@dataclass(frozen=True)
class KVPolicy:
    """What is kept of keys and values, and what is read of them; by itself everything is.

    A policy is a set of options, its state is in the cache that it makes. Sequences arrive without
    padding: a padded batch is taken row by row.

    Attributes:
        name: What `language.scbench.policies.registry.policy_of` calls it.
        page: Tokens of a page, for `decode`.
        state: What holds keys and values of a layer.
    """

    name: ClassVar[str]
    page: ClassVar[int] = 16
    state: ClassVar[type[LayerState]] = LayerState

    def __post_init__(self) -> None:
        """Refuse options out of range."""
        for option in fields(self):
            name, value = option.name, getattr(self, option.name)
            if name == "keep" and value is not option.default:
                check_keep(value)
            if name == "variant":
                check_option(name, value, VARIANTS)
            if option.type in (int, "int"):
                check_whole(int(name not in ZERO), **{name: value})

    @property
    def exact(self) -> bool:
        """Whether it changes nothing, so that its cache is left to compute as a plain one does."""
        return getattr(self, "keep", None) == 1

    def settings(self) -> dict[str, Any]:
        """Return what decides the answers that it leads to: by itself name and options."""
        return {"policy": {"name": self.name, **asdict(self)}}

    def require(self, length: int) -> None:
        """Refuse a prompt of so many tokens that does not fit the options.

        Raises:
            GatesError: It is too short.
        """

    def make_cache(self, model: nn.Module) -> Any:
        """Let a decoder of transformers attend by the policy, and return a cache for one batch.

        It works in the model and its ``generate``, under the name that
        `cache_argument` returns. The first call is the prompt, and
        is compressed at its end; later tokens are kept.

        Raises:
            GatesError: The model is no decoder with plain causal attention in all layers, or does
                not fit the options.
        """
        return PolicyCache(self, prepare(model))

    def attend(
        self,
        layer: LayerState,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor | None:
        """Return the attention (B, H, T, D) of a prompt; None: each token attends to all before."""
        return None

    def prefill(
        self,
        layer: LayerState,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor | None:
        """Return the tokens of a prompt that are kept, after it was read.

        Args:
            layer: With ``index``, ``num_layers``, and ``scale``, the factor of attention's scores.
            queries: Rotated queries (B, H, T, D).
            keys: Rotated keys (B, K, T, D).
            values: Values (B, K, T, D).

        Returns:
            Positions (B, K, n) in ascending order, or (B, H, n) to keep others for every query
            head; None: all are kept.
        """
        return None

    def decode(
        self,
        layer: LayerState,
        queries: Tensor,
        keys: Tensor,
    ) -> Tensor | None:
        """Return the pages of the cache that a token after the prompt reads.

        Args:
            layer: As in `prefill`; what is added to its ``held`` (tensors, batch first) stays.
            queries: Its queries (B, H, 1, D); calls of several tokens read everything.
            keys: Keys (B, K, n, D) that are held, its own the last.

        Returns:
            True (B, K, N) at pages of ``page`` tokens, the last one among them; None: all are read.
        """
        return None

    def cache_bytes(self, cache: Any) -> int:
        """Return the bytes of all tensors that a cache of this policy holds."""
        return held_bytes(cache.tensors)


@dataclass(frozen=True)
class FullPolicy(KVPolicy):
    """Keeps and reads everything, as transformers does."""

    name: ClassVar[str] = "full"

    @property
    def exact(self) -> bool:
        """It always is."""
        return True


@dataclass(frozen=True)
class DroppingPolicy(KVPolicy):
    """Keeps the tokens of a prompt with the highest scores, the same number in each head.

    A policy of this kind is a subclass with a ``name`` and `scores`.

    Attributes:
        keep: Fraction of the tokens that is kept, above 0 and at most 1.
        certain: The option that counts tokens that are kept whatever their score, if any.
    """

    certain: ClassVar[str] = ""
    keep: float = 0.5

    def scores(self, layer: LayerState, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return scores of tokens, (B, K, T), or (B, H, T), by which keys are held H / K times.

        See `KVPolicy.prefill`; what is infinite is surely kept.
        """
        raise NotImplementedError

    def count(self, layer: LayerState, length: int) -> int:
        """Return the tokens that are kept of so many."""
        return kept_tokens(self.keep, length)

    def prefill(
        self, layer: LayerState, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor | None:
        """Return the positions with the highest scores.

        Raises:
            GatesError: There is another number of scores, or one is NaN.
        """
        self.require(keys.shape[2])
        count = self.count(layer, keys.shape[2])
        if count >= keys.shape[2]:
            return None
        scores = self.scores(layer, queries, keys, values)
        shapes = keys.shape[:3], queries.shape[:3]  # a query head each: keys are repeated
        if getattr(scores, "shape", None) not in shapes or bool(torch.isnan(scores).any()):
            raise GatesError(
                f"scores of {type(self).__name__} have NaN, or not the shape {tuple(shapes[0])}:"
                " give one for each sequence, key head and token"
            )
        return scores.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(-1).values

    def require(self, length: int) -> None:
        """Refuse a prompt too short for the tokens that are kept whatever their score."""
        needs, kept = getattr(self, self.certain, 0), kept_tokens(self.keep, length)
        if needs > length:
            raise GatesError(
                f"{self.certain} of {self.name!r} is {needs}, the prompt has {length} tokens: give"
                f" a longer prompt or less {self.certain}"
            )
        if needs > kept:
            raise GatesError(
                f"{self.certain} of {self.name!r} is {needs}, more than the {kept} of {length}"
                f" tokens that keep={self.keep} keeps: keep more or give less {self.certain}"
            )


@dataclass(frozen=True)
class StreamingPolicy(DroppingPolicy):
    """Keeps the first tokens and the last ones (StreamingLLM, arXiv 2309.17453).

    Attributes:
        sinks: First tokens.
    """

    name: ClassVar[str] = "streaming"
    certain: ClassVar[str] = "sinks"
    sinks: int = 4

    def scores(
        self,
        layer: LayerState,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor:
        """Score these 1 and all others 0."""
        length = keys.shape[2]
        scores = torch.ones(length, device=keys.device)
        scores[self.sinks : length - kept_tokens(self.keep, length) + self.sinks] = 0
        return scores.expand(*keys.shape[:2], -1)


def kept_tokens(keep: float, length: int) -> int:
    """Return how many tokens of a length a fraction is, rounded down, and at least 1."""
    return max(1, int(keep * length + 1e-6))


def check_keep(keep: float) -> None:
    """Refuse a fraction out of range.

    Raises:
        ValueError: It is not above 0 and at most 1.
    """
    if isinstance(keep, bool) or not isinstance(keep, Real) or not 0 < keep <= 1:
        raise ValueError(f"keep must be above 0 and at most 1, got {keep!r}")


def cache_argument(model: nn.Module) -> str:
    """Return the name by which a model takes its cache; under another it may forget the past.

    Raises:
        GatesError: It takes none.
    """
    names = inspect.signature(base_of(model).forward).parameters
    for name in ("cache", "past_key_values"):
        if name in names:
            return name
    raise GatesError(
        f"{type(model).__name__} takes no cache, looked for cache and past_key_values: give a"
        " causal language model"
    )
