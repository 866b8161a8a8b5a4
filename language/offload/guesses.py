"""Which experts the next layer will need: what is fetched follows guesses, what is computed not."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from core_gates.errors import GatesError, check_option
from core_gates.gates.predictive import CrossLayerPredictor, fetch_order
from core_gates.routing.base import Gate
from core_gates.routing.output import RoutingOutput
from language.hf.pregating import level_of, router_of

PREDICTORS = ("none", "all", "cross-layer", "path", "frequency", "oracle", "path-first")
FROM_PROFILE = ("path", "frequency", "path-first")

RARE = 0.25
"""Fraction of the guessed experts of a prompt that travel in 2 bits (Fate), the least popular."""


class Seen(NamedTuple):
    """What is known of T tokens when their experts in one layer are.

    Attributes:
        routed: These experts (T, K).
        hidden: What the router of the layer has read (T, D); None in a trace.
        ranked: Recorded guesses for the next layer (T, W), the best first; None in a model.
        following: Experts of the next layer (T, K); None in a model.
    """

    routed: Tensor
    hidden: Tensor | None = None
    ranked: Tensor | None = None
    following: Tensor | None = None


Predictor = Callable[[int, Seen], Tensor]
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
    """Return the guesses of the router of the next layer on the input of this one (Fate).

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

    def predict(layer: int, seen: Seen) -> Tensor:
        assert seen.hidden is not None
        read[:] = [*read[1 - level :], seen.hidden] if layer and level > 1 else [seen.hidden]
        return cast(Tensor, ahead[layer](read[0 if layer + 1 >= level else -1]).indices)

    return predict


def frequency(profile: Sequence[Tensor], num_experts: int) -> Predictor:
    """Return the experts that a profile used most in the next layer, whatever the token."""
    counts = [torch.bincount(used.flatten(), minlength=num_experts) for used in profile]
    ranking = [one.argsort(descending=True, stable=True) for one in counts]
    return lambda layer, seen: ranking[layer + 1].expand(len(seen.routed), -1)


def _set_of(routed: Tensor, num_experts: int) -> Tensor:
    """Return a number (N,) that tells sets of experts (N, K) apart."""
    places = num_experts ** torch.arange(routed.shape[1])
    return (routed.cpu().long().sort(1).values * places).sum(1)


def path(profile: Sequence[Tensor], num_experts: int) -> Predictor:
    """Return the experts that a profile used most after those of this layer.

    What followed all of them together counts first, then what followed each of them.
    """
    masks = [torch.zeros(len(one), num_experts).scatter_(1, one.long(), 1.0) for one in profile]
    follow = [now.T @ after for now, after in pairwise(masks)]
    sets = [_set_of(one, num_experts).unique(return_inverse=True) for one in profile[:-1]]
    after_set = [
        torch.zeros(len(known), num_experts).index_add_(0, place, after)
        for (known, place), after in zip(sets, masks[1:], strict=True)
    ]

    def predict(layer: int, seen: Seen) -> Tensor:
        routed, known = seen.routed.cpu().long(), sets[layer][0]
        wanted = _set_of(routed, num_experts)
        place = torch.searchsorted(known, wanted).clamp_(max=len(known) - 1)
        there = (known[place] == wanted).unsqueeze(1)
        scores = follow[layer][routed].sum(1) / (1 + 2 * follow[layer].sum())
        scores += there * after_set[layer][place]
        return scores.argsort(dim=1, descending=True, stable=True)

    return predict


def make_predictor(
    name: str,
    num_experts: int,
    *,
    profile: Sequence[Tensor] | None = None,
    ahead: Predictor | None = None,
) -> Predictor | None:
    """Return a predictor; None for ``none``.

    Args:
        name: One of :data:`PREDICTORS`.
        num_experts: Experts of a layer.
        profile: For each layer its experts (N, K), token by token, see :data:`FROM_PROFILE`.
        ahead: What ``cross-layer``, or in a trace ``oracle``, is here. ``path-first`` is that but
            for the first pair of layers, where it is ``path``.

    Raises:
        GatesError: The name is unknown, or what it needs is not given.
    """
    check_option("predictor", name, PREDICTORS, GatesError)
    if name in FROM_PROFILE and not profile:
        raise GatesError(f"predictor {name!r} needs a profile: give a trace, or 'cross-layer'")
    if profile and name in ("path", "frequency"):
        return (path if name == "path" else frequency)(profile, num_experts)
    if name == "path-first":
        assert ahead is not None
        first, later = path(profile or (), num_experts), ahead

        def predict(layer: int, seen: Seen) -> Tensor:
            guess = later(layer, seen)  # which may have to see every layer
            return guess if layer else first(layer, seen)

        return predict
    if name == "all":
        return lambda _, seen: torch.arange(num_experts).expand(len(seen.routed), -1)
    if name == "oracle" and ahead is None:
        raise GatesError("predictor 'oracle' knows the future: replay a trace")
    return None if name == "none" else ahead


def fetched(
    ranked: Tensor, k: int, width: int, num_experts: int, padding: Tensor | None = None
) -> list[int]:
    """Return guessed experts in the order in which they are fetched.

    For one token they are its ``width`` most likely ones. For several it is the union of their k
    most likely ones, popular experts first, since computing these covers the transfer of the
    others (Fate). Padding fetches nothing.

    Args:
        ranked: Experts of each token (T, W), the most likely first.
        k: Experts that a token uses.
        width: The most that are guessed for one token.
        num_experts: Experts of a layer.
        padding: True (T,) at tokens that are padding.
    """
    if len(ranked) == 1 and padding is None:
        return cast(list[int], ranked[0, :width].tolist())
    first = ranked[:, :k]
    routing = RoutingOutput(torch.ones(first.shape, device=first.device), first).ignore(padding)
    order, counts = fetch_order(routing, num_experts)
    return cast(list[int], order[counts > 0].tolist())


def rarest(order: Sequence[int]) -> set[int]:
    """Return the experts of a prompt that travel in 2 bits, the last quarter of their order."""
    return set(order[len(order) - int(RARE * len(order)) :])
