"""Saliency maps of sizing networks with any trunk."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from core_gates.errors import GatesError
from endoscopy.bundles.contents import SizingBundle
from endoscopy.data.frames.network_input import network_input
from endoscopy.data.frames.transforms import Frame, resize_frame
from endoscopy.explain.grad_cam import grad_cam
from endoscopy.explain.rollout import attention_rollout
from endoscopy.inputs.content import BLACK, LUMA

GRAD_CAM, ROLLOUT = "Grad-CAM", "attention roll-out"


def attention_maps(bundle: SizingBundle, frames: Sequence[Frame]) -> tuple[np.ndarray, str] | None:
    """Return Grad-CAM of a ResNet or the attention roll-out of a ViT.

    Args:
        bundle: Trained network.
        frames: N frames of any size.

    Returns:
        (N, S, S) float32 in [0, 1] and its name, 0 in black corners; None for networks that have
        neither.
    """
    inputs = network_input(frames, bundle.form)
    device = next(bundle.model.parameters()).device
    streams = {name: value.to(device) for name, value in inputs.streams.items()}
    geometry = inputs.geometry.to(device)
    for method, name in ((grad_cam, GRAD_CAM), (attention_rollout, ROLLOUT)):
        try:
            maps = method(bundle.model, streams, geometry).detach().float().cpu().numpy()
        except GatesError:
            continue
        images = (resize_frame(frame, bundle.image_size).image for frame in frames)
        return np.stack([inside(*pair) for pair in zip(maps, images, strict=True)]), name
    return None


def inside(heat: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Return a map that is zero outside the round field of view of an endoscope.

    The black corners show nothing, but coarse maps reach into them. Dark regions that are not
    connected with a corner, such as the lumen, keep their values.

    Args:
        heat: (H, W) in [0, 1].
        image: (H, W, 3) uint8.

    Returns:
        (H, W), 0 outside; the largest value is 1 unless it is 0 throughout.
    """
    regions, _ = ndimage.label(image @ LUMA <= BLACK)
    corners = {int(regions[y, x]) for y in (0, -1) for x in (0, -1)} - {0}
    kept = np.where(np.isin(regions, list(corners)), 0, heat).astype(np.float32)
    return kept / max(float(kept.max()), 1e-12)
