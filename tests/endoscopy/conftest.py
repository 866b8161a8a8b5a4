from pathlib import Path

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, default_collate

from endoscopy.data.frame_table import FrameTable
from endoscopy.models import tiny_resnet

GOLDEN = Path(__file__).parents[1] / "golden" / "endoscopy"


@pytest.fixture(scope="session")
def vectors():
    """``vectors(NAME)``: the arrays of a file of golden vectors; text stays text."""

    def load(name):
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            text = {k: v.tolist() for k, v in arrays.items() if v.dtype.kind == "U"}
            return text | {k: torch.from_numpy(arrays[k]) for k in arrays if k not in text}

    return load


@pytest.fixture(scope="session")
def own_name():
    """Renames the tensors of the published networks to ours."""

    def rename(name, stream="rgb"):
        for old, new in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            name = name.replace(f"fsag_rgb_{old}", f"{new}.gate.logits")
        for trunk in ("rgb", "mask", "depth"):
            for k in range(1, 5):
                name = name.replace(
                    f"fsag_{trunk}_layer{k}", f"branches.{trunk}.layer{k}.gate.logits"
                )
        name = name.replace("fsag_L1", "head.gate1.logits").replace("fsag_L2", "head.gate2.logits")
        for layer in ("fc2.", "fc3."):
            if name.startswith(layer):
                return f"head.{name}"
        if name.startswith(("branches.", "head.gate")):
            return name
        if name.startswith("head."):
            return name.replace("head.", "head.fc.")
        return f"branches.{stream}.{name}"

    return rename


class Frames(L.LightningDataModule):
    """Random frames in memory, three of each object, whose brightness tells the size."""

    def __init__(self, num_objects=8, batch_size=6, size=32, shuffle=False, dtype=torch.float32):
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        mm = torch.linspace(2, 20, num_objects).repeat_interleave(3)
        noise = torch.randn(len(mm), 3, size, size, generator=draw, dtype=torch.float64)
        self.frames = [
            {
                "streams": {"rgb": (0.5 * noise[i] + (mm[i] / 8).log()).to(dtype)},
                "geometry": torch.zeros(4),
                "size_mm": mm[i],
                "censored": torch.tensor(i >= len(mm) - 3),
                "object": torch.tensor(i // 3),
                "frame": torch.tensor(i),
            }
            for i in range(len(mm))
        ]
        self.batch_size, self.shuffle = batch_size, shuffle

    def train_dataloader(self):
        return DataLoader(self.frames, batch_size=self.batch_size, shuffle=self.shuffle)

    def val_dataloader(self):
        return DataLoader(self.frames, batch_size=self.batch_size)

    predict_dataloader = val_dataloader

    def batch(self, *rows):
        return default_collate([self.frames[row] for row in rows or range(self.batch_size)])


@pytest.fixture(scope="session")
def frames():
    """``frames(**changes)``: a data module in memory."""
    return Frames


@pytest.fixture(scope="session")
def small_sizer():
    """``small_sizer(**changes)``: a ResNet of 7 k weights with dropout in its head."""

    def build(seed=0, dropout=0.0, **changes):
        torch.manual_seed(seed)
        options = {"widths": [4, 4, 8, 8, 8]}
        model = tiny_resnet(("rgb",), trunk_options=options, hidden_dim=8, **changes)
        model.head.fc2 = nn.Sequential(model.head.fc2, nn.Dropout(dropout))
        return model

    return build


@pytest.fixture(scope="session")
def make_table():
    """``make_table(sizes, frames=3)``: objects of these sizes, one patient each, no images."""

    def build(sizes, frames=3, *, patients=None, database="SYNTH", **columns):
        rows = [
            {
                "database": database,
                "unique_id": name,
                "frame_id": frame,
                "bbox_xmin": 10.0,
                "bbox_xmax": 30.0,
                "bbox_ymin": 5.0,
                "bbox_ymax": 25.0,
                "width": 64,
                "height": 48,
                "frame_path": f"$SYNTHETIC_PATH/{name}_{frame}.jpg",
                "gt": float(mm),
                "patient": (patients or {}).get(name, name),
            }
            for name, mm in sizes.items()
            for frame in range(frames)
        ]
        return FrameTable(pd.DataFrame(rows).assign(**columns))

    return build
