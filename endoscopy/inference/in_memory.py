"""Frames of a table in memory, and a trained network as a predictor of their sizes."""

from __future__ import annotations

import numpy as np

from core_gates.errors import GatesError
from endoscopy.bundles.building import BATCH, CARRIED
from endoscopy.bundles.contents import SizingBundle
from endoscopy.data.datamodule import PolypSizingDataModule
from endoscopy.data.frames.dataset import LesionDataset
from endoscopy.data.frames.network_input import Outline, outline_of
from endoscopy.data.frames.transforms import Frame
from endoscopy.evaluation.frames import FrameStack, Predictor


def frames_of(source: LesionDataset, rows: np.ndarray, outline: Outline = "mask") -> FrameStack:
    """Read some rows of a frame table into memory; there are depths only if all rows have one.

    Args:
        source: Lesions by row.
        rows: Which.
        outline: How frames without a mask are outlined, see
            :func:`endoscopy.data.frames.network_input.outline_of`.
    """
    read = [source.sample(int(row)).frame for row in rows]
    boxes = np.array([frame.box for frame in read], dtype=float).reshape(-1, 4)
    masks = [outline_of(frame, outline) > 0 for frame in read]
    depths = [frame.depth for frame in read if frame.depth is not None]
    table = source.reader.table.frames
    return FrameStack(
        images=np.stack([frame.image for frame in read]),
        masks=np.stack(masks),
        boxes=boxes,
        table=table.loc[rows, [c for c in CARRIED if c in table]].reset_index(drop=True),
        depths=np.stack(depths) if len(depths) == len(read) else None,
    )


def cue_frames(data: PolypSizingDataModule) -> tuple[FrameStack, FrameStack]:
    """Return the training and the test frames of rendered data with masks and depths."""
    source = data.variant(streams=("rgb_mask_depth",)).frames()
    train, test = (frames_of(source, data.evaluation_rows(part)) for part in ("train", "test"))
    return train, test


def without_mask(frames: FrameStack) -> tuple[FrameStack, int]:
    """Return the frames whose mask is not empty, and the number of the others."""
    seen = np.asarray(frames.masks.any((1, 2)))
    return frames.take(seen), int((~seen).sum())


def predictor_of(bundle: SizingBundle, depth_factor: float = 1.0) -> Predictor:
    """Return a function from frames to sizes in mm.

    Args:
        bundle: Trained network.
        depth_factor: Multiplies depths, for those that are not in mm.
    """

    def predict(frames: FrameStack) -> np.ndarray:
        if frames.images.shape[1] != bundle.image_size:
            raise GatesError(
                f"frames have {frames.images.shape[1]} pixels, the network takes"
                f" {bundle.image_size}; render or prepare them at that size"
            )
        sizes = []
        for start in range(0, len(frames), BATCH):
            stop = min(start + BATCH, len(frames))
            part = [_frame(frames, row, depth_factor) for row in range(start, stop)]
            raw = bundle.raw(part)
            sizes.append(bundle.target.decode(raw).double().numpy())
        return np.concatenate(sizes)

    return predict


def _frame(frames: FrameStack, row: int, depth_factor: float) -> Frame:
    xmin, ymin, xmax, ymax = (float(side) for side in frames.boxes[row])
    mask = frames.masks[row].astype(np.uint8)
    depth = None
    if frames.depths is not None:
        depth = (frames.depths[row] * depth_factor).astype(np.float32)
    return Frame(frames.images[row], (xmin, ymin, xmax, ymax), mask, depth)
