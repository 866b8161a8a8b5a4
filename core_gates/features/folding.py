"""Multiplying constant scores of features into the weights of a module, in place."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

Side = Literal["output", "input"]
_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
)


@torch.no_grad()
def scale_outputs(module: nn.Module, scores: Tensor) -> None:
    """Multiply the output features of a module by ``scores``.

    Args:
        module: Linear layer, convolution or affine normalization; changed in place.
        scores: Factor of each output feature.

    Raises:
        ValueError: The module is of another kind, has no affine weights or other features.
    """
    known = nn.Linear, _ConvNd, *_NORMS
    weight = _weight(module, known)
    if weight.shape[0] != scores.shape[0]:
        raise ValueError(f"{_name(module)} has {weight.shape[0]} outputs, not {scores.shape[0]}")
    weight.mul_(scores.to(weight.dtype).view(-1, *[1] * (weight.ndim - 1)))
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        bias.mul_(scores.to(bias.dtype))


@torch.no_grad()
def scale_inputs(module: nn.Module, scores: Tensor) -> None:
    """Multiply the input features of a module by ``scores``, as if they came scaled.

    Args:
        module: Linear layer or convolution without groups; changed in place.
        scores: Factor of each input feature.

    Raises:
        ValueError: The module is of another kind, is grouped or has other features.
    """
    weight = _weight(module, (nn.Linear, _ConvNd))
    if isinstance(module, _ConvNd) and module.groups != 1:
        raise ValueError(f"{_name(module)} has {module.groups} groups; only 1 can absorb scores")
    if weight.shape[1] != scores.shape[0]:
        raise ValueError(f"{_name(module)} has {weight.shape[1]} inputs, not {scores.shape[0]}")
    weight.mul_(scores.to(weight.dtype).view(1, -1, *[1] * (weight.ndim - 2)))


def _weight(module: nn.Module, known: tuple[type[nn.Module], ...]) -> Tensor:
    weight = getattr(module, "weight", None)
    fits = isinstance(module, known) and not isinstance(module, _ConvTransposeNd)
    if not fits or not isinstance(weight, Tensor):
        raise ValueError(
            f"{_name(module)} cannot absorb scores; expected a module with weights that is a"
            f" {', '.join(kind.__name__.strip('_') for kind in known)}"
        )
    return weight


def _name(module: nn.Module) -> str:
    return type(module).__name__
