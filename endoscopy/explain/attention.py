"""What a sizing network of any trunk looks at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from core_gates.errors import GatesError
from endoscopy.bundles.contents import SizingBundle
from endoscopy.data.frames.network_input import network_input
from endoscopy.data.frames.transforms import Frame
from endoscopy.explain.grad_cam import grad_cam
from endoscopy.explain.rollout import attention_rollout

GRAD_CAM, ROLLOUT = "Grad-CAM", "attention roll-out"


def attention_maps(bundle: SizingBundle, frames: Sequence[Frame]) -> tuple[np.ndarray, str] | None:
    """Return Grad-CAM of a ResNet or the attention roll-out of a ViT.

    Args:
        bundle: Trained network.
        frames: N frames as the network takes them.

    Returns:
        (N, S, S) float32 in [0, 1] and its name; None for networks that have neither.
    """
    inputs = network_input(frames, bundle.form)
    device = next(bundle.model.parameters()).device
    streams = {name: value.to(device) for name, value in inputs.streams.items()}
    geometry = inputs.geometry.to(device)
    for method, name in ((grad_cam, GRAD_CAM), (attention_rollout, ROLLOUT)):
        try:
            return method(bundle.model, streams, geometry).detach().float().cpu().numpy(), name
        except GatesError:
            continue
    return None
