"""Faulty sources: one line that says what was found, or a count, and never a traceback."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom.uid import generate_uid

from core_gates.errors import GatesError
from endoscopy.inputs.boxes import CsvLocations, VocLocations
from endoscopy.inputs.frame_sources import frames
from endoscopy.inputs.image_files import InputReport
from endoscopy.inputs.locations import MaskLocations

BOMB = '<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;">]><annotation>&b;</annotation>'
OUTSIDE = '<!DOCTYPE a [<!ENTITY a SYSTEM "file:///etc/passwd">]><annotation>&a;</annotation>'


@pytest.fixture
def folder(tmp_path, pictures, write):
    return write.images(tmp_path / "folder", pictures)


def truncated_jpeg(folder, write, pictures):
    Image.fromarray(pictures[0]).save(folder / "a.jpg")
    content = (folder / "a.jpg").read_bytes()
    (folder / "a.jpg").write_bytes(content[: len(content) // 2])
    return folder


def no_image_at_all(folder, write, pictures):
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n rubbish")
    return folder


def empty_image(folder, write, pictures):
    (folder / "a.jpg").write_bytes(b"")
    return folder


def image_bomb(folder, write, pictures):
    Image.new("1", (8_100, 8_100)).save(folder / "a.png")
    return folder


def empty_folder(folder, write, pictures):
    (folder / "empty").mkdir()
    return folder / "empty"


def absent(folder, write, pictures):
    return folder / "absent"


def empty_video(folder, write, pictures):
    (folder / "a.mp4").write_bytes(b"")
    return folder / "a.mp4"


def text_as_video(folder, write, pictures):
    (folder / "a.mp4").write_text("no video")
    return folder / "a.mp4"


def text_as_dicom(folder, write, pictures):
    (folder / "a.dcm").write_text("notes of the examination")
    return folder / "a.dcm"


def noise_as_dicom(folder, write, pictures):
    (folder / "a.dcm").write_bytes(bytes(range(256)) * 8)
    return folder / "a.dcm"


def cut_video(folder, write, pictures):
    path = write.video(folder / "a.mp4", write.padded(pictures))
    path.write_bytes(path.read_bytes()[:1000])
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
    path.write_bytes(path.read_bytes()[:-9000])
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
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def archive_of_damaged_directory(folder, write, pictures):
    path = archive(folder)
    path.write_bytes(path.read_bytes().replace(b"PK\x01\x02", b"XXXX"))
    return path


def archive(folder):
    return Path(shutil.make_archive(str(folder.parent / "frames"), "zip", folder))


FAULTS = {
    truncated_archive: r"zip: is a damaged or truncated zip archive \(File is not a zip.*copy it",
    archive_of_damaged_directory: r"zip: is a damaged or truncated zip archive \(Bad magic",
    truncated_jpeg: r"1 of 4 frames cannot be read, at most 1 % may \(first a: .*[Tt]runcated",
    no_image_at_all: "1 of 4 frames cannot be read",
    empty_image: "first a: the file is empty",
    image_bomb: "first a: 8100 x 8100 pixels are more than any frame has",
    empty_folder: "holds no image and no DICOM file",
    absent: "does not exist",
    empty_video: r"is empty \(0 bytes\)",
    text_as_video: "holds text, expected images, a video or DICOM",
    text_as_dicom: "is named like DICOM and holds none",
    noise_as_dicom: "is named like DICOM and holds none",
    cut_video: "cannot be opened as a video",
    sound_only: "holds no video stream",
    dicom_without_pixels: r"holds no pixels \(VL Endoscopic Image Storage\)",
    dicom_report: "is Comprehensive SR Storage, expected an endoscopic image",
    dicom_cut_off: r"frames cannot be read|cannot be read as DICOM",
    dicom_without_instance: "lacks SOPInstanceUID",
}


@pytest.mark.filterwarnings("ignore:The pixel data length")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_faulty_source_is_refused_in_one_line(fault, folder, write, pictures):
    with pytest.raises(GatesError, match=FAULTS[fault]) as caught:
        list(frames(fault(folder, write, pictures)))
    message = str(caught.value)
    assert "\n" not in message
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


def test_one_percent_of_unreadable_frames_is_accepted(tmp_path, pictures):
    for number in range(100):
        Image.fromarray(pictures[0][:8, :8]).save(tmp_path / f"{number}.png")
    (tmp_path / "50.png").write_bytes(b"")
    assert len(list(frames(tmp_path))) == 99
    (tmp_path / "51.png").write_bytes(b"")
    with pytest.raises(GatesError, match="2 of 100 frames"):
        list(frames(tmp_path))


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
    "binary csv": (binary_csv, "cannot be read as CSV"),
    "absent csv": (lambda path: CsvLocations(path / "no.csv"), "cannot be read as CSV"),
    "no xml": (VocLocations, "holds no .xml file"),
    "no masks": (MaskLocations, "holds no mask"),
    "absent masks": (lambda path: MaskLocations(path / "no"), "does not exist"),
}


@pytest.mark.parametrize("fault", LOCATION_FAULTS)
def test_faulty_locations_are_refused_in_one_line(fault, tmp_path):
    make, expected = LOCATION_FAULTS[fault]
    with pytest.raises(GatesError, match=expected) as caught:
        make(tmp_path)
    assert "\n" not in str(caught.value)


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


def test_an_unreadable_mask_is_counted(tmp_path, folder):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "frame_0.png").write_bytes(b"no mask")
    Image.fromarray(np.full((47, 51), 255, dtype=np.uint8)).save(tmp_path / "masks" / "frame_1.png")
    locations, report = MaskLocations(tmp_path / "masks"), InputReport()
    found = [len(locations.locate(frame, trim=False)[1]) for frame in frames(folder, report)]
    locations.finish(report)
    assert found == [0, 1, 0]
    assert len(locations.report.unreadable) == 1


def test_a_video_damaged_in_the_middle_is_counted(tmp_path, write):
    generator = np.random.default_rng(0)
    images = list(generator.integers(0, 255, (12, 64, 64, 3)).astype(np.uint8))
    path = write.video(tmp_path / "a.mp4", images)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20_000] = b"\xff" * 20_000
    path.write_bytes(content)
    with pytest.raises(GatesError, match="of 12 frames cannot be read"):
        list(frames(path))
    report = InputReport()
    found = list(frames(path, report, max_unreadable=1.0))
    assert 0 < len(found) < 12
    assert report.read == len(found)
    assert len(report.unreadable) >= 1
    assert np.array_equal(found[0].image, images[0])


def test_missing_pydicom_names_the_extra():
    script = "import sys; sys.modules['pydicom'] = None; import endoscopy.inputs.frame_sources"
    command = [sys.executable, "-c", script]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    last = finished.stderr.strip().splitlines()[-1]
    assert last.endswith("MissingExtraError: endoscopy needs pydicom: pip install '.[endoscopy]'")
