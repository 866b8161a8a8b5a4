"""Networks and training runs to be compared with the configured one."""

import copy
from typing import Any, NamedTuple

from core_gates.training.gradient_routing import Mode
from endoscopy.models import GateKind, MultiStreamSizer
from endoscopy.training.losses import SizeWeightedLoss
from endoscopy.training.sizing_module import SizingModule
from endoscopy.training.targets import ScaledMillimeters, SizeTarget

L0_WEIGHT = 1e-4  # of a gate; some hundred gates then cost about as much as the loss at its end


class Variant(NamedTuple):
    """What differs from the configuration; None leaves it as configured.

    Attributes:
        summary: A few words for tables.
        gates: Kind of the gates.
        gradient_routing: How the gates learn.
        l0_weight: Of the expected number of open gates.
        streams: Inputs of the network.
        millimeters: Train on millimeters under the size-weighted loss of arXiv 2407.04400.
    """

    summary: str
    gates: GateKind | None = None
    gradient_routing: Mode | None = None
    l0_weight: float | None = None
    streams: tuple[str, ...] | None = None
    millimeters: bool = False


CONFIGURED = "configured"
VARIANTS: dict[str, Variant] = {
    CONFIGURED: Variant("as configured"),
    "plain": Variant("no gates", "none", "off", 0.0),
    "dual": Variant("gates, gradient routing in two passes", "fsg", "dual", 0.0),
    "joint": Variant("gates, one pass with two learning rates", "fsg", "joint", 0.0),
    "frozen": Variant("gates that never learn", "fsg", "off", 0.0),
    "layer_scale": Variant("LayerScale", "layer_scale", "off", 0.0),
    "l0": Variant("hard-concrete gates with an L0 penalty", "l0", "joint", L0_WEIGHT),
    "se": Variant("squeeze and excitation", "se", "off", 0.0),
    "millimeters": Variant("size-weighted loss in millimeters", millimeters=True),
    "crop": Variant("box crop only, apparent size lost", streams=("crop",)),
    "depth": Variant("metric depth besides", streams=("rgb_mask_depth",)),
    "shortcut": Variant("trained where the distance goes with the size"),
}
"""By their names in configurations and score tables."""


def variant_of(module: SizingModule, name: str, **settings: Any) -> SizingModule:
    """Return an untrained module that differs from a configured one by a variant.

    Weights are drawn from the global generator, whatever those of ``module`` are.

    Args:
        module: The configured module; it is not changed.
        name: Key of ``VARIANTS``.
        settings: Arguments of :class:`SizingModule` that override both, such as
            ``learning_rate``.

    Raises:
        ValueError: The name is unknown, or the arguments do not fit each other.
    """
    network, options = variant_arguments(module, name, **settings)
    return SizingModule(MultiStreamSizer(**network), **options)


def variant_arguments(
    module: SizingModule, name: str, **settings: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of :class:`MultiStreamSizer` and of :class:`SizingModule` of a variant.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in VARIANTS:
        raise ValueError(f"variant {name!r} is unknown; choose from {', '.join(VARIANTS)}")
    variant = VARIANTS[name]
    arguments = dict(module.model.arguments)
    if variant.gates is not None:
        arguments["gates"] = variant.gates
    if variant.streams is not None:
        arguments["streams"] = variant.streams
    if variant.millimeters:
        arguments["outputs"] = 1
    target, gate_target = _targets(module, variant)
    options = _options(module) | {"target": target, "gate_target": gate_target}
    changed = {"gradient_routing": variant.gradient_routing, "l0_weight": variant.l0_weight}
    options |= {name: value for name, value in changed.items() if value is not None}
    return arguments, options | settings


def _options(module: SizingModule) -> dict[str, Any]:
    """Return the arguments of the training, all but network and targets."""
    kept = (
        "gradient_routing", "every_k", "learning_rate", "min_learning_rate", "weight_decay",
        "gate_learning_rate", "clip", "gate_clip", "cycles", "accumulate", "l0_weight",
        "sync_batch_norm",
    )  # fmt: skip
    cut_offs = (module.cut_offs.small, module.cut_offs.large)
    return {
        **{name: getattr(module, name) for name in kept},
        "optimizer": module.optimizer_name,
        "cut_offs_mm": cut_offs,
    }


def _targets(module: SizingModule, variant: Variant) -> tuple[SizeTarget, SizeTarget]:
    if variant.millimeters:  # the weights of the published configurations
        return (
            ScaledMillimeters(SizeWeightedLoss(weights=(3.0, 5.0))),
            ScaledMillimeters(SizeWeightedLoss(weights=(5.0, 10.0))),
        )
    return copy.deepcopy((module.target, module.gate_target))
