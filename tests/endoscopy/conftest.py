import os
from pathlib import Path
from types import SimpleNamespace

import av
import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import MPEG4HP41, ExplicitVRLittleEndian, generate_uid
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


SHARED = Path(os.environ.get("GATES_SHARED", Path(__file__).parents[2].parent / "shared"))
VL_ENDOSCOPIC = "1.2.840.10008.5.1.4.1.1.77.1.1"
VIDEO_ENDOSCOPIC = "1.2.840.10008.5.1.4.1.1.77.1.1.1"
LOSSLESS = ("libx264rgb", "rgb24", {"qp": "0"})
CRF_18 = ("libx264", "yuv420p", {"crf": "18"})


@pytest.fixture(scope="session")
def shared():
    """The shared data of endoscopy; skips where it is absent."""
    folder = SHARED / "data" / "endoscopy"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: set GATES_SHARED")
    return folder


@pytest.fixture(scope="session")
def real_frames(shared):
    """The folder of real frames."""
    return shared / "real_frames"


@pytest.fixture(scope="session")
def write():
    """``write.images``, ``write.video``, ``write.dicom``, ``write.padded``: make sources."""
    return SimpleNamespace(
        images=write_images, video=write_video, dicom=write_dicom, padded=padded, header=header,
        lossless=LOSSLESS, crf_18=CRF_18,
    )  # fmt: skip


def write_images(folder, images, names=None):
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in zip(
        names or map("frame_{}".format, range(len(images))), images, strict=True
    ):
        Image.fromarray(image).save(folder / f"{name}.png")
    return folder


def padded(images):
    """Pad with black at the right and at the bottom to one even size."""
    height, width = (-(-side // 2) * 2 for side in np.max([i.shape[:2] for i in images], axis=0))
    return [
        np.pad(image, ((0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0)))
        for image in images
    ]


def write_video(path, images, coding=LOSSLESS):
    codec, pixels, options = coding
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pixels
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def header(sop_class=VL_ENDOSCOPIC, syntax=ExplicitVRLittleEndian):
    dataset, meta = Dataset(), FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID = sop_class
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    dataset.file_meta = meta
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = generate_uid(), generate_uid()
    dataset.PatientName, dataset.PatientID = "Secret^Name", "SECRET-ID"
    dataset.PatientBirthDate, dataset.PatientSex = "19600101", "F"
    dataset.StudyID, dataset.AccessionNumber = "1", "SECRET-ACCESSION"
    dataset.StudyDate, dataset.StudyTime = "20200101", "120000"
    dataset.ReferringPhysicianName = "Secret^Doctor"
    dataset.Modality, dataset.SeriesNumber, dataset.InstanceNumber = "ES", 1, 1
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    return dataset


def write_dicom(path, images, *, photometric="RGB", video=None, **changes):
    """Write frames uncompressed, or encapsulate a video file that holds them."""
    kind, syntax = (
        (VIDEO_ENDOSCOPIC, MPEG4HP41) if video else (VL_ENDOSCOPIC, ExplicitVRLittleEndian)
    )
    dataset = header(kind, syntax)
    dataset.Rows, dataset.Columns = images[0].shape[:2]
    dataset.NumberOfFrames = len(images)
    dataset.SamplesPerPixel = 3 if images[0].ndim == 3 else 1
    if dataset.SamplesPerPixel == 3:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = "YBR_PARTIAL_420" if video else photometric
    if video:
        dataset.PixelData = encapsulate([Path(video).read_bytes()])
    else:
        pixels = np.stack(images).tobytes()
        dataset.PixelData = pixels + bytes(len(pixels) % 2)
    for name, value in changes.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture
def pictures():
    """Smooth colored frames of three sizes, bright up to their edges."""
    return [picture(*size, seed) for seed, size in enumerate([(40, 56), (47, 51), (33, 60)])]


def picture(height, width, seed=0):
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    channels = []
    for _ in range(3):
        a, b, phase = generator.uniform(0.05, 0.25, 3)
        channels.append(128 + 70 * np.sin(a * x + b * y + 20 * phase))
    return np.stack(channels, axis=-1).astype(np.uint8)
