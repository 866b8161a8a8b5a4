"""All containers give the same frames, and kinds are told by content."""

import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from endoscopy.inputs.frame_sources import frames, source_kind
from endoscopy.inputs.image_files import InputReport, natural_key

BT709 = 1


def read(source, **options):
    report = InputReport()
    return list(frames(source, report, **options)), report


def test_folder_zip_video_and_dicom_hold_the_same_frames(tmp_path, pictures, write):
    images = write.padded(pictures)
    folder = write.images(tmp_path / "folder", images)
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        for file in sorted(folder.iterdir(), reverse=True):
            archive.write(file, file.name)
    video = write.video(tmp_path / "video.mp4", images)
    sources = [
        folder,
        tmp_path / "archive.zip",
        video,
        write.dicom(tmp_path / "image.dcm", images),
        write.dicom(tmp_path / "video.dcm", images, video=video),
    ]
    kinds = ["images", "images", "video", "dicom", "dicom"]
    for source, kind in zip(sources, kinds, strict=True):
        found, report = read(source)
        assert report.kind == source_kind(source) == kind
        assert (report.read, report.expected, report.unreadable) == (3, 3, [])
        assert [frame.index for frame in found] == [0, 1, 2]
        for frame, image in zip(found, images, strict=True):
            assert np.array_equal(frame.image, image)


def test_keys_are_stable_and_without_patient_data(tmp_path, pictures, write):
    images = write.padded(pictures)
    found, _ = read(write.video(tmp_path / "clip.mp4", images))
    assert [frame.key for frame in found] == ["clip_000000", "clip_000001", "clip_000002"]
    found, report = read(write.dicom(tmp_path / "Secret.dcm", images))
    uid = report.source
    assert [frame.key for frame in found] == [f"{uid}#1", f"{uid}#2", f"{uid}#3"]
    assert {frame.uid for frame in found} == {uid}
    assert "secret" not in (repr(report) + repr([frame.key for frame in found])).lower()


def test_a_folder_of_dicom_files_follows_the_instance_numbers(tmp_path, pictures, write):
    for number, image in zip((3, 1, 2), pictures, strict=True):
        write.dicom(
            tmp_path / f"{number * 7 % 5}.dcm", [image], InstanceNumber=number,
            SeriesInstanceUID="1.2.3",
        )  # fmt: skip
    found, report = read(tmp_path)
    assert [frame.image.shape for frame in found] == [pictures[i].shape for i in (1, 2, 0)]
    assert [frame.index for frame in found] == [0, 1, 2]
    assert all("#" not in frame.key for frame in found)
    assert report.expected == 3


def test_frames_come_in_natural_order_without_masks_and_depths(tmp_path, pictures, write):
    write.images(tmp_path / "1-1_frames", [pictures[0]] * 3, ["1-1_10", "1-1_9", "1-1_100"])
    write.images(tmp_path / "1-1_masks", [pictures[0]], ["1-1_9"])
    found, _ = read(tmp_path)
    assert [frame.key for frame in found] == [f"1-1_frames/1-1_{n}" for n in (9, 10, 100)]


@given(st.lists(st.integers(0, 10**6), unique=True))
def test_natural_order_is_numeric(numbers):
    names = sorted((f"a_{number}.jpg" for number in numbers), key=natural_key)
    assert names == [f"a_{number}.jpg" for number in sorted(numbers)]


def test_colors_of_a_video_follow_the_matrix_that_it_names(tmp_path, pictures, write):
    import av

    image = pictures[0]
    with av.open(str(tmp_path / "hd.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.height, stream.width = image.shape[:2]
        stream.pix_fmt = "yuv444p"
        stream.codec_context.colorspace = BT709
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        container.mux(stream.encode(frame.reformat(format="yuv444p", dst_colorspace="ITU709")))
        container.mux(stream.encode())
    found, _ = read(tmp_path / "hd.mp4")
    assert np.abs(found[0].image.astype(int) - image).mean() < 1.5


def test_dicom_in_ybr_becomes_rgb(tmp_path, pictures, write):
    image = pictures[0]
    ybr = np.asarray(Image.fromarray(image).convert("YCbCr"))
    path = write.dicom(tmp_path / "ybr.dcm", [ybr], photometric="YBR_FULL")
    found, _ = read(path)
    assert np.abs(found[0].image.astype(int) - image).max() <= 3
    assert np.abs(ybr.astype(int) - image).max() > 50


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_dicom_in_gray_becomes_rgb(tmp_path, pictures, write, photometric):
    gray = pictures[0][..., 0].astype(np.uint16) << 4
    path = write.dicom(
        tmp_path / "gray.dcm", [gray], photometric=photometric, BitsAllocated=16, BitsStored=12,
        HighBit=11,
    )  # fmt: skip
    found, report = read(path)
    expected = pictures[0][..., 0]
    expected = 255 - expected if photometric == "MONOCHROME1" else expected
    assert all(np.array_equal(found[0].image[..., c], expected) for c in range(3))
    assert report.converted == {"12-bit to 8-bit": 1, "grayscale to RGB": 1}


def test_images_of_any_mode_become_rgb(tmp_path, pictures):
    color, gray = pictures[0], pictures[0][..., 0]
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "1.png")
    Image.fromarray(gray).save(tmp_path / "2.png")
    Image.fromarray(color).convert("RGBA").save(tmp_path / "3.png")
    Image.fromarray(color).save(tmp_path / "4.png")
    found, report = read(tmp_path)
    assert all(frame.image.dtype == np.uint8 for frame in found)
    for frame, expected in zip(
        found, [gray[..., None], gray[..., None], color, color], strict=True
    ):
        assert np.array_equal(frame.image, np.broadcast_to(expected, frame.image.shape))
    assert report.converted == {"16-bit to 8-bit": 1, "grayscale to RGB": 1, "RGBA to RGB": 1}


def test_a_single_image_is_a_source(tmp_path, pictures, write):
    folder = write.images(tmp_path, pictures[:1])
    found, report = read(folder / "frame_0.png")
    assert [frame.key for frame in found] == ["frame_0"]
    assert report.read == 1


def test_real_frames_are_read(real_frames):
    found, report = read(real_frames / "gastric_polyp_original")
    assert report.read == len(found) == 24
    assert {frame.image.shape[2] for frame in found} == {3}
