"""EvoMoE, its rivals and its ablations: small decoders of bytes that differ in their gates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

import core_gates.gates
from core_gates.errors import GatesError
from core_gates.moe.experts import StackedExperts
from core_gates.routing import StagedSchedule
from language.decoder import Decoder
from studies.evomoe.budget import num_mixtures, step_flops

VOCAB = 257  # bytes, and the end of a document
MOE_EVERY = 2
LEAST_UPDATES = 64  # fewer cannot end within a percent of a budget


class Method(NamedTuple):
    """How a decoder is trained.

    Attributes:
        gate: Class of its gates; None for a dense decoder.
        options: Of them.
        losses: Weights of auxiliary losses.
        shared: Fraction of its updates in which all tokens share one expert.
        annealing: Fraction of its updates in which experts close one after the other.
        mask_prob: Probability that a weight of a spawned expert is zero.
        frozen_after: Fraction of the budget after which gates no longer learn.
    """

    gate: str | None = None
    options: Mapping[str, Any] = {}
    losses: Mapping[str, float] = {}
    shared: float = 0.0
    annealing: float = 0.0
    mask_prob: float = 0.0
    frozen_after: float = 1.0


BALANCED = {"balance": 0.01}
SWITCH = Method("SwitchGate", {"eval_capacity_factor": None}, BALANCED)
EVOMOE = Method("DenseToSparseGate", {}, BALANCED, shared=0.2, annealing=0.4, mask_prob=0.1)
METHODS: Mapping[str, Method] = {
    "dense": Method(),
    "switch": SWITCH,
    "base": Method("BaseLayerGate", {"group_dim": -2}),
    "hash": Method("HashGate", {"num_ids": VOCAB}),
    "top2": Method("TopKGate", {"k": 2}, BALANCED),
    "stable": SWITCH._replace(frozen_after=0.2),
    "evomoe": EVOMOE,
    "no-spawn": EVOMOE._replace(shared=0.0),
    "no-mask": EVOMOE._replace(mask_prob=0.0),
    "no-anneal": EVOMOE._replace(annealing=0.0),
}
"""Name -> how it is trained; those after ``evomoe`` lack one of its parts."""


@dataclass(frozen=True)
class Sizes:
    """What is trained, and how long.

    Args:
        updates: Updates of the dense decoder, whose FLOPs every method gets.
        batch: Sequences of an update.
        context: Tokens of a sequence.
        dim: Features of a token.
        layers: Blocks, two at least, of which every second one has experts.
        heads: Heads of attention in every layer.
        hidden: Hidden features of an expert, and of a dense network.
        experts: Number of experts, two at least.
        temperatures: First and last temperature of EvoMoE.
        threshold: Weight above which its experts are used, below 1 over their number.
    """

    updates: int = 480
    batch: int = 8
    context: int = 128
    dim: int = 64
    layers: int = 4
    heads: int = 4
    hidden: int = 128
    experts: int = 8
    temperatures: tuple[float, ...] = (2.0, 0.3)
    threshold: float = 0.001

    def settings(self) -> dict[str, Any]:
        """Check the settings that determine results, and return them.

        Raises:
            GatesError: A number is out of range.
        """
        if self.updates < LEAST_UPDATES or self.batch < 1:
            raise GatesError(
                f"--updates is {self.updates}, expected {LEAST_UPDATES} at least, as fewer do not "
                f"end within 1 % of the same FLOPs, and --batch {self.batch}, expected 1 at least"
            )
        if self.experts < 2 or self.layers < MOE_EVERY:
            raise GatesError(
                f"--experts is {self.experts}, expected two or more to choose from, and --layers "
                f"{self.layers}, expected {MOE_EVERY} or more, of which every second one has them"
            )
        if len(self.temperatures) != 2 or not all(0 < t < float("inf") for t in self.temperatures):
            raise GatesError(
                f"--temperatures is {list(self.temperatures)}, expected two positive numbers"
            )
        if not 0 <= self.threshold < 1 / self.experts:
            raise GatesError(
                f"--threshold is {self.threshold:g}, expected less than 1 over {self.experts} "
                "experts, at which every expert may be closed"
            )
        try:
            plan_of(self)
        except ValueError as error:
            raise GatesError(f"the decoder cannot be built: {error}") from error
        return {**vars(self), "temperatures": list(self.temperatures)}


class Plan(NamedTuple):
    """FLOPs of a training.

    Attributes:
        dense: Of an update of the dense decoder.
        single: Of an update in which every token has one expert.
        full: Of one in which it has all.
        budget: Of a whole training, of every method.
    """

    dense: int
    single: int
    full: int
    budget: int

    def updates(self, method: Method) -> int:
        """Return how many updates the budget allows, one expert a token, and all while annealing.

        Phases are fractions of these: experts that close early leave more updates for the last one.
        """
        single = self.dense if method.gate is None else self.single
        mean = (1 - method.annealing) * single + method.annealing * self.full
        return int(self.budget / mean)


@cache
def plan_of(sizes: Sizes) -> Plan:
    """Return the FLOPs of a training."""
    with torch.device("meta"):
        dense, mixture = _decoder(sizes, Method(), {}), _decoder(sizes, SWITCH, {})
    tokens = sizes.batch * sizes.context * num_mixtures(mixture)
    step_cost, single, full = (
        step_flops(model, sizes.batch, sizes.context, kept)
        for model, kept in ((dense, 0), (mixture, tokens), (mixture, tokens * sizes.experts))
    )
    return Plan(step_cost, single, full, sizes.updates * step_cost)


def decoder_of(name: str, sizes: Sizes, frequencies: Sequence[float] | None = None) -> Decoder:
    """Return an untrained decoder.

    Args:
        name: Of the method.
        sizes: Of the decoder and of its training.
        frequencies: How often each token occurs (257,), by which a hash balances its table.
    """
    method, options = METHODS[name], dict[str, Any]()
    if method.gate == "DenseToSparseGate":
        updates, (start, end) = plan_of(sizes).updates(method), sizes.temperatures
        shared, annealing = (round(part * updates) for part in (method.shared, method.annealing))
        stages = StagedSchedule(shared, annealing, start, end)
        options = {"stages": stages, "threshold": sizes.threshold}
    elif method.gate == "HashGate":
        options = {"frequencies": frequencies}
    return _decoder(sizes, method, options)


def _decoder(sizes: Sizes, method: Method, options: Mapping[str, Any]) -> Decoder:
    arguments: dict[str, Any] = {}
    if method.gate is not None:
        kind, given = getattr(core_gates.gates, method.gate), {**method.options, **options}
        arguments["gate"] = lambda dim: kind(dim, sizes.experts, **given)
        arguments["experts"] = lambda number, dim: StackedExperts(number, dim, sizes.hidden)
        arguments |= {"moe_every": MOE_EVERY, "allow_leak": True}
    return Decoder(
        VOCAB, sizes.dim, sizes.layers, sizes.heads, hidden_dim=sizes.hidden,
        context=sizes.context, qk_norm=True, tie_embeddings=True, **arguments,
    )  # fmt: skip
