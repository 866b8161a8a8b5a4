"""The input of a network: streams of frame, mask, depth and box, in training as afterwards."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core_gates.errors import GatesError
from endoscopy.data.images import Frame, resize_frame

STREAMS = {
    "rgb": 3,
    "crop": 3,
    "loc": 3,
    "rgb_mask": 4,
    "depth": 1,
    "relative_depth": 1,
    "rgb_mask_depth": 5,
}
"""Name to channels."""

NEEDS_DEPTH = frozenset({"depth", "relative_depth", "rgb_mask_depth"})
WITH_MASK = frozenset({"rgb_mask", "rgb_mask_depth"})
"""Streams that use the outline of the lesion."""

Outline = Literal["mask", "box", "either"]
DEPTH_SCALE_MM = 30.0
GROWTH = 0.5
ENDOSCOPY = ((0.3224, 0.2263, 0.1750), (0.3178, 0.2406, 0.1933))
"""Mean and standard deviation of red, green and blue in [0, 1], of arXiv 2407.04400's code."""


def normalize(images: Tensor) -> Tensor:
    """Return (B,3,H,W) float32 of mean 0 and variance 1 over the data set.

    Args:
        images: (B,3,H,W) uint8, or floating in [0, 1].
    """
    scaled = images.float() / 255.0 if images.dtype == torch.uint8 else images.float()
    mean, std = (torch.tensor(c, device=images.device).view(-1, 1, 1) for c in ENDOSCOPY)
    return (scaled - mean) / std


def build_streams(
    images: Tensor,
    masks: Tensor | None,
    depths: Tensor | None,
    boxes: Tensor,
    names: Iterable[str],
    *,
    aperture: float | None = None,
) -> dict[str, Tensor]:
    """Make the streams of a batch.

    - ``rgb``: the whole frame;
    - ``crop``: the box grown by half its size on every side and clipped, resized to the whole
      frame, which loses the apparent size; zeros where the box is empty or outside;
    - ``loc``: the frame inside the box, zero elsewhere;
    - ``rgb_mask``: the frame and the mask;
    - ``depth``: metric depth in units of 30 mm;
    - ``relative_depth``: inverse depth, from 0 for the farthest to 1 for the nearest known pixel;
    - ``rgb_mask_depth``: frame, mask, metric depth.

    Args:
        images: (B,3,H,W) floating, normalized.
        masks: (B,1,H,W) 1 on the polyp; the boxes filled if not given.
        depths: (B,1,H,W) in mm, 0 where unknown; only streams of depth need them.
        boxes: (B,4) xmin, ymin, xmax, ymax in pixels, edges not centers.
        names: Streams to make.
        aperture: Radius of a round aperture in half sides; images are 0 outside.

    Returns:
        Name to (B,C,H,W), C as in `STREAMS`, dtype of the images.

    Raises:
        GatesError: A name is unknown, or a stream of depth is asked without depths.
    """
    names = check_streams(names, has_depth=depths is not None)
    height, width = images.shape[-2:]
    if aperture is not None:
        images = images * aperture_mask(height, width, aperture).to(images)
    filled = fill_boxes(boxes, height, width).to(images)
    masks = filled if masks is None else masks.to(images)
    metric = images.new_zeros(0) if depths is None else depths.to(images) / DEPTH_SCALE_MM
    made: dict[str, Tensor] = {}
    for name in names:
        match name:
            case "rgb":
                made[name] = images
            case "crop":
                made[name] = crop_to_boxes(images, boxes)
            case "loc":
                made[name] = images * filled
            case "rgb_mask":
                made[name] = torch.cat([images, masks], 1)
            case "depth":
                made[name] = metric
            case "relative_depth":
                made[name] = relative_inverse(metric)
            case "rgb_mask_depth":
                made[name] = torch.cat([images, masks, metric], 1)
    return made


def check_streams(names: Iterable[str], *, has_depth: bool) -> tuple[str, ...]:
    """Return the names, or raise GatesError for an unknown one or one without its depth."""
    names = tuple(names)
    for name in names:
        if name not in STREAMS:
            raise GatesError(f"stream {name!r} is unknown: choose from {', '.join(STREAMS)}")
        if name in NEEDS_DEPTH and not has_depth:
            raise GatesError(f"stream {name} needs depths, and this data has none; leave it out")
    return names


def box_geometry(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return (B,4) float32 log width, log height, center x, center y relative to the frame.

    A side counts as one pixel at least, so that an empty box stays finite.

    Args:
        boxes: (B,4) xmin, ymin, xmax, ymax in pixels.
        height: Of the frame.
        width: Of the frame.
    """
    frame = torch.tensor([width, height], dtype=torch.float32, device=boxes.device)
    low, high = boxes[:, :2].float(), boxes[:, 2:].float()
    sides = (high - low).clamp(min=1.0) / frame
    return torch.cat([sides.log(), (low + high) / (2.0 * frame)], 1)


def aperture_mask(height: int, width: int, ratio: float = 1.0) -> Tensor:
    """Return (1,1,H,W) float32, 1 inside a circle of ``ratio`` half sides around the center."""
    radius = ratio * (min(height, width) - 1) / 2.0
    y = torch.arange(height).float() - (height - 1) / 2.0
    x = torch.arange(width).float() - (width - 1) / 2.0
    return (x**2 + y[:, None] ** 2 <= radius**2).float()[None, None]


def fill_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return (B,1,H,W) float32, 1 on every pixel that a box touches."""
    first, last = _pixels(boxes)
    y = torch.arange(height, device=boxes.device)[:, None]
    x = torch.arange(width, device=boxes.device)
    inside_x = (x >= first[:, 0, None]) & (x <= last[:, 0, None])
    inside_y = (y >= first[:, 1, None, None]) & (y <= last[:, 1, None, None])
    return (inside_x[:, None] & inside_y).float()[:, None]


def crop_to_boxes(images: Tensor, boxes: Tensor, growth: float = GROWTH) -> Tensor:
    """Cut the boxes out with their surroundings and resize them to the size of the frame.

    Args:
        images: (B,C,H,W) floating.
        boxes: (B,4) xmin, ymin, xmax, ymax in pixels.
        growth: Fraction of the box's extent that is added on each side, rounded down to pixels.

    Returns:
        (B,C,H,W), bilinear with aligned corners; zeros for a box that is empty or outside.
    """
    height, width = images.shape[-2:]
    firsts, lasts = (corner.tolist() for corner in _pixels(boxes))
    crops = torch.zeros_like(images)
    for index, ((x0, y0), (x1, y1)) in enumerate(zip(firsts, lasts, strict=True)):
        if x1 < x0 or y1 < y0 or x1 < 0 or y1 < 0 or x0 >= width or y0 >= height:
            continue
        dx, dy = int(growth * (x1 - x0)), int(growth * (y1 - y0))
        rows = slice(max(0, y0 - dy), min(height, y1 + dy + 1))
        columns = slice(max(0, x0 - dx), min(width, x1 + dx + 1))
        crops[index] = F.interpolate(
            images[index : index + 1, :, rows, columns],
            size=(height, width),
            mode="bilinear",
            align_corners=True,
        )[0]
    return crops


def relative_inverse(depths: Tensor) -> Tensor:
    """Return 1/depth of (B,1,H,W), scaled to [0, 1] in each image; 0 where unknown.

    Images whose known pixels have one depth become 0.
    """
    has_depth = depths > 0
    inverse = torch.where(has_depth, 1.0 / depths.clamp(min=1e-6), 0.0)
    low = torch.where(has_depth, inverse, torch.inf).amin((1, 2, 3), keepdim=True)
    spread = inverse.amax((1, 2, 3), keepdim=True) - low
    scaled = (inverse - low) / torch.where(spread > 0, spread, 1.0)
    return torch.where(has_depth & (spread > 0), scaled, 0.0)


def _pixels(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Return first and last pixel (B,2) in x and y that a box touches; last < first if none."""
    low, high = boxes[:, :2], boxes[:, 2:]
    first, last = low.floor().long(), high.ceil().long() - 1
    return first, torch.where(high > low, last, first - 1)


def box_masks(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Fill boxes.

    Args:
        boxes: (N, 4) pixels xmin, ymin, xmax, ymax, maxima exclusive.
        height: Of the frames.
        width: Of the frames.

    Returns:
        (N, height, width) boolean: every pixel that a box touches.
    """
    corners = torch.from_numpy(np.asarray(boxes, dtype=np.float32).reshape(-1, 4))
    return fill_boxes(corners, height, width)[:, 0].numpy() > 0


def ellipse_masks(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Fill the ellipses inscribed into boxes: pixels whose center is inside.

    Arguments and result as of `box_masks`.
    """
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    xmin, ymin, xmax, ymax = (side[:, None] for side in boxes.T)
    across = ((2 * x - xmin - xmax) / np.maximum(xmax - xmin, 1e-6)) ** 2
    down = ((2 * y - ymin - ymax) / np.maximum(ymax - ymin, 1e-6)) ** 2
    return across[:, None, :] + down[:, :, None] < 1


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """Return the tight boxes (N, 4) of masks (N, H, W), zeros where a mask is empty."""
    result = np.zeros((len(masks), 4))
    for axis, (low, high) in ((1, (0, 2)), (2, (1, 3))):  # any over rows gives columns
        inside = np.asarray(masks.any(axis))
        result[:, low] = inside.argmax(1)
        result[:, high] = inside.shape[1] - inside[:, ::-1].argmax(1)
    result[~masks.any((1, 2))] = 0
    return result


class InputForm(NamedTuple):
    """The input of a network.

    Attributes:
        streams: Names, see `STREAMS`.
        size: Side length in pixels.
        aperture: Of `build_streams`.
        outline: Where the outline of lesions came from in training, see `outline_of`.
    """

    streams: tuple[str, ...]
    size: int
    aperture: float | None = None
    outline: Outline = "mask"


class NetworkInput(NamedTuple):
    """What a network reads of B frames.

    Attributes:
        streams: Name to (B,C,S,S) float32.
        geometry: (B,4) float32, see `box_geometry`.
    """

    streams: dict[str, Tensor]
    geometry: Tensor


def network_input(frames: Sequence[Frame], form: InputForm) -> NetworkInput:
    """Turn frames into a network's input, in training, evaluation and prediction alike.

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
        outlines = np.stack([outline_of(frame, form.outline) for frame in frames])
        masks = torch.from_numpy(outlines)[:, None]
    streams = build_streams(images, masks, depths, boxes, form.streams, aperture=form.aperture)
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
