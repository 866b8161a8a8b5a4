"""Which experts the next layer will need: what is fetched follows guesses, what is computed not."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from core_gates.errors import GatesError, check_option
from core_gates.gates.predictive import CrossLayerPredictor, fetch_order
from core_gates.routing.base import Gate
from core_gates.routing.output import RoutingOutput
from language.hf.pregating import level_of, router_of
from language.offload.setup import Predicting

FROM_PROFILE = ("path", "frequency", "ngram", "ngram-first")

ALIKE = ("all", "frequency")
"""Predictors that do not distinguish tokens: they rank all experts, alike for each."""

ORDER = 4
"""The most tokens of a context of the table ``ngram``."""

RARE = 0.25
"""Fraction of the guessed experts of a prompt that travel in 2 bits (Fate), the least popular."""


class RoutedTokens(NamedTuple):
    """What is known of T tokens when their experts in one layer are.

    Attributes:
        routed: These experts (T, K).
        tokens: Each token and those before it (T, ORDER), see `last_tokens`.
        hidden: What the router of the layer has read (T, D); None in a trace.
    """

    routed: Tensor
    tokens: Tensor
    hidden: Tensor | None = None


class Profile(NamedTuple):
    """What N tokens used, of which tables are made.

    Attributes:
        routed: Their experts (L, N, K), in order of use.
        tokens: Each token and those before it (N, ORDER), see `last_tokens`.
        digest: That of the experts, see `language.offload.setup.Sizes`.
    """

    routed: Tensor
    tokens: Tensor
    digest: str = ""


Predictor = Callable[[int, RoutedTokens], Tensor]
"""Returns experts of the layer after one for each token (T, W), the most likely first."""


class RouterGate(Gate):
    """The router module of a mixture model of transformers as a gate of the core.

    Args:
        router: Returns logits, weights and indices.
        dim: Features of its input.
    """

    def __init__(self, router: Any, dim: int) -> None:
        super().__init__(dim, int(router.num_experts))
        self.router = router

    def forward(
        self, x: Tensor, *, ids: Tensor | None = None, padding_mask: Tensor | None = None
    ) -> RoutingOutput:
        """Route tokens (T, D) without the hooks of the router, which others may count."""
        del ids
        logits, weights, indices = self.router.forward(x)
        return RoutingOutput(weights, indices, logits=logits).ignore(padding_mask)

    def reset_parameters(self) -> None:
        """Leave the parameters as they are: they belong to the model."""


def cross_layer(model: nn.Module, names: Sequence[str], dim: int, width: int) -> Predictor:
    """Return a predictor: the router of the next layer applied to the input of this one (Fate).

    The router of a pre-gated model is given what it will read, so that its guesses are right.

    Args:
        model: A mixture model of transformers.
        names: Of the experts of its layers, next to which the routers are.
        dim: Features of a token.
        width: Experts that are guessed for each token.

    Raises:
        GatesError: A router is not found.
    """
    ahead = []
    for name in names[1:]:
        router = router_of(model.get_submodule(name.rpartition(".")[0]))
        if not hasattr(router, "num_experts"):
            raise GatesError(f"no router is next to {name}: guess by 'frequency', or not at all")
        ahead.append(CrossLayerPredictor(RouterGate(router, dim), width=width))

    level = level_of(model) or 1
    read: list[Tensor] = []  # by the last routers

    def predict(layer: int, seen: RoutedTokens) -> Tensor:
        assert seen.hidden is not None
        read[:] = [*read[1 - level :], seen.hidden] if layer and level > 1 else [seen.hidden]
        return cast(Tensor, ahead[layer](read[0 if layer + 1 >= level else -1]).indices)

    return predict


def last_tokens(tokens: Tensor, before: Tensor | None = None) -> Tensor:
    """Return each token and those before it (..., T, ORDER), the last first.

    Args:
        tokens: Token numbers (..., T).
        before: Those before the first (..., ORDER - 1); -1 if None, which stands for none.
    """
    before = tokens.new_full((*tokens.shape[:-1], ORDER - 1), -1) if before is None else before
    return torch.cat([before, tokens], -1).unfold(-1, ORDER, 1).flip(-1)


def _contexts(name: str, routed: Tensor, tokens: Tensor) -> list[Tensor]:
    """Return contexts (T, M, C) of C numbers, M at a time, from the most frequent to the rarest."""
    if name == "path":  # each expert of the layer, and all of them together
        every, each = routed.sort(1).values.unsqueeze(1), routed.unsqueeze(2)
        return [torch.zeros_like(every[..., :1]), each, every]
    known = nn.functional.pad(tokens, (1, 0)).unsqueeze(1)  # the empty context is a zero
    return [known[..., : n + 1] for n in range(ORDER + 1 if name == "ngram" else 1)]


def _counts(contexts: Tensor, used: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a table of how often experts were used after contexts: from (T, M, C) to (T, E).

    Args:
        contexts: Of the uses (N, M, C).
        used: One at experts that were used (N, E).
    """
    rows, place = contexts.flatten(0, 1).unique(dim=0, return_inverse=True)
    known = {(*row,): number for number, row in enumerate(rows.tolist())}
    counts = torch.zeros(len(known) + 1, used.shape[1])  # the last row is of unknown contexts
    counts.index_add_(0, place, used.repeat_interleave(contexts.shape[1], 0))

    def of(wanted: Tensor) -> Tensor:
        return counts[
            torch.tensor([[known.get((*one,), -1) for one in row] for row in wanted.tolist()])
        ].sum(1)

    return of


@lru_cache(maxsize=2)  # documents share the profile that their tables are made of
def table(name: str, profile: Profile, num_experts: int) -> Predictor:
    """Return the experts that a profile used most in the next layer after the same context.

    Fractions of uses are smoothed by those of the next more frequent context, which count as one
    use (a Dirichlet prior, MacKay and Peto 1995).

    Args:
        name: ``frequency`` knows no context; that of ``path`` is the experts of this layer
            together, then each; that of ``ngram`` the last four tokens, then three, two and one.
        profile: What is counted.
        num_experts: Experts of a layer.
    """
    layers = []
    for now, after in zip(profile.routed[:-1], profile.routed[1:], strict=True):
        used = torch.zeros(len(after), num_experts).scatter_(1, after.long(), 1.0)
        layers.append([_counts(one, used) for one in _contexts(name, now, profile.tokens)])

    def predict(layer: int, seen: RoutedTokens) -> Tensor:
        scores = torch.zeros(())
        for counts, one in zip(
            layers[layer], _contexts(name, seen.routed, seen.tokens), strict=True
        ):
            found = counts(one)
            scores = (found + scores) / (found.sum(1, keepdim=True) + 1)
        return scores.argsort(dim=1, descending=True, stable=True)

    return predict


def make_predictor(
    name: str, num_experts: int, *, profile: Profile | None = None, ahead: Predictor | None = None
) -> Predictor | None:
    """Return a predictor; None for ``none``.

    Args:
        name: One of `language.offload.setup.Predicting`.
        num_experts: Experts of a layer.
        profile: What tables are made of, see `FROM_PROFILE`.
        ahead: What ``cross-layer``, or in a trace ``oracle``, is here. ``ngram-first`` is that but
            for the first pair of layers, where it is ``ngram``.

    Raises:
        GatesError: The name is unknown, or what it needs is not given.
    """
    check_option("predictor", name, get_args(Predicting), GatesError)
    if name == "none":
        return None
    if name == "all":
        return lambda _, seen: torch.arange(num_experts).expand(len(seen.routed), -1)
    if name == "oracle" and ahead is None:
        raise GatesError("predictor 'oracle' knows the future: replay a trace")
    if name not in FROM_PROFILE:
        return ahead
    if profile is None:
        raise GatesError(f"predictor {name!r} needs a profile: give a trace, or 'cross-layer'")
    first, later = table(name.removesuffix("-first"), profile, num_experts), ahead
    if name != "ngram-first" or later is None:
        return first

    def predict(layer: int, seen: RoutedTokens) -> Tensor:
        guess = later(layer, seen)  # which may have to see every layer
        return guess if layer else first(layer, seen)

    return predict


def fetched(
    ranked: Tensor,
    k: int,
    width: int,
    num_experts: int,
    padding: Tensor | None = None,
    *,
    alike: bool = False,
) -> list[int]:
    """Return guessed experts in the order in which they are fetched.

    For one token they are its ``width`` most likely ones. For several it is the union of their k
    most likely ones, popular experts first, since computing these covers the transfer of the
    others (Fate); or all experts, where the predictor does not distinguish tokens. Padding fetches
    nothing.

    Args:
        ranked: Experts of each token (T, W), the most likely first.
        k: Experts that a token uses.
        width: The most that are guessed for one token.
        num_experts: Experts of a layer.
        padding: True (T,) at tokens that are padding.
        alike: Whether the predictor is one of `ALIKE`.
    """
    if len(ranked) == 1 and padding is None:
        return cast(list[int], ranked[0, :width].tolist())
    first = ranked[:, :k]
    routing = RoutingOutput(torch.ones(first.shape, device=first.device), first).ignore(padding)
    order, counts = fetch_order(routing, num_experts)
    return cast(list[int], (ranked[0] if alike and counts.any() else order[counts > 0]).tolist())


def rarest(order: Sequence[int]) -> set[int]:
    """Return the experts of a prompt that travel in 2 bits, the last quarter by popularity."""
    return set(order[len(order) - int(RARE * len(order)) :])
