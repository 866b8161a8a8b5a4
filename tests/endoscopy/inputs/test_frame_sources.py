"""All containers give the same frames, and kinds are told by content."""

import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom.uid import generate_uid

from endoscopy.inputs.frame_sources import frames, source_kind
from endoscopy.inputs.image_files import InputReport
from endoscopy.inputs.locations import CsvLocations, MaskLocations, VocLocations

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
    for source, kind in zip(sources, ["images", "images", "video", "dicom", "dicom"], strict=True):
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
    found, _ = read(write.dicom(tmp_path / "ybr.dcm", [ybr], photometric="YBR_FULL"))
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


BOMB = '<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;">]><annotation>&b;</annotation>'
OUTSIDE = '<!DOCTYPE a [<!ENTITY a SYSTEM "file:///etc/passwd">]><annotation>&a;</annotation>'


@pytest.fixture
def folder(tmp_path, pictures, write):
    return write.images(tmp_path / "folder", pictures)


def holding(name, content):
    """A folder or, where its name is that of a video or of DICOM, a file of this content."""

    def fault(folder, write, pictures):
        (folder / name).write_bytes(content)
        return folder if name.endswith(("png", "jpg")) else folder / name

    return fault


def truncated_jpeg(folder, write, pictures):
    Image.fromarray(pictures[0]).save(folder / "a.jpg")
    os.truncate(folder / "a.jpg", (folder / "a.jpg").stat().st_size // 2)
    return folder


def image_bomb(folder, write, pictures):
    Image.new("1", (8_100, 8_100)).save(folder / "a.png")
    return folder


def cut_video(folder, write, pictures):
    path = write.video(folder / "a.mp4", write.padded(pictures))
    os.truncate(path, 1000)
    return path


def sound_only(folder, write, pictures):
    import wave

    with wave.open(str(folder / "a.wav"), "wb") as sound:
        sound.setnchannels(1), sound.setsampwidth(2), sound.setframerate(8000)
        sound.writeframes(bytes(1600))
    return folder / "a.wav"


def dicom_without_pixels(folder, write, pictures):
    write.header().save_as(folder / "a.dcm", enforce_file_format=True)
    return folder / "a.dcm"


def dicom_report(folder, write, pictures):
    write.header("1.2.840.10008.5.1.4.1.1.88.33").save_as(
        folder / "a.dcm", enforce_file_format=True
    )
    return folder / "a.dcm"


def dicom_cut_off(folder, write, pictures):
    path = write.dicom(folder / "a.dcm", write.padded(pictures))
    os.truncate(path, path.stat().st_size - 9000)
    return path


def dicom_without_instance(folder, write, pictures):
    dataset = write.header()
    dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    del dataset.SOPInstanceUID
    dataset.preamble = bytes(128)
    dataset.save_as(folder / "a.dcm")
    return folder / "a.dcm"


def truncated_archive(folder, write, pictures):
    path = archive(folder)
    os.truncate(path, path.stat().st_size // 2)
    return path


def archive_of_damaged_directory(folder, write, pictures):
    path = archive(folder)
    path.write_bytes(path.read_bytes().replace(b"PK\x01\x02", b"XXXX"))
    return path


def archive(folder):
    return Path(shutil.make_archive(str(folder.parent / "frames"), "zip", folder))


FAULTS = {
    "truncated archive": (
        truncated_archive,
        r"zip: is a damaged or truncated zip archive \(File is not a zip.*copy it",
    ),
    "archive of a damaged directory": (
        archive_of_damaged_directory,
        r"zip: is a damaged or truncated zip archive \(Bad magic",
    ),
    "truncated JPEG": (
        truncated_jpeg,
        r"1 of 4 frames cannot be read, at most 1 % may \(first a: .*[Tt]runcated",
    ),
    "no image at all": (
        holding("a.png", b"\x89PNG\r\n\x1a\n rubbish"),
        "1 of 4 frames cannot be read",
    ),
    "empty image": (holding("a.jpg", b""), "first a: the file is empty"),
    "image bomb": (image_bomb, "first a: 8100 x 8100 pixels are more than any frame has"),
    "empty folder": (
        lambda folder, *_: shutil.rmtree(folder) or folder.mkdir() or folder,
        "holds no image and no DICOM file",
    ),
    "absent": (lambda folder, *_: folder / "absent", "does not exist"),
    "empty video": (holding("a.mp4", b""), r"is empty \(0 bytes\)"),
    "text as video": (
        holding("a.mp4", b"no video"),
        "holds text, expected images, a video or DICOM",
    ),
    "text as DICOM": (holding("a.dcm", b"my notes"), "is named like DICOM and holds none"),
    "noise as DICOM": (
        holding("a.dcm", bytes(range(256)) * 8),
        "is named like DICOM and holds none",
    ),
    "cut video": (cut_video, "cannot be opened as a video"),
    "sound only": (sound_only, "holds no video stream"),
    "DICOM without pixels": (
        dicom_without_pixels,
        r"holds no pixels \(VL Endoscopic Image Storage\)",
    ),
    "DICOM report": (
        dicom_report,
        "is Comprehensive SR Storage, expected an endoscopic image",
    ),
    "DICOM cut off": (dicom_cut_off, r"frames cannot be read|cannot be read as DICOM"),
    "DICOM without instance": (dicom_without_instance, "lacks SOPInstanceUID"),
}


@pytest.mark.filterwarnings("ignore:The pixel data length")
@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_source_is_refused_in_one_line(fault, folder, write, pictures, refused):
    damage, words = FAULTS[fault]
    message = refused(words, lambda: list(frames(damage(folder, write, pictures))))
    assert len(message) < 400
    assert "secret" not in message.lower()


def test_unreadable_frames_are_counted_where_allowed(folder, write, pictures):
    report = InputReport()
    found = list(frames(truncated_jpeg(folder, write, pictures), report, max_unreadable=0.3))
    assert [frame.key for frame in found] == ["frame_0", "frame_1", "frame_2"]
    assert [frame.index for frame in found] == [1, 2, 3]
    assert (report.read, report.expected) == (3, 4)
    assert [key for key, _ in report.unreadable] == ["a"]
    assert any("skipped a: " in line for line in report.lines())


def test_one_percent_of_unreadable_frames_is_accepted(tmp_path, pictures, refused):
    for number in range(100):
        Image.fromarray(pictures[0][:8, :8]).save(tmp_path / f"{number}.png")
    (tmp_path / "50.png").write_bytes(b"")
    assert len(list(frames(tmp_path))) == 99
    (tmp_path / "51.png").write_bytes(b"")
    refused("2 of 100 frames", list, frames(tmp_path))


def boxes(text):
    def make(path):
        (path / "boxes.csv").write_text(text)
        return CsvLocations(path / "boxes.csv")

    return make


def binary_csv(path):
    (path / "boxes.csv").write_bytes(b"\xff\xfe\x00\x01")
    return CsvLocations(path / "boxes.csv")


LOCATION_FAULTS = {
    "no columns": (boxes("frame,xmin\na,1\n"), "lacks the columns xmax, ymin, ymax"),
    "empty csv": (boxes(""), "lacks the columns frame, .*; found none"),
    "only NaN": (boxes("frame,xmin,xmax,ymin,ymax\na,nan,1,2,3\n"), "none of its 1 rows is a box"),
    "binary csv": (binary_csv, "byte .* is not UTF-8"),
    "absent csv": (lambda path: CsvLocations(path / "no.csv"), "cannot be read: No such file"),
    "no xml": (VocLocations, "holds no .xml file"),
    "no masks": (MaskLocations, "holds no mask"),
    "absent masks": (lambda path: MaskLocations(path / "no"), "does not exist"),
}


@pytest.mark.parametrize("fault", LOCATION_FAULTS)
def test_faulty_locations_are_refused_in_one_line(fault, tmp_path, refused):
    make, expected = LOCATION_FAULTS[fault]
    refused(expected, make, tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (BOMB, "document type"),
        (OUTSIDE, "document type"),
        ("<annotation>", "no XML"),
        ("", "no XML"),
        ("<svg/>", "expected a Pascal VOC"),
        ("<a>" * 40, "nests"),
    ],
)
def test_hostile_xml_is_counted_and_harmless(tmp_path, folder, write, content, reason):
    (tmp_path / "xml").mkdir()
    (tmp_path / "xml" / "frame_0.xml").write_text(content)
    good = "<annotation><object><bndbox><xmin>1</xmin><xmax>9</xmax><ymin>1</ymin><ymax>9</ymax>"
    (tmp_path / "xml" / "frame_1.xml").write_text(good + "</bndbox></object></annotation>")
    locations, report = VocLocations(tmp_path / "xml"), InputReport()
    found = [len(locations.locate(frame, trim=False)[1]) for frame in frames(folder, report)]
    locations.finish(report)
    assert found == [0, 1, 0]
    assert any(reason in line for line in locations.report.lines())
    assert len(locations.report.unreadable) == 1


def test_a_video_damaged_in_the_middle_is_counted(tmp_path, write, refused):
    images = list(np.random.default_rng(0).integers(0, 255, (12, 64, 64, 3)).astype(np.uint8))
    path = write.video(tmp_path / "a.mp4", images)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20_000] = b"\xff" * 20_000
    path.write_bytes(content)
    refused("of 12 frames cannot be read", list, frames(path))
    report = InputReport()
    found = list(frames(path, report, max_unreadable=1.0))
    assert 0 < len(found) < 12
    assert report.read == len(found)
    assert len(report.unreadable) >= 1
    assert np.array_equal(found[0].image, images[0])
