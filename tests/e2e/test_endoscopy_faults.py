"""Faulty inputs of ``gates endoscopy``: refused in one line, or counted, and nothing is lost."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from endoscopy.bundles.sizing_bundle import Scope
from endoscopy.segmenter import Segmenter

OBJECTS, FRAMES = 12, 12
BOMB = '<!DOCTYPE a [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><annotation>&b;</annotation>'
GOOD = ("--boxes", "boxes.csv")
WARD = ("--weights", "ward")


@pytest.fixture(scope="module")
def run(tmp_path_factory, gates_in, write):
    """A folder with good sources, tables and weights, and faulty ones next to them."""
    gates = gates_in(tmp_path_factory.mktemp("faults"))
    here = gates.folder
    pictures = [write.picture(40 + n % 3, 60 - n % 2, n) for n in range(3)]
    write.images(here / "frames", pictures)
    write.images(here / "other/frames", pictures)
    images = write.padded(pictures)
    write.video(here / "clip.mp4", images)
    write.dicom(here / "image.dcm", images)
    write.weights(here / "ward", scope=Scope("our ward", ("ward",)))
    _sources(here, write, pictures)
    _locations(here, write, pictures)
    _weights(here, write)
    _tables(here)
    (here / "typo.yaml").write_text("predict: {overlay: 3}\n")
    gates.succeed("endoscopy", "predict", "frames", *GOOD, *WARD, "--output", "taken")
    return gates


def _sources(here, write, pictures):
    (here / "empty").mkdir()
    (here / "empty.mp4").write_bytes(b"")
    (here / "text.mp4").write_text("no video")
    content = (here / "clip.mp4").read_bytes()
    (here / "cut.mp4").write_bytes(content[: len(content) // 2])
    write.header().save_as(here / "no_pixels.dcm", enforce_file_format=True)
    report = write.header("1.2.840.10008.5.1.4.1.1.88.33")
    report.save_as(here / "report.dcm", enforce_file_format=True)
    content = write.dicom(here / "cut.dcm", write.padded(pictures)).read_bytes()
    (here / "cut.dcm").write_bytes(content[:-9000])
    write.images(here / "few", pictures)
    _truncated(here / "few" / "partial.jpg")
    write.images(here / "many", [write.picture(40, 60, n) for n in range(101)])
    _truncated(here / "many" / "partial.jpg")
    write.images(here / "deep", pictures)
    gray = pictures[1].mean(2)
    Image.fromarray(np.rint(gray * 257).astype(np.uint16)).save(here / "deep" / "frame_1.png")
    Image.fromarray(np.rint(gray).astype(np.uint8)).save(here / "deep" / "frame_2.png")


def _truncated(path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:1500])


def _locations(here, write, pictures):
    header = "frame,xmin,xmax,ymin,ymax"
    good = [f"frame_{n},{5 + n},{30 + n},4,25" for n in range(3)]
    files = {
        "boxes": good,
        "swapped": [good[0], "frame_1,31,6,25,4", good[2]],
        "nan_row": [*good, "frame_1,nan,30,4,25", ",5,30,4,25"],
        "all_nan": ["frame_0,nan,30,4,25"],
        "outside": [good[0], "frame_1,40,90,-8,25", "frame_2,200,220,4,25"],
        "foreign": ["case_7,5,30,4,25"],
        "unused": [*good, "frame_9,5,30,4,25"],
        "some": good[:2],
        "unordered": good[::-1],
        "two_of_three": [line.replace("frame", "other") for line in good[:2]],
        "many": [f"frame_{n},5,30,4,25" for n in range(101)],
    }
    for name, lines in files.items():
        (here / f"{name}.csv").write_text("\n".join([header, *lines]))
    (here / "no_column.csv").write_text("frame,xmin,xmax,ymin\nframe_0,1,2,3\n")
    (here / "binary.csv").write_bytes(b"\xff\xfe\x00\x01")
    masks = [np.zeros(p.shape[:2], np.uint8) for p in pictures]
    for number, mask in enumerate(masks):
        mask[4:25, 5 + number : 30 + number] = 255
    write.images(here / "masks", masks)
    write.images(here / "larger_masks", [masks[0], masks[1].repeat(2, 0).repeat(2, 1), masks[2]])
    for name, texts in (("hostile", [BOMB] * 3), ("partly_hostile", [BOMB, VOC, VOC])):
        (here / name).mkdir()
        for number, text in enumerate(texts):
            (here / name / f"frame_{number}.xml").write_text(text)


VOC = """<annotation><size><width>59</width><height>41</height></size><object><name>polyp</name>
<bndbox><xmin>6</xmin><xmax>31</xmax><ymin>4</ymin><ymax>25</ymax></bndbox></object></annotation>"""


def _weights(here, write):
    write.weights(here / "partial")
    content = (here / "partial/model.safetensors").read_bytes()
    (here / "partial/model.safetensors").write_bytes(content[: len(content) // 2])
    write.weights(here / "no_json")
    (here / "no_json/config.json").write_text('{"format"')
    write.weights(here / "later")
    (here / "later/config.json").write_text('{"format": 99}')
    Segmenter(32).save(here / "segmenter.safetensors")
    (here / "no_segmenter.safetensors").write_bytes(b"\0" * 64)


def _tables(here):
    rows = []
    for index in range(OBJECTS):
        for frame in range(FRAMES - index // 2):
            path = here / "table" / f"{index}_{frame}.jpg"
            path.parent.mkdir(exist_ok=True)
            pixels = np.full((48, 64, 3), 40 + 3 * index, np.uint8)
            pixels[frame : frame + 20, 10:30] = 200
            Image.fromarray(pixels).save(path)
            rows.append({
                "database": "SUN", "unique_id": f"case{index}", "frame_id": frame,
                "bbox_xmin": 10, "bbox_xmax": 30, "bbox_ymin": frame, "bbox_ymax": frame + 20,
                "width": 64, "height": 48, "frame_path": str(path), "gt": 3 + index,
            })  # fmt: skip
    good = pd.DataFrame(rows).astype(object)
    folds = pd.DataFrame({
        "unique_id": [f"case{index}" for index in range(OBJECTS)],
        "gt": [3 + index for index in range(OBJECTS)],
        "kfold_id": [index % 4 for index in range(OBJECTS)],
    })  # fmt: skip
    folds.to_csv(here / "folds.csv", index=False)
    folds.sample(frac=1.0, random_state=1).to_csv(here / "folds_shuffled.csv", index=False)
    leaking = pd.concat([folds, folds.iloc[[4]].assign(kfold_id=3)])
    leaking.to_csv(here / "folds_leaking.csv", index=False)
    folds.assign(unique_id="stranger" + folds["unique_id"]).to_csv(
        here / "folds_foreign.csv", index=False
    )
    for name, change in TABLES.items():
        change(good.copy(), here).to_csv(here / f"table_{name}.csv", index=False)


def changed_row(row, **values):
    def change(table, here):
        table.loc[row, list(values)] = list(values.values())
        return table

    return change


def changed_object(number, **values):
    def change(table, here):
        table.loc[table["unique_id"] == f"case{number}", list(values)] = list(values.values())
        return table

    return change


def partial_images(count):
    def change(table, here):
        for row in range(count):
            path = here / "table" / f"partial_{count}_{row}.jpg"
            path.write_bytes(Path(table["frame_path"][row]).read_bytes()[:400])
            table.loc[row, "frame_path"] = str(path)
        return table

    return change


TABLES = {
    "good": lambda table, here: table,
    "shuffled": lambda table, here: table.sample(frac=1.0, random_state=2),
    "nan_size": changed_object(2, gt="NaN"),
    "censored": changed_object(11, gt="15mm-"),
    "size_in_words": changed_object(3, gt="small"),
    "swapped": changed_row(5, bbox_xmin=30, bbox_xmax=10),
    "nan_box": changed_row(5, bbox_xmin="nan"),
    "outside": changed_row(5, bbox_xmin=-12),
    "tiny": changed_row(5, bbox_xmax=11, bbox_ymax=9),
    "other_size": changed_row(5, width=128, height=96, bbox_xmin=20, bbox_xmax=60),
    "partial": partial_images(1),
    "many_partial": partial_images(3),
    "single": lambda table, here: table.drop(index=range(1, FRAMES)),
    "twice": lambda table, here: pd.concat([table, table.iloc[[7]]]),
    "two_sizes": changed_row(5, gt=9),
    "no_column": lambda table, here: table.drop(columns="bbox_ymax"),
    "no_size": lambda table, here: table.assign(gt=""),
}


def predict(*words):
    return ("predict", *words)


def prepare(table, folds="folds.csv", fold=0):
    return (
        "prepare", "--config", "unit", "--name", "prepared", "--data.synthetic", "null",
        "--data.cache_folder", "null", "--data.table", f"table_{table}.csv",
        "--data.split", "file", "--data.split_file", folds, "--data.fold", str(fold),
    )  # fmt: skip


REFUSED = {
    "misspelled verb": (("predikt",), r"did you mean predict\?"),
    "misspelled option": (
        predict("frames", "--boxs", "boxes.csv"),
        r"unrecognized arguments: --boxs boxes.csv \(did you mean --boxes\?\)",
    ),
    "no source": (predict(*GOOD), "nothing is given for SOURCES"),
    "value of a wrong type": (
        predict("frames", *GOOD, "--overlays", "many"),
        "overlays: expected int, found 'many'",
    ),
    "negative number": (
        predict("frames", *GOOD, "--overlays=-1"),
        "--overlays must be at least 0, found -1",
    ),
    "wrong key in a configuration": (
        predict("frames", *GOOD, "--config", "typo.yaml"),
        r"unknown key 'overlay' in typo.yaml \(did you mean overlays\?\)",
    ),
    "missing configuration": (
        predict("frames", *GOOD, "--config", "unti"),
        "configuration 'unti' found neither in .* unit",
    ),
    "missing source": (predict("absent.mp4", *GOOD), "absent.mp4: does not exist; check the path"),
    "empty folder": (predict("empty", *GOOD), "empty: holds no image and no DICOM file"),
    "zero-byte video": (predict("empty.mp4", *GOOD), r"empty.mp4: is empty \(0 bytes\)"),
    "text as video": (
        predict("text.mp4", *GOOD),
        "text.mp4: holds text, expected images, a video or DICOM",
    ),
    "cut video": (predict("cut.mp4", *GOOD), "cut.mp4: cannot be opened as a video|cannot be read"),
    "truncated JPEG among few": (
        predict("few", *GOOD),
        r"1 of 4 frames cannot be read, at most 1 % may \(first partial: .*; repair or remove",
    ),
    "DICOM without pixels": (
        predict("no_pixels.dcm", *GOOD),
        r"no_pixels.dcm: holds no pixels \(VL Endoscopic Image Storage\)",
    ),
    "DICOM without an image": (
        predict("report.dcm", *GOOD),
        "report.dcm: is Comprehensive SR Storage, expected an endoscopic image or video",
    ),
    "cut DICOM": (predict("cut.dcm", *GOOD), "frames cannot be read|cannot be read as DICOM"),
    "two sources of one name": (
        predict("frames", "other/frames", *GOOD),
        "frames and other/frames have the same name frames",
    ),
    "boxes and masks": (
        predict("frames", *GOOD, "--masks", "masks"),
        "boxes boxes.csv and masks masks, expected one of them",
    ),
    "missing boxes": (predict("frames", "--boxes", "absent.csv"), "absent.csv: does not exist"),
    "boxes that are not a table": (
        predict("frames", "--boxes", "binary.csv"),
        "binary.csv, line 1: byte .* is not UTF-8",
    ),
    "boxes without a column": (
        predict("frames", "--boxes", "no_column.csv"),
        "no_column.csv: lacks the columns ymax; found frame, xmin, xmax, ymin",
    ),
    "no box is finite": (
        predict("frames", "--boxes", "all_nan.csv"),
        "all_nan.csv: none of its 1 rows is a box; correct the numbers",
    ),
    "boxes of other frames": (
        predict("frames", "--boxes", "foreign.csv"),
        "none of its 1 frames is in frames .*'case_7'.*; name frames as the source does",
    ),
    "fewer boxes than frames of a video": (
        predict("clip.mp4", "--boxes", "two_of_three.csv"),
        "names 2 frames, none of them of clip, which has 3; number the frames from 0",
    ),
    "hostile XML": (
        predict("frames", "--boxes", "hostile"),
        "hostile: none of its files can be read: .*(document type|DOCTYPE|entit)",
    ),
    "folder without masks": (predict("frames", "--masks", "empty"), "empty: holds no mask"),
    "missing weights": (
        predict("frames", *GOOD, "--weights", "absent"),
        "absent: has no config.json; name a folder of weights",
    ),
    "truncated weights": (
        predict("frames", *GOOD, "--weights", "partial"),
        "partial: cannot be loaded: .*; copy it again",
    ),
    "damaged configuration of weights": (
        predict("frames", *GOOD, "--weights", "no_json"),
        "no_json: cannot be loaded: JSONDecodeError",
    ),
    "weights of a later version": (
        predict("frames", *GOOD, "--weights", "later"),
        "later: has format 99, expected 3; install the version",
    ),
    "no weights at all": (
        predict("frames", *GOOD, "--config", "unit"),
        "no weights in runs/endoscopy/unit/weights .* train them with `gates endoscopy fit",
    ),
    "damaged segmenter": (
        predict("frames", "--segmenter", "no_segmenter.safetensors"),
        "no_segmenter.safetensors: holds no segmenter: .*; train or copy it again",
    ),
    "segmenter with boxes": (
        predict("frames", *GOOD, "--segmenter", "segmenter.safetensors"),
        "--segmenter is not used with --boxes or --masks",
    ),
    "scope that only rendered frames have": (
        predict("frames", *GOOD, "--scope", "synthetic"),
        "frames: has no manifest.json that declares its frames synthetic",
    ),
    "report of a folder": (
        predict("frames", *GOOD, "--scope", "ward", "--dicom_report", "sr.dcm"),
        "frames: is no DICOM source; a structured report needs its study",
    ),
    "report without millimeters": (
        predict("image.dcm", *GOOD, "--dicom_report", "sr.dcm"),
        "no millimeter calibration for this scope, and a structured report holds millimeters",
    ),
    "report of two sources": (
        predict("frames", "clip.mp4", *GOOD, "--dicom_report", "sr.dcm"),
        "--dicom_report needs exactly one source, found 2",
    ),
    "existing output": (
        predict("frames", *GOOD, "--output", "taken"),
        "taken/frames exists: choose another --output or add --overwrite_output",
    ),
    "resume and overwrite": (
        predict("frames", *GOOD, "--resume", "--overwrite_output"),
        "--resume and --overwrite_output exclude each other",
    ),
    "export to an existing folder": (
        ("export", "--output", "taken"),
        "taken exists: choose another --output or add --overwrite_output",
    ),
    "export of an unknown format": (
        ("export", "--formats", "[tflite]"),
        "formats: expected .*onnx.*torch.*, found",
    ),
    "export of nothing": (("export", "--formats", "[]"), "--formats is empty: give onnx"),
    "object in two folds": (
        prepare("good", "folds_leaking.csv"),
        "case4 is in the folds 0 and 3|case4.*two folds|object case4 .*folds",
    ),
    "folds of other objects": (
        prepare("good", "folds_foreign.csv"),
        "assigns none of the 12 objects, such as case0",
    ),
    "fold that does not exist": (prepare("good", fold=7), "fold 7 of .*: choose one of 0 to 3"),
    "more objects than there are": (
        (
            "fit",
            "--config",
            "unit",
            "--name",
            "new",
            "--data.synthetic",
            "null",
            "--data.cache_folder",
            "null",
            "--data.table",
            "table_good.csv",
            "--data.train_objects",
            "500",
        ),
        "objects cannot give 500 for training",
    ),
    "missing table": (prepare("absent"), "table_absent.csv does not exist: name another"),
    "table without a column": (prepare("no_column"), "lacks the columns bbox_ymax; add them"),
    "table without sizes": (prepare("no_size"), "none of [0-9]+ rows can be used: size is missing"),
    "duplicate frames": (
        prepare("twice"),
        "object case0 has two rows of frame 7 .* expected one box of an object on a frame",
    ),
    "object of two sizes": (prepare("two_sizes"), "object case0 has two sizes, 3.0 and 9.0"),
    "many truncated JPEG": (
        prepare("many_partial"),
        "3 of [0-9]+ files cannot be read, more than 1 %, the first is .*partial_3_0.jpg",
    ),
}


CLAIMS = "more objects than there are"
MARKED = {CLAIMS: pytest.param(CLAIMS, marks=pytest.mark.fault("endoscopy D17"))}


@pytest.mark.parametrize("fault", [MARKED.get(fault, fault) for fault in REFUSED])
def test_a_faulty_call_is_one_line(fault, run, faulty_inputs):
    words, expected = REFUSED[fault]
    given = " ".join(words)
    if words[0] in ("predict", "export") and "--weights" not in words and "unit" not in given:
        words = (*words, *WARD)
    faulty_inputs({fault: (("endoscopy", *words), expected)}, run=run, folder=run.folder)


COUNTED = {
    "swapped corners": (
        ("frames", "--boxes", "swapped.csv"), "repaired 1: box with swapped corners", 3, 3,
    ),
    "NaN in boxes": (
        ("frames", "--boxes", "nan_row.csv"),
        r"excluded 2: row without a frame or with a corner that is no number \(line 5, line 6\)",
        5,
        3,
    ),
    "boxes outside": (
        ("frames", "--boxes", "outside.csv"), "repaired 2: box clipped to the frame", 3, 2,
    ),
    "boxes beyond the frame": (
        ("frames", "--boxes", "outside.csv"), "excluded 1: box below 16 square pixels", 3, 2,
    ),
    "boxes in another order": (("frames", "--boxes", "unordered.csv"), "3 rows, 3 kept", 3, 3),
    "box of no frame": (
        ("frames", "--boxes", "unused.csv"),
        r"noted 1: annotation without a frame \(frame_9\)",
        3,
        3,
    ),
    "frame without a box": (
        ("frames", "--boxes", "some.csv"),
        r"noted 1: frame without a location \(frame_2\)",
        2,
        2,
    ),
    "mask of another size": (
        ("frames", "--masks", "larger_masks"),
        "repaired 1: location rescaled to the size of the frame",
        3,
        3,
    ),
    "hostile XML among good": (
        ("frames", "--boxes", "partly_hostile"), r"excluded 1: .*partly_hostile/frame_0.xml", 3, 2,
    ),
    "truncated JPEG among many": (("many", "--boxes", "many.csv"), "skipped partial: ", 101, 101),
    "16-bit PNG": (("deep", *GOOD), "1 frames: 16-bit to 8-bit", 3, 3),
    "gray PNG": (("deep", *GOOD), "1 frames: grayscale to RGB", 3, 3),
}  # fmt: skip


@pytest.mark.parametrize("fault", COUNTED)
def test_what_predict_repairs_or_leaves_out_is_counted(fault, run):
    words, expected, found, kept = COUNTED[fault]
    name = re.sub(r"\W+", "_", fault)
    result = run.succeed("endoscopy", "predict", *words, *WARD, "--output", name)
    assert re.search(expected, result.out), result.out
    (folder,) = (run.folder / name).iterdir()
    table = pd.read_csv(folder / "predictions.csv")
    assert len(table) == kept
    report = json.loads((folder / "report.json").read_text())["locations"]
    assert (report["found"], report["kept"]) == (found, kept)
    if fault in ("swapped corners", "NaN in boxes", "boxes in another order"):
        good = pd.read_csv(run.folder / "taken/frames/predictions.csv")
        assert table["size_index"].tolist() == good["size_index"].tolist()


READ = {
    "good": ("114 rows, 114 kept", 114),
    "nan_size": (r"excluded 11: size is missing \(case2 frame 0", 103),
    "size_in_words": (r"excluded 11: size cannot be read \(case3 frame 0", 103),
    "censored": ("114 rows, 114 kept", 114),
    "swapped": (r"repaired 1: corners of the box were swapped \(case0 frame 5\)", 114),
    "nan_box": (r"excluded 1: a corner of the box is no number \(case0 frame 5\)", 113),
    "outside": (r"repaired 1: box clipped to the frame \(case0 frame 5\)", 114),
    "tiny": (r"excluded 1: less than 16 square pixels .* \(case0 frame 5\)", 113),
    "other_size": (r"repaired 1: box rescaled, .* \(case0 frame 5\)", 114),
    "partial": (r"excluded 1: image .*partial_1_0.jpg", 113),
    "single": ("103 rows, 103 kept", 103),
}


@pytest.mark.parametrize("fault", READ)
def test_what_prepare_repairs_or_leaves_out_is_counted(fault, run):
    expected, kept = READ[fault]
    result = run.succeed("endoscopy", *prepare(fault))
    assert re.search(expected, result.out), result.out
    folder = run.folder / "runs/endoscopy/prepared"
    table = pd.read_parquet(folder / "frames.parquet")
    report = json.loads((folder / "read_report.json").read_text())
    assert len(table) == report["kept"] == kept
    excluded = sum(f["count"] for f in report["findings"] if f["action"] == "excluded")
    assert report["found"] - excluded == kept
    row = table[(table["unique_id"] == "case0") & (table["frame_id"] == 5)]
    if fault in ("swapped", "other_size"):
        assert row[["bbox_xmin", "bbox_xmax"]].to_numpy().tolist() == [[10, 30]]
    if fault == "outside":
        assert row[["bbox_xmin", "bbox_xmax"]].to_numpy().tolist() == [[0, 30]]
    censored = table.loc[table["unique_id"] == "case11", ["gt", "censored"]].drop_duplicates()
    assert censored.to_numpy().tolist() == [[15.0, True] if fault == "censored" else [14.0, False]]


def test_rows_of_tables_may_differ_in_order(run):
    splits = {}
    for table, folds in (
        ("good", "folds.csv"), ("good", "folds_shuffled.csv"), ("shuffled", "folds.csv"),
    ):  # fmt: skip
        out = run.succeed("endoscopy", *prepare(table, folds)).out
        (line,) = [line for line in out.splitlines() if line.startswith("split ")]
        splits[table, folds] = line.partition(": ")[2]
    assert len(set(splits.values())) == 1
    assert "test 3 objects, 30 frames" in splits["good", "folds.csv"]
