"""What a trace would take with a budget, a rate of computing and a link: simulated seconds."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from language.offload.allocation import ALLOCATIONS
from language.offload.caches import make_cache, make_caches
from language.offload.guesses import ALIKE, Profile, RoutedTokens, fetched, make_predictor, rarest
from language.offload.quantization import BITS, packed_bytes
from language.offload.setup import Predicting, Setup, Sizes, Transferred, Used
from language.offload.traces import Step, Trace

Key = tuple[int, int]  # layer and expert

CHOSEN = ("lru", "slru", "lfu", "lfru", "arc", "static")
"""Policies that `choose` tries; ``lifo`` is an ablation, ``belady`` needs the future."""

TRIED, WIDTHS = ("cross-layer", "ngram", "ngram-first"), (1, 2, 3)
"""Predictors that it tries, and numbers of guesses, in experts of a token."""

LEAST_GAIN = 0.01
"""What a setup must gain on a profile over on-demand, so that it does not lose elsewhere."""


class Cost(NamedTuple):
    """What computing and reading cost.

    Attributes:
        compute: Seconds of a token in a layer, attention included.
        link: Bytes per second.
        unpack: Seconds in which the thread that reads turns an expert in few bits into numbers of
            the model.
    """

    compute: float
    link: float
    unpack: float = 0.0


@dataclass
class Times(Used):
    """What a trace took.

    Attributes:
        wall: Seconds.
        uses: Uses of experts, of one layer and step each.
    """

    wall: float = 0.0
    uses: int = 0


class Link:
    """One channel: what is waited for first, then guesses, in order; nothing is broken off.

    Args:
        rate: Bytes per second.
        unpack: Seconds that each transfer takes besides.

    Attributes:
        waiting: Guesses that are queued: since when, and their size.
        arrived: When guesses were sent.
    """

    def __init__(self, rate: float, unpack: float = 0.0) -> None:
        self.rate, self.unpack, self.free, self.bytes = rate, unpack, 0.0, 0
        self.waiting: dict[Key, tuple[float, int]] = {}
        self.arrived: dict[Key, float] = {}

    def advance(self, now: float) -> None:
        """Send the guesses that begin before ``now``."""
        while self.waiting:
            key = next(iter(self.waiting))
            since, size = self.waiting[key]
            if max(self.free, since) >= now:
                return
            del self.waiting[key]
            self.arrived[key] = self._send(max(self.free, since), size)

    def demand(self, key: Key, now: float, size: int) -> float:
        """Return when an expert is there that is needed now."""
        self.advance(now)
        found = self.take(key)
        return self._send(max(self.free, now), size) if found is None else found

    def guesses(self) -> set[Key]:
        """Return the guesses that are queued or were sent."""
        return {*self.waiting, *self.arrived}

    def take(self, key: Key) -> float | None:
        """Forget a guess, and return when it was sent."""
        self.waiting.pop(key, None)
        return self.arrived.pop(key, None)

    def _send(self, start: float, size: int) -> float:
        self.free = start + size / self.rate + self.unpack
        self.bytes += size
        return self.free


class Replayed:
    """The steps of a document as a simulation needs them.

    Args:
        steps: Of a document.
        sizes: Of the trace.
        profile: Of other tokens, that tables are made of.

    Attributes:
        tokens: Number of those of each step.
        needed: For each step and layer its experts, ascending, each with its fraction of the uses.
    """

    def __init__(self, steps: Sequence[Step], sizes: Sizes, profile: Profile | None = None) -> None:
        self.sizes, self.profile = sizes, profile
        self.routed = torch.cat([step.routed for step in steps], 1)
        self.ranked = torch.cat([step.ranked for step in steps], 1)
        self.last = torch.cat([step.tokens for step in steps])
        self.tokens = [step.routed.shape[1] for step in steps]
        self.needed = [[_uses(layer) for layer in step.routed] for step in steps]
        self._known: dict[str, tuple[list[Tensor], list[list[list[int]]]]] = {}

    def guesses(self, predictor: str) -> list[Tensor]:
        """Return the guesses of all tokens (T, W) for each layer but the first."""
        return self._guessed(predictor)[0]

    def orders(self, predictor: str) -> list[list[list[int]]]:
        """Return for each layer but the first, and step, guesses in the order of fetching."""
        return self._guessed(predictor)[1]

    def _guessed(self, predictor: str) -> tuple[list[Tensor], list[list[list[int]]]]:
        """Return guesses and orders, found once: not by a cached method, which no process sends."""
        if predictor in self._known:
            return self._known[predictor]
        following = self.routed[1:] if predictor == "oracle" else self.ranked
        k, experts, alike = self.sizes.k, self.sizes.experts, predictor in ALIKE
        predict = make_predictor(
            predictor, experts, profile=self.profile, ahead=lambda layer, _: following[layer]
        )
        ranked = [] if predict is None else [
            predict(n, RoutedTokens(one, self.last)) for n, one in enumerate(self.routed[:-1])
        ]  # fmt: skip
        orders = [
            [
                fetched(one, k, one.shape[1], experts, alike=alike)
                for one in layer.split(self.tokens)
            ]
            for layer in ranked
        ]
        return self._known.setdefault(predictor, (ranked, orders))


def _uses(routed: Tensor) -> list[tuple[int, float]]:
    experts, counts = routed.unique(return_counts=True)
    return [*zip(experts.tolist(), (counts.double() / routed.numel()).tolist(), strict=True)]


class Simulation:
    """A document from empty caches, in the order of the runtime.

    Experts of a layer compute one after the other, ascending, each for its fraction of the uses;
    one that is not there is waited for. Guesses for the next layer are queued once the experts of
    this one are known.

    Args:
        replayed: The document.
        setup: How the budget is used.
        budget: Experts that there is memory for.
        cost: Of computing and reading.
        mapped: The checkpoint is mapped instead: the system reads an expert when it is touched and
            keeps what was used last, of all layers together; ``setup`` is on-demand.

    Raises:
        GatesError: The budget is too small, or the setup needs a profile.
    """

    def __init__(
        self, replayed: Replayed, setup: Setup, budget: int, cost: Cost, *, mapped: bool = False
    ) -> None:
        sizes = self.sizes = replayed.sizes
        self.replayed, self.cost, self.times = replayed, cost, Times()
        self.now, self.mapped = 0.0, mapped
        bits = BITS.get(setup.transfer, ())
        self.volumes = [packed_bytes(sizes.weights, one) for one in bits] or [sizes.bytes]
        self.link = Link(cost.link, cost.unpack if bits else 0.0)
        self.width = setup.guesses(sizes.k, sizes.experts)
        self.orders = replayed.orders(setup.predictor)
        self.by_popularity = setup.predictor not in ALIKE  # of experts of a prompt
        if mapped:
            self.spans = [1] * sizes.layers
            self.caches = [make_cache("lru", budget)] * sizes.layers
        else:
            self.spans = setup.slots(budget, sizes)
            self.caches = make_caches(setup.policy, self.spans, replayed.profile)
        self.rare: set[int] = set()

    def run(self) -> Times:
        """Replay the whole trace, and return its simulated time and bytes."""
        for step in range(len(self.replayed.tokens)):
            for layer in range(self.sizes.layers):
                self._layer(step, layer)
        self.times.wall, self.times.bytes = self.now, self.link.bytes
        return self.times

    def _layer(self, step: int, layer: int) -> None:
        experts, uses = self.sizes.experts, self.replayed.needed[step][layer]
        own = layer * experts if self.mapped else 0  # one cache has the experts of all layers
        keys = [own + e + experts * (e in self.rare) for e, _ in uses]
        spent = self.cost.compute * self.replayed.tokens[step]
        ready: dict[int, tuple[float, bool]] = {}
        admitted = 0
        self.link.advance(self.now)
        for place, (key, (_, fraction)) in enumerate(zip(keys, uses, strict=True)):
            window = keys[place : place + self.spans[layer]]
            for new in keys[admitted : place + len(window)]:
                self._admit(layer, new, window, ready)
            admitted = place + len(window)
            if place == 0:
                self._guess(step, layer, keys[admitted:])
            if key in ready:
                arrival, guessed = ready[key]
                self.times.late += guessed and arrival > self.now
                self.times.stall += max(0.0, arrival - self.now)
                self.now = max(self.now, arrival)
            self.now += spent * fraction
        self.times.uses += len(uses)

    def _admit(
        self, layer: int, key: int, window: list[int], ready: dict[int, tuple[float, bool]]
    ) -> None:
        if self.caches[layer].use(key, window).hit:
            self.times.hits += 1
            return
        guessed = (layer, key) in self.link.guesses()
        self.times.guessed += guessed
        size = self.volumes[key >= self.sizes.experts and not self.mapped]
        ready[key] = self.link.demand((layer, key), self.now, size), guessed

    def _guess(self, step: int, layer: int, unmet: list[int]) -> None:
        for wrong in self.link.guesses() - {(layer, key) for key in unmet}:
            self.link.take(wrong)
        self.rare = set()
        if not self.orders or layer + 1 == self.sizes.layers:
            return
        order, prompt = self.orders[layer][step], self.replayed.tokens[step] > 1
        order = order if prompt else order[: self.width]
        if len(self.volumes) > 1 and prompt and self.by_popularity:
            self.rare = rarest(order)
        there = self.caches[layer + 1].resident
        free, experts = self.width - len(self.link.guesses()), self.sizes.experts
        keys = [expert + experts * (expert in self.rare) for expert in order]
        for key in [key for key in keys if key not in there][:free]:
            self.link.waiting[layer + 1, key] = self.now, self.volumes[key >= experts]


def left_out(documents: Sequence[Sequence[Step]], sizes: Sizes) -> list[Replayed]:
    """Return a replay of each document, its predictor tables from the other documents.

    Args:
        documents: Steps of each.
        sizes: Of their trace.
    """
    others = [[other for other in documents if other is not one] or [one] for one in documents]
    return [
        Replayed(one, sizes, Trace(sizes, some).profile())
        for one, some in zip(documents, others, strict=True)
    ]


def rivals(sizes: Sizes, budget: int, transfer: Transferred = "stored") -> dict[str, Setup]:
    """Return setups that ``auto`` is compared with, by name, those that fit a budget.

    Args:
        sizes: Of the model.
        budget: Experts that there is memory for.
        transfer: Numbers that experts travel in.
    """
    guessing = get_args(Predicting)[1:-1]
    known = {
        "on-demand": Setup(transfer=transfer),
        "static": Setup(policy="static", transfer=transfer),
        **{one: Setup(predictor=one, transfer=transfer) for one in guessing},
    }
    least = sizes.k * sizes.layers
    return {n: s for n, s in known.items() if least + s.guesses(sizes.k, sizes.experts) <= budget}


def choose(
    documents: Sequence[Replayed], budget: int, cost: Cost, transfer: Transferred = "stored"
) -> Setup:
    """Return the setup that takes least on documents of a profile: ``auto``.

    Guesses are those of the router, those of the last tokens, and these for the first pair of
    layers alone, each as wide as there are slots for. A setup that is less than a hundredth faster
    than on-demand is not chosen.

    Args:
        documents: Of the profile; tables are of other documents, see `left_out`.
        budget: Experts that there is memory for.
        cost: Of computing and reading.
        transfer: Numbers that experts travel in, which are not chosen.
    """
    sizes = documents[0].sizes
    most = min(sizes.experts, budget - sizes.k * sizes.layers)
    widths = [n * sizes.k for n in WIDTHS if n * sizes.k <= most]
    guesses = [("none", None), *itertools.product(TRIED, widths)]
    walls: dict[Setup, float] = {}
    for policy, allocation, guess in itertools.product(CHOSEN, ALLOCATIONS, guesses):
        setup = Setup(policy, allocation, *guess, transfer)  # type: ignore[arg-type]
        walls[setup] = sum(Simulation(one, setup, budget, cost).run().wall for one in documents)
    best = min(walls, key=walls.__getitem__)
    plain = Setup(transfer=transfer)
    return best if walls[best] < (1 - LEAST_GAIN) * walls[plain] else plain
