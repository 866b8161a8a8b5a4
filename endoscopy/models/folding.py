"""Sizing networks without their gates, for inference."""

import copy

import torch
from torch import Tensor, nn

from core_gates import FeatureSelectionGate, fold_gates
from core_gates.surgery import gate_hosts
from endoscopy.models.sizer import MultiStreamSizer

STATIC = ("fsg", "l0", "layer_scale")


@torch.no_grad()
def fold(model: MultiStreamSizer) -> MultiStreamSizer:
    """Return the network with its static gates multiplied into the weights, in evaluation.

    It computes what ``model.eval()`` computes, up to rounding, with the operations of a network
    built with ``gates="none"``, which it is. The gates of the last stage of a ResNet and L1 go into
    the columns of the first layer of the head, L2 into those of the second. Attention that depends
    on the image (``se``) stays as it is.

    Args:
        model: Any sizing network; it is not changed.
    """
    twin = copy.deepcopy(model).eval()
    if model.arguments["gates"] not in STATIC:
        return twin
    twin.head.fold_(torch.cat([_fold_trunk(trunk, twin) for trunk in twin.branches.values()]))
    twin.arguments["gates"] = "none"  # the form in which it is saved
    return twin


def _fold_trunk(trunk: nn.Module, model: MultiStreamSizer) -> Tensor:
    """Fold all gates that precede weights; return what the head must absorb."""
    hosts = gate_hosts(trunk)
    stages = [name for name, host in hosts.items() if isinstance(host.module, nn.Sequential)]
    if not stages:
        fold_gates(trunk)
        width = next(model.head.parameters())
        dim = int(trunk.num_features)  # type: ignore[arg-type]
        return torch.ones(dim, device=width.device, dtype=width.dtype)
    fold_gates(trunk, where=stages[:-1])
    last = trunk.get_submodule(stages[-1])
    gate = last.gate
    assert isinstance(gate, FeatureSelectionGate)
    del last.gate
    return gate.scores()
