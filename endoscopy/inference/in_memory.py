"""Frames of a table in memory, and a trained network as what predicts their sizes."""

from __future__ import annotations

import numpy as np
import torch

from core_gates.errors import GatesError
from endoscopy.bundles.building import BATCH, CARRIED
from endoscopy.bundles.contents import SizingBundle
from endoscopy.data.frames.dataset import PolypFrames, Sample, collate
from endoscopy.data.frames.transforms import Frame
from endoscopy.evaluation.frames import Frames, Predictor
from endoscopy.evaluation.masks import box_masks


def frames_of(source: PolypFrames, rows: np.ndarray) -> Frames:
    """Read some rows of a frame table into memory.

    Frames without a mask get their filled box. There are depths only if all rows have one.
    """
    read = [source.sample(int(row)).frame for row in rows]
    size = source.reader.size
    boxes = np.array([frame.box for frame in read], dtype=float).reshape(-1, 4)
    filled = box_masks(boxes, size, size)
    masks = [
        fill if frame.mask is None else frame.mask > 0
        for frame, fill in zip(read, filled, strict=True)
    ]
    depths = [frame.depth for frame in read if frame.depth is not None]
    table = source.reader.table.frames
    return Frames(
        images=np.stack([frame.image for frame in read]),
        masks=np.stack(masks),
        boxes=boxes,
        table=table.loc[rows, [c for c in CARRIED if c in table]].reset_index(drop=True),
        depths=np.stack(depths) if len(depths) == len(read) else None,
    )


def without_mask(frames: Frames) -> tuple[Frames, int]:
    """Return the frames whose mask is not empty, and the number of the others."""
    seen = np.asarray(frames.masks.any((1, 2)))
    return frames.take(seen), int((~seen).sum())


def predictor_of(bundle: SizingBundle, depth_factor: float = 1.0) -> Predictor:
    """Return a function from frames to sizes in mm.

    Args:
        bundle: Trained network.
        depth_factor: Multiplies depths, for those that are not in mm.
    """

    @torch.no_grad()
    def predict(frames: Frames) -> np.ndarray:
        if frames.images.shape[1] != bundle.image_size:
            raise GatesError(
                f"frames have {frames.images.shape[1]} pixels, the network takes"
                f" {bundle.image_size}; render or prepare them at that size"
            )
        sizes = []
        for start in range(0, len(frames), BATCH):
            stop = min(start + BATCH, len(frames))
            samples = [
                Sample(_frame(frames, row, bundle, depth_factor), 0.0, False, 0, row)
                for row in range(start, stop)
            ]
            batch = collate(samples, bundle.streams, bundle.aperture)
            raw = bundle.model(batch["streams"], batch["geometry"])
            sizes.append(bundle.target.decode(raw).double().numpy())
        return np.concatenate(sizes)

    return predict


def _frame(frames: Frames, row: int, bundle: SizingBundle, depth_factor: float) -> Frame:
    xmin, ymin, xmax, ymax = (float(side) for side in frames.boxes[row])
    mask = frames.masks[row].astype(np.uint8) if bundle.masks else None
    depth = None
    if frames.depths is not None:
        depth = (frames.depths[row] * depth_factor).astype(np.float32)
    return Frame(frames.images[row], (xmin, ymin, xmax, ymax), mask, depth)
