"""Small sources of every kind, with the same frames in them."""

import os
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import MPEG4HP41, ExplicitVRLittleEndian, generate_uid

SHARED = Path(os.environ.get("GATES_SHARED", Path(__file__).parents[3].parent / "shared"))
VL_ENDOSCOPIC = "1.2.840.10008.5.1.4.1.1.77.1.1"
VIDEO_ENDOSCOPIC = "1.2.840.10008.5.1.4.1.1.77.1.1.1"
LOSSLESS = ("libx264rgb", "rgb24", {"qp": "0"})
CRF_18 = ("libx264", "yuv420p", {"crf": "18"})


@pytest.fixture(scope="session")
def real_frames():
    """The folder of real frames."""
    folder = SHARED / "data" / "endoscopy" / "real_frames"
    if not folder.exists():
        pytest.skip(f"no real frames in {folder}; set GATES_SHARED")
    return folder


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
