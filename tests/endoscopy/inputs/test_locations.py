"""Annotations find their frames, and mean the same in every container."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.linalg import block_diag

from core_gates.errors import GatesError
from endoscopy.data.readers.real_colon import VocAnnotation, VocObject, write_voc
from endoscopy.inputs.frame_sources import frames
from endoscopy.inputs.image_files import InputReport, stated_part, trim_black
from endoscopy.inputs.locations import CsvLocations, MaskLocations, VocLocations, lesions_of

BOXES = [(10.0, 30.0, 5.0, 25.0), (3.0, 20.0, 8.0, 31.0), (20.0, 44.0, 2.0, 30.0)]


def located(source, locations, trim=False, scope=None):
    report = InputReport()
    found = []
    for frame in frames(source, report):
        if frame.index == 0:
            locations.begin(report, scope)
        found.append(locations.locate(frame, trim=trim)[:2])
    locations.finish(report)
    return found


def csv_text(images, names, boxes=BOXES, size=True):
    lines = ["file,xmin,xmax,ymin,ymax" + (",width,height" if size else "")]
    for name, box, image in zip(names, boxes, images, strict=True):
        sizes = [image.shape[1], image.shape[0]] if size else []
        lines.append(",".join(map(str, (name, *box, *sizes))))
    return "\n".join(lines) + "\n"


@pytest.fixture
def sources(tmp_path, pictures, write):
    """The same three frames in every container; the frames of videos are padded to one size."""
    folder = write.images(tmp_path / "folder", pictures)
    images = write.padded(pictures)
    video = write.video(tmp_path / "video.mp4", images)
    return [folder, video, write.dicom(tmp_path / "image.dcm", images)]


def assert_same(found, pictures, boxes=BOXES):
    for (image, lesions), picture, box in zip(found, pictures, boxes, strict=True):
        assert np.array_equal(image, picture)
        assert [lesion.box for lesion in lesions] == [box]


def test_boxes_are_the_same_in_all_containers(tmp_path, pictures, sources):
    names = ["frame_0.png", "frame_1.png", "frame_2.png"]
    (tmp_path / "boxes.csv").write_text(csv_text(pictures, names))
    for source in sources:
        assert_same(located(source, CsvLocations(tmp_path / "boxes.csv")), pictures)


def test_boxes_find_frames_by_name_and_number(tmp_path, pictures, sources):
    _, video, dicom = sources
    for names in (["0", "1", "2"], ["video_000000", "video_000001", "video_000002"]):
        order = [2, 0, 1]
        shuffled = csv_text(
            [pictures[i] for i in order], [names[i] for i in order], [BOXES[i] for i in order]
        )
        (tmp_path / "boxes.csv").write_text(shuffled)
        assert_same(located(video, CsvLocations(tmp_path / "boxes.csv")), pictures)
    uid = next(frames(dicom)).key.partition("#")[0]
    (tmp_path / "boxes.csv").write_text(csv_text(pictures, [f"{uid}#{n}" for n in (1, 2, 3)]))
    assert_same(located(dicom, CsvLocations(tmp_path / "boxes.csv")), pictures)


def test_padding_is_found_without_stated_sizes_too(tmp_path, pictures, sources):
    names = ["frame_0", "frame_1", "frame_2"]
    (tmp_path / "boxes.csv").write_text(csv_text(pictures, names, size=False))
    for source in sources:
        assert_same(located(source, CsvLocations(tmp_path / "boxes.csv"), trim=True), pictures)


def test_padding_all_around_is_found_too(tmp_path, pictures, write):
    (tmp_path / "boxes.csv").write_text(csv_text(pictures[:1], ["frame_0"], BOXES[:1]))
    framed = [np.pad(pictures[0], ((3, 4), (6, 7), (0, 0)), constant_values=80)]
    folder = write.images(tmp_path / "folder", framed)
    part = CsvLocations(tmp_path / "boxes.csv").locate(next(frames(folder)), trim=True)
    assert np.array_equal(part.image, pictures[0])
    assert part.lesions[0].box == BOXES[0]
    assert (part.left, part.top) == (6, 3)


def test_a_frame_made_even_is_padded_whatever_the_color_of_its_edge(pictures):
    image = pictures[1]
    even = np.pad(image, ((0, 1), (0, 1), (0, 0)), mode="edge")
    assert np.array_equal(stated_part(even, (51, 47))[0], image)


def test_boxes_that_cannot_be_matched_in_order_are_refused(tmp_path, pictures, sources, refuses):
    (tmp_path / "boxes.csv").write_text(csv_text(pictures[:2], ["a", "b"], BOXES[:2]))
    refuses(
        GatesError,
        (
            "names 2 frames, none of them of video, which has 3",
            lambda: located(sources[1], CsvLocations(tmp_path / "boxes.csv")),
        ),
        (
            r"none of its 2 frames is in folder \(for one, .* 'a'\)",
            lambda: located(sources[0], CsvLocations(tmp_path / "boxes.csv")),
        ),
    )


@pytest.mark.fault("46 neighbors")
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "frame,xmin,xmax,ymin,ymax\na,10,5,60,5,12,0,60,0\n",
            "line 2: it has 9 cells, expected 5",
        ),
        ("frame,xmin,xmin,xmax,ymin,ymax\na,1,9,30,2,40\n", "two columns named 'xmin'"),
        ("frame,xmin,bbox_xmin,xmax,ymin,ymax\na,1,9,30,2,40\n", "columns xmin and bbox_xmin;"),
    ],
)
def test_cells_of_boxes_that_would_be_lost_are_refused(text, words, tmp_path, refused):
    (tmp_path / "boxes.csv").write_text(text)
    refused(rf"boxes.csv.*{words}", CsvLocations, tmp_path / "boxes.csv")


@pytest.mark.fault("46 neighbors")
@pytest.mark.parametrize("names", [("p1/a.png", "p2/a.png"), ("a.png", "a.bmp")])
def test_a_box_that_two_frames_could_have_is_refused(names, tmp_path, pictures, refused):
    for name, picture in zip(names, pictures, strict=False):
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "source" / name)
    (tmp_path / "boxes.csv").write_text("frame,xmin,xmax,ymin,ymax\na.png,10,30,12,40\n")
    last = sorted(names)[1].removesuffix(".png" if "/" in names[0] else "")
    refused(
        rf"'a' names two frames, the second is {last}: name",
        located,
        tmp_path / "source",
        CsvLocations(tmp_path / "boxes.csv"),
    )
    rows = [f"{name},{xmin},30,12,40" for xmin, name in enumerate(sorted(names), 1)]
    for text in ("\n".join(rows), "\n".join(rows[::-1])):
        (tmp_path / "boxes.csv").write_text(f"frame,xmin,xmax,ymin,ymax\n{text}\n")
        found = located(tmp_path / "source", CsvLocations(tmp_path / "boxes.csv"))
        assert [[lesion.box[0] for lesion in lesions] for _, lesions in found] == [[1], [2]]


@pytest.mark.fault("46 neighbors")
def test_masks_whose_endings_alone_differ_are_those_of_two_frames(tmp_path, pictures):
    for folder in ("source", "masks"):
        (tmp_path / folder).mkdir()
        for number, ending in enumerate(("bmp", "png"), 1):
            drawn = np.zeros(pictures[0].shape[:2], np.uint8)
            drawn[4 * number : 20, 4:20] = 255
            Image.fromarray(drawn).save(tmp_path / folder / f"a.{ending}")
    found = located(tmp_path / "source", MaskLocations(tmp_path / "masks"))
    assert [[lesion.box[2] for lesion in lesions] for _, lesions in found] == [[4], [8]]


def test_several_lesions_on_a_frame_keep_their_names(tmp_path, pictures, write):
    folder = write.images(tmp_path / "folder", pictures)
    rows = ["frame_id,bbox_xmin,bbox_xmax,bbox_ymin,bbox_ymax,unique_id"]
    rows += ["frame_0,1,10,1,10,a", "frame_0,20,40,20,30,b", "frame_2,5,15,5,15,b"]
    (tmp_path / "boxes.csv").write_text("\n".join(rows))
    locations = CsvLocations(tmp_path / "boxes.csv")
    found = located(folder, locations)
    assert [[lesion.name for lesion in lesions] for _, lesions in found] == [["a", "b"], [], ["b"]]
    assert locations.report.count("frame without a location") == 1


def test_faulty_boxes_are_counted_and_repaired(tmp_path, pictures, write):
    folder = write.images(tmp_path / "folder", pictures)
    rows = ["frame,xmin,xmax,ymin,ymax,width,height"]
    rows += ["frame_0,30,10,25,5,56,40"]  # swapped
    rows += ["frame_0,-5,10,5,400,56,40"]  # beyond the frame
    rows += ["frame_0,60,80,5,10,56,40"]  # outside
    rows += ["frame_0,nan,10,5,10,56,40", "frame_0,abc,10,5,10,56,40", ",1,10,5,10,56,40"]
    rows += ["frame_1,6,40,16,62,102,94"]  # the annotated frame was twice as large
    rows += ["gone,1,10,5,10,56,40"]
    (tmp_path / "boxes.csv").write_text("\n".join(rows))
    locations = CsvLocations(tmp_path / "boxes.csv")
    boxes = [lesion.box for _, lesions in located(folder, locations) for lesion in lesions]
    assert boxes == [(10, 30, 5, 25), (0, 10, 5, 40), (3, 20, 8, 31)]
    counts = {reason: len(places) for (_, reason), places in locations.report.findings.items()}
    assert counts == {
        "row without a frame or with a corner that is no number": 3,
        "box with swapped corners": 1,
        "box clipped to the frame": 2,
        "box below 16 square pixels": 1,
        "location rescaled to the size of the frame": 1,
        "frame without a location": 1,
        "annotation without a frame": 1,
    }
    assert locations.report.found - locations.report.total("excluded") == len(boxes)


def test_voc_round_trip(tmp_path, pictures, sources):
    folder = tmp_path / "annotations"
    folder.mkdir()
    for number, (image, box) in enumerate(zip(pictures, BOXES, strict=True)):
        lesions = (VocObject("lesion", "001-001_1", "1", box),)
        height, width = image.shape[:2]
        write_voc(folder / f"frame_{number}.xml", VocAnnotation(width, height, lesions))
    for source in sources:
        found = located(source, VocLocations(folder))
        assert_same(found, pictures)
        assert {lesion.name for _, lesions in found for lesion in lesions} == {"001-001_1"}


def test_masks_round_trip(tmp_path, pictures, sources, write):
    masks = []
    for image, (xmin, xmax, ymin, ymax) in zip(pictures, BOXES, strict=True):
        mask = np.zeros(image.shape[:2], dtype=bool)
        mask[int(ymin) : int(ymax), int(xmin) : int(xmax)] = True
        mask[int(ymin), int(xmin)] = False  # not only a box
        masks.append(mask)
    write.images(tmp_path / "masks", [255 * mask.astype(np.uint8) for mask in masks])
    for source in sources:
        found = located(source, MaskLocations(tmp_path / "masks"))
        assert_same(found, pictures)
        for (_, lesions), mask in zip(found, masks, strict=True):
            assert np.array_equal(lesions[0].mask, mask)


def test_a_mask_of_another_size_is_rescaled_and_counted(tmp_path, pictures, write):
    folder = write.images(tmp_path / "folder", pictures[:1])
    mask = np.zeros((80, 112), dtype=np.uint8)
    mask[20:40, 30:60] = 255
    locations = MaskLocations(write.images(tmp_path / "masks", [mask]))
    [(_, [lesion])] = located(folder, locations)
    assert lesion.box == (15, 30, 10, 20)
    assert np.array_equal(lesion.mask, mask[::2, ::2] > 0)
    assert locations.report.count("location rescaled to the size of the frame") == 1


def test_a_far_polyp_is_no_noise(sources, pictures, tmp_path):
    folder = tmp_path / "masks"
    folder.mkdir()
    for number, height in enumerate((2, 6, 0)):
        mask = np.zeros(pictures[number].shape[:2], dtype=np.uint8)
        mask[4 : 4 + height, 10:13] = 255
        mask[30, 40] = 255 if height else 0
        Image.fromarray(mask).save(folder / f"frame_{number}.png")
    rendered = MaskLocations(folder)
    first, second, third = located(sources[0], rendered, scope="synthetic")
    assert [lesion.box for lesion in first[1]] == [(10, 13, 4, 6)]
    assert [lesion.box for lesion in second[1]] == [(10, 13, 4, 10)]
    assert not third[1]
    assert not rendered.report.count("box below 16 square pixels")
    real = MaskLocations(folder)
    assert [len(lesions) for _, lesions in located(sources[0], real)] == [0, 1, 0]
    assert real.report.count("box below 16 square pixels") == 1
    assert not lesions_of(np.pad(np.ones((2, 3), dtype=bool), 5))
    parts = lesions_of(block_diag(np.ones((4, 5)), 0, np.ones((6, 7))) > 0)
    assert [(part.box, part.mask.sum()) for part in parts] == [
        ((6, 13, 5, 11), 42),
        ((0, 5, 0, 4), 20),
    ]


@given(st.integers(0, 20), st.integers(0, 20), st.integers(30, 256), st.integers(0, 10**6))
def test_padding_never_changes_what_is_trimmed(right, bottom, brightest, seed):
    image = np.random.default_rng(seed).integers(0, brightest, (9, 8, 3)).astype(np.uint8)
    padded = np.pad(image, ((0, bottom), (0, right), (0, 0)))
    (plain, offset), (trimmed, same) = trim_black(image), trim_black(padded)
    if (image > 10).any():
        assert np.array_equal(plain, trimmed)
        assert offset == same
    part, offset = stated_part(padded, (8, 9))
    assert np.array_equal(part, image)
    assert offset == (0, 0)


def test_lossy_coding_moves_no_edge_of_a_black_border(tmp_path, pictures, write):
    """Colors bleed into padding that begins at an odd row or column."""
    framed = [np.pad(image, ((3, 4), (7, 5), (0, 0))) for image in pictures]
    (padded,) = {image.shape for image in write.padded(framed)}
    video = write.video(tmp_path / "video.mp4", write.padded(framed), write.crf_18)
    for frame, image in zip(frames(video), pictures, strict=True):
        assert frame.image.shape == padded
        assert frame.image[3 + image.shape[0], 7:-12].max() > 10
        part, offset = trim_black(frame.image)
        assert part.shape == image.shape
        assert offset == (7, 3)


def test_an_enlarged_frame_is_not_taken_for_a_padded_one(pictures):
    image = pictures[0]
    for size in ((28, 20), (112, 80), (56, 80), (56, 40)):
        part, offset = stated_part(image, size)
        assert part is image
        assert offset == (0, 0)
