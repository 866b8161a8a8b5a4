"""Every routing gate of the core with the losses that it was published with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import core_gates.gates
from core_gates import Gate
from core_gates.errors import GatesError
from core_gates.gates import PermutedGate
from core_gates.routing import PermutationSearch, StagedSchedule, TemperatureSchedule
from studies.digits.multi_digits import NUM_IDS

Settings = Mapping[str, Any]


class Recipe(NamedTuple):
    """How a gate is built and trained.

    Attributes:
        options: Of its class, beyond ``dim`` and ``num_experts``.
        losses: Name of each auxiliary loss to its weight.
        source: Paper of the losses.
    """

    options: Settings
    losses: Mapping[str, float]
    source: str


BALANCED = {"balance": 0.01}
RECIPES: Mapping[str, Recipe] = {
    "ActivationGate": Recipe({"activation": "tanh"}, {}, "arXiv 2401.13875, no loss"),
    "BaseLayerGate": Recipe({}, {}, "arXiv 2103.16716, no loss"),
    "CometGate": Recipe({"k": 2}, {"entropy": 0.01}, "arXiv 2306.02824, from its grid"),
    "CosineGate": Recipe({"k": 2}, BALANCED, "arXiv 2204.09179"),
    "DSelectKGate": Recipe({"k": 2}, {"entropy": 0.01, "lost_mass": 1.0}, "arXiv 2106.03760"),
    "DenseToSparseGate": Recipe({"stages": {"annealing": 0.4}}, BALANCED, "arXiv 2112.14397"),
    "ExpertChoiceGate": Recipe({}, {}, "arXiv 2202.09368, no loss"),
    "GShardGate": Recipe({}, BALANCED, "arXiv 2006.16668"),
    "HardConcreteGate": Recipe({}, {"l0": 0.01}, "arXiv 1712.01312"),
    "HashGate": Recipe({"num_ids": NUM_IDS}, {}, "arXiv 2106.04426, no loss"),
    "MlpGate": Recipe({}, {}, "Ma et al. 2018, no loss"),
    "NoisyTopKGate": Recipe({}, {"importance": 0.1, "load": 0.1}, "arXiv 1701.06538"),
    "PermutedGate": Recipe(
        {"gate": "TopKGate", "search": {"steps": 0.1}},
        {"permutation_entropy": 1e-4, **BALANCED},
        "arXiv 2306.02824",
    ),
    "ReMoEGate": Recipe({"rate": 1.02, "initial_penalty": 1e-3}, {"l1": 1.0}, "arXiv 2412.14711"),
    "SigmoidGate": Recipe({"k": 2, "balance_rate": 1e-3}, {}, "arXiv 2408.15664, no loss"),
    "SinkhornGate": Recipe({}, {}, "arXiv 2202.01169, no loss"),
    "SoftMoEGate": Recipe(
        {"num_slots": 64, "initial_scale": 10.0}, {}, "arXiv 2308.00951, no loss"
    ),
    "SoftmaxGate": Recipe({}, {}, "Jacobs et al. 1991, no loss"),
    "SwitchGate": Recipe({}, BALANCED, "arXiv 2101.03961"),
    "ThresholdGate": Recipe({}, BALANCED, "that of top-k"),
    "TopKGate": Recipe({}, BALANCED, "arXiv 1701.06538 with the loss of 2101.03961"),
    "TopPGate": Recipe({}, {**BALANCED, "entropy": 1e-4}, "arXiv 2403.07652"),
}
"""Class of a gate -> its recipe; a test compares the names with what the core exports."""


def gate_classes() -> dict[str, type[Gate]]:
    """Return every class of gates that the core exports and that can be built."""
    exported = {name: getattr(core_gates.gates, name) for name in dir(core_gates.gates)}
    return {
        name: kind
        for name, kind in exported.items()
        if isinstance(kind, type) and issubclass(kind, Gate) and not inspect.isabstract(kind)
    }


def build_gate(name: str, options: Settings, *, dim: int, num_experts: int, num_steps: int) -> Gate:
    """Return a gate by the name of its class.

    Args:
        name: Its class.
        options: Of its constructor; ``stages``, ``tau`` and ``search`` are schedules as mappings,
            whose ``annealing``, ``num_steps`` and ``steps`` are fractions of the training, and
            ``gate`` is the class of the gate that is permuted, the rest then being its options.
        dim: Features.
        num_experts: E.
        num_steps: Of the training.

    Raises:
        GatesError: The gate refuses an option.
    """
    given = dict(options)
    try:
        if name == "PermutedGate":
            inner, search = str(given.pop("gate")), dict(given.pop("search"))
            steps = max(2, round(search.pop("steps") * num_steps))
            gate = build_gate(inner, given, dim=dim, num_experts=num_experts, num_steps=num_steps)
            return PermutedGate(gate, search=PermutationSearch(steps, **search))
        if "stages" in given:
            stages = dict(given["stages"])
            steps = round(stages.pop("annealing") * num_steps)
            given["stages"] = StagedSchedule(annealing_steps=steps, **stages)
        if isinstance(given.get("tau"), Mapping):
            tau = dict(given["tau"])
            tau["num_steps"] = round(tau["num_steps"] * num_steps)
            given["tau"] = TemperatureSchedule(**tau)
        return gate_classes()[name](dim, num_experts, **given)
    except ValueError as error:
        raise GatesError(f"{name} cannot be built: {error}") from error
