import numpy as np
import pandas as pd
import pytest

from endoscopy.data.streams import boxes_of
from endoscopy.evaluation.rendered_frames import FrameStack

SIDE = 48


def draw_disks(objects, frames=4, *, rho=0.0, seed=0, first=0):
    """Lit disks before a wall, seen through a pinhole: extent ~ d / r, radiance ~ 1 / r²."""
    draws = np.random.default_rng(seed)
    gt = np.exp(draws.uniform(np.log(2), np.log(20), objects))
    base = np.exp(draws.uniform(np.log(12), np.log(30), objects)) * (gt / 6.3) ** rho
    size = gt.repeat(frames)
    distance = base.repeat(frames) * np.exp(draws.normal(0, 0.05, len(size)))
    radius = 0.9 * SIDE * size / distance / 2
    center = draws.uniform(0.4, 0.6, (2, len(size), 1, 1)) * SIDE
    grid = np.arange(SIDE) + 0.5
    masks = (grid[:, None] - center[0]) ** 2 + (grid - center[1]) ** 2 <= radius[:, None, None] ** 2
    row, column = center[:, :, 0, 0].astype(int)
    masks[np.arange(len(size)), row, column] = True
    depths = np.where(masks, distance[:, None, None], 60.0).astype(np.float32)
    light = np.clip(40 / depths**2 * np.where(masks, 1, 1.05), 0, 1.5)
    shown = (1.15 * light / (0.35 + light)) ** (1 / 1.4)
    images = np.repeat((255 * shown.clip(0, 1)).round().astype(np.uint8)[..., None], 3, -1)
    table = pd.DataFrame(
        {
            "unique_id": [f"o{first + i}" for i in np.arange(objects).repeat(frames)],
            "frame_id": np.tile(np.arange(frames), objects),
            "gt": size,
            "distance_mm": distance,
        }
    )
    boxes = boxes_of(masks)
    table[["bbox_xmin", "bbox_ymin", "bbox_xmax", "bbox_ymax"]] = boxes
    table[["width", "height"]] = SIDE
    return FrameStack(images, masks, boxes, table, depths)


@pytest.fixture(scope="session")
def disks():
    return draw_disks


def objects_with_error(count, error, *, seed=0, shift=0.0, low=2.0, high=20.0):
    draws = np.random.default_rng(seed)
    gt = np.exp(draws.uniform(np.log(low), np.log(high), count))
    predicted = gt * np.exp(shift + error * draws.normal(size=count))
    return pd.DataFrame(
        {"unique_id": [f"o{i}" for i in range(count)], "gt": gt, "predicted_mm": predicted}
    )


@pytest.fixture(scope="session")
def noisy_objects():
    return objects_with_error
