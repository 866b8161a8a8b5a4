"""Frames of the renderer, ready to be evaluated in memory."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from endoscopy.evaluation.features import frame_features
from endoscopy.evaluation.frames import FrameStack
from endoscopy.renderer.config import Exposure, RendererConfig
from endoscopy.renderer.objects import RenderedObjects, render_objects
from endoscopy.renderer.scene import SHAPES

CHUNK = 50  # objects in memory


def rendered_frames(rendered: RenderedObjects, *, exposure: str = "") -> FrameStack:
    """Unroll rendered objects into frames.

    Args:
        rendered: Objects.
        exposure: Written into the table.

    Returns:
        Frames whose table has unique_id, frame_id, gt, gt_minor (mm), shape, brand, distance_mm,
        exposure, and the boxes and sides of frames as in a frame table.
    """
    count = rendered.images.shape[1]
    images = rendered.images.flatten(0, 1).permute(0, 2, 3, 1).numpy()
    boxes = rendered.boxes.flatten(0, 1).numpy().astype(float)
    per_object = pd.DataFrame(
        {
            "unique_id": [f"object {number}" for number in rendered.number.tolist()],
            "gt": rendered.size_mm.double().numpy(),
            "gt_minor": rendered.size_minor_mm.double().numpy(),
            "shape": [SHAPES[shape] for shape in rendered.shape.tolist()],
            "brand": list(rendered.brand),
        }
    )
    table = per_object.loc[per_object.index.repeat(count)].reset_index(drop=True)
    table["frame_id"] = np.tile(np.arange(count), len(per_object))
    table["distance_mm"] = rendered.distance_mm.flatten().double().numpy()
    table[["bbox_xmin", "bbox_ymin", "bbox_xmax", "bbox_ymax"]] = boxes
    table[["height", "width"]] = images.shape[1:3]
    return FrameStack(
        images,
        rendered.masks.flatten(0, 1).numpy(),
        boxes,
        table.assign(exposure=exposure),
        rendered.depths.flatten(0, 1).numpy(),
    )


def rendered_features(
    config: RendererConfig,
    indices: Sequence[int],
    exposures: Sequence[Exposure] = ("fixed", "agc"),
    *,
    tick: Callable[[int], None] | None = None,
) -> dict[str, pd.DataFrame]:
    """Render objects and keep their cues alone, so that thousands need little memory.

    Args:
        config: What is rendered; its exposure does not matter.
        indices: Numbers of the objects.
        exposures: Under which the same objects are rendered.
        tick: Called repeatedly with the number of finished objects.

    Returns:
        Exposure -> :func:`frame_features`, what :func:`endoscopy.evaluation.ladder.ladder` takes.
    """
    kept: dict[str, list[pd.DataFrame]] = {exposure: [] for exposure in exposures}
    for start in range(0, len(indices), CHUNK):
        part = indices[start : start + CHUNK]
        for exposure in exposures:
            rendered = render_objects(replace(config, exposure=exposure), part)
            kept[exposure].append(frame_features(rendered_frames(rendered)))
        if tick is not None:
            tick(start + len(part))
    return {name: pd.concat(tables, ignore_index=True) for name, tables in kept.items()}
