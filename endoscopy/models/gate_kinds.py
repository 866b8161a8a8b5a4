"""The gates that a sizing network can have, and their parameters."""

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

from torch import nn

from core_gates import FeatureSelectionGate, inject_gates
from core_gates.surgery import gate_hosts
from endoscopy.models.layer_scale import LayerScale
from endoscopy.models.recalibration import recalibrate

GateKind = Literal["fsg", "none", "layer_scale", "se", "l0"]

GateMaker = Callable[..., FeatureSelectionGate]

L0_START = 2.2
"""Logit of L0 gates at the start: open with probability 0.98, a score of 0.98."""


def gate_trunk(trunk: nn.Module, kind: GateKind) -> int:
    """Gate the residual branches or stages of a trunk, in place.

    Args:
        trunk: A ViT, Swin, ConvNeXt or ResNet; another network stays as it is.
        kind: ``fsg``, feature-selection gates (arXiv 2407.04400); ``l0``, the same with hard
            concrete scores (Louizos et al., 2018); ``layer_scale``; ``se``, squeeze-and-excitation;
            or ``none``.

    Returns:
        Number of gates.

    Raises:
        ValueError: The kind is unknown or does not fit the trunk.
    """
    if kind not in get_args(GateKind):
        raise ValueError(f"gates is {kind!r}; choose one of {', '.join(get_args(GateKind))}")
    hosts = gate_hosts(trunk)
    if kind == "none" or not hosts:
        return 0
    if kind == "se":
        return len(recalibrate(trunk))
    if kind == "layer_scale":
        stages = any(isinstance(host.module, nn.Sequential) for host in hosts.values())
        make: GateMaker = partial(LayerScale, init=1.0 if stages else 1e-5)
    else:
        make = static_gate(kind)
    return len(inject_gates(trunk, gate=make))


def static_gate(kind: GateKind) -> GateMaker:
    """Return the constructor of a static gate, which takes the number of features."""
    if kind == "layer_scale":
        return partial(LayerScale, init=1.0)
    if kind == "l0":
        return partial(FeatureSelectionGate, rectifier="hard_concrete", init=L0_START)
    return FeatureSelectionGate


def head_gate(kind: GateKind, dim: int) -> nn.Module:
    """Return a gate on ``dim`` pooled features; none for kinds that pool an image themselves."""
    if kind in ("fsg", "l0", "layer_scale"):
        return static_gate(kind)(dim)
    return nn.Identity()


def gates_of(model: nn.Module) -> dict[str, FeatureSelectionGate]:
    """Return the gates that a gate optimizer may move, by name; LayerScale is a weight."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, FeatureSelectionGate) and not isinstance(module, LayerScale)
    }


def gate_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the gate optimizer by name; all others are weights."""
    return {f"{name}.logits": gate.logits for name, gate in gates_of(model).items()}


def weight_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the main optimizer by name: all but those of gates."""
    gates = gate_parameters(model)
    return {name: p for name, p in model.named_parameters() if name not in gates}
