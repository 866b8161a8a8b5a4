"""From frames with lesions to what a network reads: in the same way in training and afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from core_gates.errors import GatesError
from endoscopy.data.frames.outlines import box_masks, ellipse_masks
from endoscopy.data.frames.streams import (
    NEEDS_DEPTH,
    box_geometry,
    build_streams,
    normalize,
)
from endoscopy.data.frames.transforms import Frame, resize_frame

WITH_MASK = frozenset({"rgb_mask", "rgb_mask_depth"})
"""Streams that use the outline of the lesion."""

Outline = Literal["mask", "box", "either"]


class InputForm(NamedTuple):
    """The input of a network.

    Attributes:
        streams: Names, see :data:`endoscopy.data.frames.streams.STREAMS`.
        size: Side length in pixels.
        aperture: Of :func:`endoscopy.data.frames.streams.build_streams`.
        outline: Where the outline of lesions came from in training, see :func:`outline_of`.
    """

    streams: tuple[str, ...]
    size: int
    aperture: float | None = None
    outline: Outline = "mask"


class NetworkInput(NamedTuple):
    """What a network reads of B frames.

    Attributes:
        streams: Name to (B,C,S,S) float32.
        geometry: (B,4) float32, see :func:`endoscopy.data.frames.streams.box_geometry`.
    """

    streams: dict[str, Tensor]
    geometry: Tensor


def network_input(frames: Sequence[Frame], form: InputForm) -> NetworkInput:
    """Return what a network reads of frames, in training, evaluation and prediction alike.

    Args:
        frames: Of any size, each with the box of its lesion, and mask and depth where known.
        form: Of the network.

    Raises:
        GatesError: A stream needs a depth that a frame lacks.
    """
    frames = [resize_frame(frame, form.size) for frame in frames]
    images = normalize(torch.stack([_image(frame) for frame in frames]))
    boxes = torch.tensor([frame.box for frame in frames], dtype=torch.float32)
    depths = None
    if NEEDS_DEPTH & set(form.streams):
        if any(frame.depth is None for frame in frames):
            names = ", ".join(form.streams)
            raise GatesError(f"a frame has no depth, which the streams {names} need; leave it out")
        depths = torch.stack([torch.from_numpy(frame.depth) for frame in frames])[:, None]
    masks = None
    if WITH_MASK & set(form.streams):
        masks = torch.from_numpy(np.stack([outline_of(frame, form.outline) for frame in frames]))
    streams = build_streams(
        images,
        None if masks is None else masks[:, None],
        depths,
        boxes,
        form.streams,
        aperture=form.aperture,
    )
    return NetworkInput(streams, box_geometry(boxes, form.size, form.size))


def outline_of(frame: Frame, outline: Outline) -> np.ndarray:
    """Return the mask (H,W) uint8 of a lesion as a network knows such masks from training.

    - ``mask``: every training frame had a mask. A lesion without one gets the ellipse inscribed
      into its box, which is closer to an outline than the box is;
    - ``box``: no training frame had one, and the box was filled, as it is here, whatever is given;
    - ``either``: some had none, and the box was filled. A lesion has its mask, or its filled box.
    """
    if frame.mask is not None and outline != "box":
        return np.asarray(frame.mask, dtype=np.uint8)
    draw = ellipse_masks if outline == "mask" else box_masks
    height, width = frame.image.shape[:2]
    return draw(np.array([frame.box], dtype=float), height, width)[0].astype(np.uint8)


def _image(frame: Frame) -> Tensor:
    image = torch.from_numpy(np.ascontiguousarray(frame.image)).permute(2, 0, 1)
    return image.float() / 255.0 if image.dtype == torch.uint8 else image
