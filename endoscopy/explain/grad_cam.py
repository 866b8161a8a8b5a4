"""Grad-CAM of convolutional sizing networks."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.errors import GatesError
from endoscopy.models.sizer import MultiStreamSizer


def grad_cam(
    model: MultiStreamSizer,
    streams: Mapping[str, Tensor],
    geometry: Tensor | None = None,
    *,
    stream: str | None = None,
) -> Tensor:
    """Return where a network sees evidence for a larger lesion.

    ``relu(Σ_c mean(∂ŷ/∂A_c) A_c)`` with the maps A of the last stage and the first output ŷ
    (Selvaraju et al., 2017), enlarged to the frame.

    Args:
        model: A network of ResNets, for evaluation.
        streams: Normalized images (B, C, H, W) by name.
        geometry: Of the boxes (B, 4), if the network reads it.
        stream: Whose branch to look at; the first by default.

    Returns:
        (B, H, W) in [0, 1], the largest value of each frame 1 unless it is 0 throughout.

    Raises:
        GatesError: The branch has no convolutional stages, or does not exist.
    """
    name = stream or next(iter(model.branches))
    stage = _last_stage(model, name)
    held: list[Tensor] = []
    handle = stage.register_forward_hook(lambda _module, _inputs, out: held.append(out))
    try:
        with torch.enable_grad():
            inputs = {key: value.detach() for key, value in streams.items()}
            inputs[name] = inputs[name].clone().requires_grad_()  # even if no weight does
            score = model(inputs, geometry)[:, 0].sum()
            maps = held[0]
            (gradient,) = torch.autograd.grad(score, maps)
    finally:
        handle.remove()
    weights = gradient.mean((2, 3), keepdim=True)
    heat = F.relu((weights * maps).sum(1, keepdim=True)).detach()
    heat = F.interpolate(heat, streams[name].shape[2:], mode="bilinear")[:, 0]
    return heat / heat.amax((1, 2), keepdim=True).clamp(min=1e-12)


def _last_stage(model: MultiStreamSizer, name: str) -> nn.Module:
    if name not in model.branches:
        known = ", ".join(model.branches)
        raise GatesError(f"the network has no stream {name!r}; choose one of {known}")
    stages = [
        module
        for key, module in model.branches[name].named_children()
        if key.startswith("layer") and isinstance(module, nn.Sequential)
    ]
    if not stages:
        raise GatesError(
            f"Grad-CAM needs the stages of a ResNet, which stream {name!r} has not; use attention "
            "roll-out for a transformer"
        )
    return stages[-1]
