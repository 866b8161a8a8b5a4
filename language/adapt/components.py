"""Components of adapters of all layers: how large, how strong, and which of them stay."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from core_gates.adapters.sparse_low_rank import SparseLowRank
from language.hf.lora import sora_layers


def adapters_of(model: nn.Module) -> dict[str, SparseLowRank]:
    """Return the adapters of a model by the names of their layers."""
    return {name: layer.adapter for name, layer in sora_layers(model).items()}


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Return for each layer which of its components remain (R,), bool."""
    return {name: layer.lora_gate.kept.cpu() for name, layer in adapters_of(model).items()}


def size_of(model: nn.Module) -> int:
    """Return the number of parameters of a model's adapters after pruning, gates folded in."""
    return sum(
        layer.rank * (layer.in_features + layer.out_features)
        for layer in adapters_of(model).values()
    )


def drawn_strengths(model: nn.Module) -> dict[str, Tensor]:
    """Return the magnitudes (R,) of each layer's gates: as drawn, if not trained yet."""
    return {n: layer.lora_gate.weight.detach().abs() for n, layer in adapters_of(model).items()}


def learned_strengths(model: nn.Module) -> dict[str, Tensor]:
    """Return ``‖A_j‖ ‖B_j‖`` of the components (R,) of each layer."""
    return {
        name: layer.lora_A.detach().norm(dim=1) * layer.lora_B.detach().norm(dim=0)
        for name, layer in adapters_of(model).items()
    }


def strongest(model: nn.Module, strengths: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """Return the strongest components (R,), bool, of each layer that fit into a size.

    They are taken from the strongest of all layers on; those that would exceed it are passed over.

    Args:
        model: With adapters.
        strengths: Of the components (R,) of each layer.
        size: The most parameters, see `size_of`.
    """
    costs = {n: layer.in_features + layer.out_features for n, layer in adapters_of(model).items()}
    ordered = [(float(v), n, i) for n, values in strengths.items() for i, v in enumerate(values)]
    masks = {name: torch.zeros(len(values), dtype=torch.bool) for name, values in strengths.items()}
    for _, name, place in sorted(ordered, key=lambda item: -item[0]):
        if costs[name] <= size:
            masks[name][place] = True
            size -= costs[name]
    return masks


@torch.no_grad()
def cut(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Cut all components but those of the masks (R,), in place."""
    for name, adapter in adapters_of(model).items():
        adapter.lora_gate.weight[~masks[name].to(adapter.lora_gate.weight.device)] = 0
        adapter.prune_()


def overlap(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Return the fraction of the components of the first masks that the second have, too."""
    both = sum(int((mask & second[name]).sum()) for name, mask in first.items())
    return both / max(1, sum(int(mask.sum()) for mask in first.values()))
