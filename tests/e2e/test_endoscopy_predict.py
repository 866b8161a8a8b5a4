"""`gates endoscopy predict` and `export`: the same sizes whatever contains the frames."""

import csv
import json
import shutil
import zipfile
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from PIL import Image
from torch import nn

from endoscopy.bundles.frame_quality import fit_quality
from endoscopy.bundles.sizing_bundle import Scope, load_bundle
from endoscopy.segmenter import Segmenter

WARD = Scope("our ward", ("ward",), 6.0)
SHIPPED = Path(str(files("endoscopy"))) / "weights/synthetic/weights/configured-s0"
INDEX = "no millimeter calibration for this scope"


@pytest.fixture(scope="module")
def run(tmp_path_factory, gates_in, write):
    """A folder with four frames of different sizes, their boxes and masks, and weights."""
    gates = gates_in(tmp_path_factory.mktemp("predict"))
    here = gates.folder
    pictures = [write.picture(40 + 3 * n, 60 - 2 * n, n) for n in range(4)]
    write.images(here / "frames", pictures)
    lines = ["frame,xmin,xmax,ymin,ymax,width,height"]
    for number, image in enumerate(pictures):
        height, width = image.shape[:2]
        lines.append(f"frame_{number},{5 + number},{30 + number},4,25,{width},{height}")
        mask = np.zeros((height, width), dtype=np.uint8)
        mask[4:25, 5 + number : 30 + number] = 255
        write.images(here / "masks", [mask], [f"frame_{number}"])
    (here / "boxes.csv").write_text("\n".join(lines))
    images = write.padded(pictures)
    write.video(here / "clip.mp4", images)
    write.dicom(here / "image.dcm", images)
    write.weights(here / "ward", scope=WARD)
    write.weights(here / "synthetic")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        segmenter = Segmenter(48)
    nn.init.constant_(segmenter.head.bias, 0.0)
    segmenter.save(here / "segmenter.safetensors")
    return gates


def predict(run, source, *words, weights="ward", boxes="boxes.csv", output="out"):
    located = ("--boxes", boxes) if boxes else ()
    return run.succeed(
        "endoscopy", "predict", source, "--weights", weights, *located, "--output", output, *words
    )


def sizes(run, result):
    """The sizes of the frames in the folder that a command names last."""
    folder = run.folder / result.out.splitlines()[-1]
    return pd.read_parquet(folder / "predictions.parquet")["size_index"].to_numpy()


def real_boxes(shared, here):
    """Unpack all small real frames, made unequal in size, with their boxes."""
    source = shared / "data" / "endoscopy" / "real_frames"
    if not source.exists():
        pytest.skip(f"no real frames in {source}; set GATES_SHARED")
    with (source / "gastric_polyp_256_boxes.csv").open() as file:
        rows = list(csv.DictReader(file))
    with zipfile.ZipFile(source / "gastric_polyp_256.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))[:40]
        images = [np.asarray(Image.open(archive.open(name))) for name in names]
    images = [image[: image.shape[0] - n, : image.shape[1] - n] for n, image in enumerate(images)]
    shapes = {name: image.shape[:2] for name, image in zip(names, images, strict=True)}
    kept = [row | dict(zip(("height", "width"), shapes[row["file"]], strict=True))
            for row in rows if row["file"] in shapes]  # fmt: skip
    pd.DataFrame(kept).to_csv(here / "real.csv", index=False)
    return [name[:-4] for name in names], images


@pytest.fixture(scope="module")
def real_sizes(run, write):
    """``real_sizes(boxes)``: sizes of the shipped network on real frames, by container."""
    here = run.folder
    names, images = real_boxes(write.shared, here)
    padded = write.padded(images)
    assert len({image.shape for image in images}) > 30
    write.images(here / "real", images, names)
    write.video(here / "real_lossless.mp4", padded)
    write.video(here / "real_lossy.mp4", padded, write.crf_18)
    write.dicom(here / "real.dcm", padded)

    def found(boxes, output):
        return {
            source: sizes(run, predict(run, source, weights=SHIPPED, boxes=boxes, output=output))
            for source in ("real", "real_lossless.mp4", "real.dcm", "real_lossy.mp4")
        }

    return found


def test_real_frames_have_the_same_sizes_in_every_container(real_sizes):
    found = real_sizes("real.csv", "boxed")
    expected = found["real"]
    assert len(expected) >= 40
    assert len(set(expected)) > 30
    assert expected.std() > 0.2 * expected.mean()
    assert np.array_equal(found["real_lossless.mp4"], expected)
    assert np.array_equal(found["real.dcm"], expected)
    ratio = found["real_lossy.mp4"] / expected
    assert np.abs(ratio - 1).max() < 0.05
    assert not (ratio == 1).all()


@pytest.mark.slow
def test_real_frames_have_similar_sizes_where_the_segmenter_locates(real_sizes):
    found = real_sizes(None, "located")
    expected = found["real"]
    assert np.isfinite(expected).sum() > 30
    assert np.array_equal(found["real_lossless.mp4"], expected, equal_nan=True)
    assert np.array_equal(found["real.dcm"], expected, equal_nan=True)
    change = np.abs(found["real_lossy.mp4"] / expected - 1)
    assert np.array_equal(np.isfinite(change), np.isfinite(expected))
    assert np.nanmax(change) < 0.25
    assert np.nanmedian(change) < 0.02


def test_sizes_are_an_index_where_no_scope_is_calibrated(run):
    result = predict(run, "frames", weights="synthetic", output="index")
    assert INDEX in result.out
    assert "size index" in result.out
    assert " mm" not in result.out
    folder = run.folder / "index" / "frames"
    for name in ("predictions.csv", "objects.csv"):
        table = pd.read_csv(folder / name)
        assert set(table["note"]) == {INDEX}
        assert not [column for column in table if "mm" in column]
    assert json.loads((folder / "report.json").read_text())["scope"] is None


def test_a_named_scope_gets_millimeters_with_intervals(run):
    out = predict(run, "frames", "--scope", "ward", output="mm").out
    assert INDEX not in out
    folder = run.folder / "mm" / "frames"
    objects = pd.read_parquet(folder / "objects.parquet")
    frames = pd.read_csv(folder / "predictions.csv")
    assert len(objects) == len(frames) == 4
    np.testing.assert_allclose(objects["predicted_mm"], frames["predicted_mm"])
    half_width = load_bundle(run.folder / "ward").conformal.half_width
    np.testing.assert_allclose(np.log(objects["upper_mm"] / objects["predicted_mm"]), half_width)
    assert f"{objects['predicted_mm'][0]:.1f} mm ({objects['lower_mm'][0]:.3g} to" in out
    index = pd.read_csv(run.folder / "index" / "frames" / "predictions.csv")
    assert np.isfinite(index["size_index"]).all()


def test_masks_stand_for_boxes(run):
    result = predict(run, "clip.mp4", "--masks", "masks", boxes=None, output="masked")
    table = pd.read_parquet(run.folder / result.out.splitlines()[-1] / "predictions.parquet")
    assert (set(table["location"]), table["bbox_xmin"].tolist()) == ({"masks"}, [5, 6, 7, 8])
    objects = pd.read_csv(run.folder / "masked" / "clip" / "objects.csv")
    assert (objects["unique_id"].tolist(), objects["num_frames"].tolist()) == (["clip"], [4])


def test_what_the_segmenter_finds_is_marked_automatic(run):
    words = ("--segmenter", "segmenter.safetensors", "--overlays", 2)
    assert "automatic" in predict(run, "frames", *words, boxes=None, output="automatic").out
    folder = run.folder / "automatic" / "frames"
    assert set(pd.read_csv(folder / "predictions.csv")["location"]) == {"automatic"}
    assert len(list((folder / "overlays").iterdir())) == 2


def test_pictures_show_frames_and_polyps(run):
    predict(run, "clip.mp4", "--overlays", 3, "--strips", 1, output="drawn")
    folder = run.folder / "drawn" / "clip"
    overlays = sorted((folder / "overlays").iterdir())
    assert [path.name for path in overlays] == [f"clip_00000{n}.png" for n in (0, 2, 3)]
    drawn = np.asarray(Image.open(overlays[0]))
    assert drawn.shape[0] > 300
    assert (np.abs(drawn.astype(int) - (0, 0x72, 0xB2)).max(2) < 3).sum() > 300  # the box
    assert [path.name for path in (folder / "strips").iterdir()] == ["clip.png"]


@pytest.mark.fault("46 neighbors")
@pytest.mark.parametrize("order", [1, -1])
def test_frames_and_sources_whose_endings_alone_differ_are_told_apart(run, write, order):
    names = ["twins/a.bmp", "twins/a.png", "twins/b.png"]
    (run.folder / "twins").mkdir(exist_ok=True)
    rows = ["frame,xmin,xmax,ymin,ymax"]
    for number, name in enumerate(names):
        Image.fromarray(write.picture(40, 60, number)).save(run.folder / name)
        rows.append(f"{name[6:]},{5 + number},30,4,25")
    (run.folder / "twins.csv").write_text("\n".join([rows[0], *rows[:0:-1][::order]]))
    output = f"told_apart{order}"
    predict(run, "twins", "--overlays", 3, boxes="twins.csv", output=output)
    folder = run.folder / output / "twins"
    found = pd.read_csv(folder / "predictions.csv").set_index("frame_id")
    assert found["bbox_xmin"].to_dict() == {"a.bmp": 5, "a.png": 6, "b": 7}
    assert len(pd.read_csv(folder / "objects.csv")) == 3
    drawn = sorted(path.name for path in (folder / "overlays").iterdir())
    assert drawn == ["a.bmp.png", "a.png.png", "b.png"]
    sources = names[::order]
    words = ("--weights", "ward", "--segmenter", "segmenter.safetensors", "--output", output)
    run.succeed("endoscopy", "predict", *sources, *words)
    made = sorted(path.name for path in (run.folder / output).iterdir())
    assert made == ["a.bmp", "a.png", "b", "twins"]


def test_abstentions_are_counted_with_their_reasons(run, write):
    noise = np.random.default_rng(0).integers(0, 255, (100, 64, 64, 3)).astype(np.uint8)
    limits = fit_quality(noise, np.tile([10.0, 10.0, 30.0, 30.0], (100, 1)))
    write.weights(run.folder / "strict", quality=limits)
    out = predict(run, "frames", weights="strict", output="strict_out").out
    assert "abstained: 4 of 4 frames, 4 of 4 polyps (" in out
    assert "out of distribution 4" in out
    report = json.loads((run.folder / "strict_out/frames/report.json").read_text())
    assert report["abstentions"]["frames"]["out of distribution"] == 4
    assert report["abstentions"]["objects"] == 4


def test_the_patient_enters_the_report_and_nothing_else(run):
    pytest.importorskip("highdicom")
    words = ("--scope", "ward", "--dicom_report", "report.dcm", "--overlays", 1, "--strips", 1)
    result = predict(run, "image.dcm", *words, output="clinic")
    original = pydicom.dcmread(run.folder / "image.dcm", stop_before_pixels=True)
    report = pydicom.dcmread(run.folder / "report.dcm")
    assert report.PatientID == original.PatientID == "SECRET-ID"
    assert report.StudyInstanceUID == original.StudyInstanceUID
    (folder,) = (run.folder / "clinic").iterdir()
    assert folder.name == original.SOPInstanceUID
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert len(written) == 7
    for path in written:
        assert b"secret" not in path.read_bytes().lower()
        assert "secret" not in path.name.lower()
    assert "secret" not in result.out.lower()


def test_outputs_are_kept_resumed_or_replaced_as_asked(run):
    words = ("--overlays", 3)
    predict(run, "frames", *words, output="kept")
    folder = run.folder / "kept" / "frames"
    before = (folder / "predictions.parquet").stat().st_mtime_ns
    again = ("endoscopy", "predict", "frames", "--weights", "ward", "--boxes", "boxes.csv")
    again += ("--output", "kept", *words)
    assert "kept/frames exists: choose another --output or add --overwrite_output" in run.refuse(
        *again
    )
    assert "complete already" in run.succeed(*again, "--resume").out
    assert (folder / "predictions.parquet").stat().st_mtime_ns == before
    assert "kept/frames exists" in run.refuse(*again[:-1], 2, "--resume")
    run.succeed(*again, "--overwrite_output")
    assert (folder / "predictions.parquet").stat().st_mtime_ns > before
    assert [path.name for path in folder.parent.iterdir()] == ["frames"]


def test_a_killed_prediction_goes_on_with_its_pictures(run, monkeypatch):
    words = ("--overlays", 4, "--strips", 4)
    monkeypatch.setattr("apps.endoscopy.predict.Outputs.write_strips", interrupt)
    stopped = run(
        "endoscopy", "predict", "frames", "--weights", "ward", "--boxes", "boxes.csv",
        "--output", "killed", *words,
    )  # fmt: skip
    assert stopped.code == 130
    partial = run.folder / "killed" / ".frames.partial"
    assert [path.name for path in partial.parent.iterdir()] == [partial.name]
    drawn = {path: path.stat().st_mtime_ns for path in (partial / "overlays").iterdir()}
    monkeypatch.undo()
    (partial / "overlays" / "frame_2.png").unlink()
    assert "sizing frames" not in predict(run, "frames", "--resume", *words, output="killed").out
    folder = partial.with_name("frames")
    kept = {
        partial / "overlays" / p.name: p.stat().st_mtime_ns for p in (folder / "overlays").iterdir()
    }
    assert set(kept) == set(drawn)
    assert {path.name for path in drawn if drawn[path] != kept[path]} == {"frame_2.png"}
    assert len(list((folder / "strips").iterdir())) == 4
    expected = predict(run, "frames", *words, output="unbroken")
    for path in (run.folder / expected.out.splitlines()[-1]).rglob("*"):
        if path.is_file():
            twin = folder / path.relative_to(run.folder / "unbroken" / "frames")
            assert twin.read_bytes() == path.read_bytes()


def interrupt(*_):
    raise KeyboardInterrupt


def test_weights_of_the_run_come_before_shipped_ones(run):
    shutil.copytree(run.folder / "ward", run.folder / "runs/endoscopy/own/weights/configured-s0")
    words = ("--boxes", "boxes.csv", "--name", "own")
    result = run.succeed("endoscopy", "predict", "frames", *words)
    assert "weights: runs/endoscopy/own/weights/configured-s0" in result.out
    assert result.out.splitlines()[-1] == "runs/endoscopy/own/predictions/frames"
    (run.folder / "ours.yaml").write_text("model: {}\npredict: {scope: ward, name: own}\n")
    words = ("--config", "ours.yaml", "--boxes", "boxes.csv", "--output", "configured")
    assert " mm (" in run.succeed("endoscopy", "predict", "frames", *words).out


@pytest.fixture(scope="module")
def exported(run):
    pytest.importorskip("onnxruntime")
    return run.succeed("endoscopy", "export", "--weights", "ward", "--output", "exported")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the exporter
def test_exported_networks_agree_and_carry_their_card(run, exported):
    import onnxruntime

    assert exported.out.count("agrees with PyTorch on 1, 2, 5 frames") == 2
    folder = run.folder / "exported"
    assert {path.name for path in folder.iterdir()} == {
        "model.onnx", "model.pt2", "config.json", "README.md",
    }  # fmt: skip
    card = (folder / "README.md").read_text()
    assert "research only" in card
    assert "our ward" in card
    bundle = load_bundle(run.folder / "ward")
    generator = torch.Generator().manual_seed(1)
    frames = torch.randn(3, 4, 64, 64, generator=generator)
    geometry = torch.rand(3, 4, generator=generator)
    with torch.no_grad():
        expected = bundle.model({"rgb_mask": frames}, geometry).numpy()
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    inputs = {"rgb_mask": frames.numpy(), "geometry": geometry.numpy()}
    np.testing.assert_allclose(session.run(None, inputs)[0], expected, rtol=1e-4, atol=1e-5)
    program = torch.export.load(folder / "model.pt2").module()
    np.testing.assert_allclose(
        program(frames, geometry).detach().numpy(), expected, rtol=1e-4, atol=1e-5
    )


def test_an_export_is_replaced_only_when_asked(run, exported):
    words = ("endoscopy", "export", "--weights", "ward", "--output", "exported")
    assert "exported exists: choose another --output or add --overwrite_output" in run.refuse(
        *words
    )
    run.succeed(*words, "--formats", "[torch]", "--overwrite_output")
    assert not (run.folder / "exported" / "model.onnx").exists()
