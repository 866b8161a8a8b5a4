"""The page of ``gates endoscopy demo`` in a real browser, and that it sends nothing elsewhere."""

import os
import re
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from apps.endoscopy.demo_clip import MOST_FRAMES, Clip, measure, read_clip, rendered_clip
from core_gates.errors import GatesError
from endoscopy.bundles.sizing_bundle import Scope, load_bundle
from endoscopy.segmenter import SHIPPED, Segmenter, load_segmenter

WEIGHTS = Path(str(files("endoscopy"))) / "weights"

WATCH = """
import socket
def watched(name):
    true = getattr(socket.socket, name)
    def call(self, address, *rest):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
            open({log!r}, "a").write(f"{{address}}\\n")
        return true(self, address, *rest)
    return call
for name in ("connect", "connect_ex"):
    setattr(socket.socket, name, watched(name))
asked = socket.getaddrinfo
def answer(host, *rest, **options):
    if host not in (None, "127.0.0.1", "localhost", "::1", "0.0.0.0"):
        open({log!r}, "a").write(f"{{host}}\\n")
    return asked(host, *rest, **options)
socket.getaddrinfo = answer
"""
BOX = (150, 250, 110, 190)  # xmin, xmax, ymin, ymax


@pytest.fixture(scope="module")
def run(tmp_path_factory, gates_in, write):
    """A folder with weights, a segmenter, a frame and a clip."""
    gates = gates_in(tmp_path_factory.mktemp("demo"))
    here = gates.folder
    write.weights(here / "ward", scope=Scope("our ward", ("ward", "synthetic"), 6.0))
    Segmenter(32).save(here / "segmenter.safetensors")
    pictures = [write.picture(360, 480, seed) for seed in range(4)]
    write.images(here, pictures[:1], ["frame"])
    write.video(here / "clip.mp4", write.padded(pictures[1:]))
    (here / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n rubbish")
    return gates


@pytest.fixture(scope="module")
def server(run, chromium, demo_pages):
    """The command in a separate process; yields its address."""
    here = run.folder
    (here / "site").mkdir()
    (here / "site/sitecustomize.py").write_text(WATCH.format(log=str(here / "asked.txt")))
    paths = os.pathsep.join([str(here / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = ["--weights", "ward", "--segmenter", "segmenter.safetensors"]
    with demo_pages.served(
        here, os.environ | {"PYTHONPATH": paths}, "endoscopy", "demo", *words
    ) as address:
        yield address


@pytest.fixture(scope="module")
def page(server, chromium, demo_pages):
    """The page in a headless browser."""
    with demo_pages.opened(server, chromium, 1000) as page:
        yield page


def drop(page, path):
    before = (
        page.locator("#frame img").get_attribute("src")
        if page.query_selector("#frame img")
        else None
    )
    page.set_input_files("#drop input[type=file]", str(path))
    page.wait_for_function(
        "old => { const i = document.querySelector('#frame img');"
        " return i && i.complete && i.src !== old }",
        arg=before,
    )


def remove(page):
    page.click("#drop button[aria-label='Clear'], #drop button[title='Clear']")


def corner(page, x, y, answer):
    settle(page)
    page.locator("#frame img").click(position={"x": x, "y": y}, force=True)
    page.get_by_text(answer).wait_for()


def settle(page):
    """Wait until the picture has not changed for half a second."""
    before = None
    while before != (before := page.locator("#frame img").get_attribute("src")):
        page.wait_for_timeout(500)


def measured(page):
    page.click("#go")
    page.wait_for_selector("#card .interval")
    return page.inner_text("#card")


def expected(run, source, boxes):
    pd.DataFrame(boxes).to_csv(run.folder / "drawn.csv", index=False)
    run.succeed(
        "endoscopy", "predict", source, "--weights", "ward", "--boxes", "drawn.csv",
        "--output", "out", "--overwrite_output",
    )  # fmt: skip
    return pd.read_csv(run.folder / "out" / source.partition(".")[0] / "objects.csv").iloc[0]


def test_a_drawn_box_gives_the_size_that_predict_gives(run, page):
    drop(page, run.folder / "frame.png")
    page.get_by_text("click two opposite corners").wait_for()
    corner(page, BOX[0], BOX[2], "opposite corner.")
    corner(page, BOX[1], BOX[3], "1 drawn box")
    text = measured(page)
    names = ("xmin", "xmax", "ymin", "ymax")
    row = expected(run, "frame.png", [{"frame": "frame"} | dict(zip(names, BOX, strict=True))])
    shown = float(re.search(r"\n(\d+\.\d\d)\n", text)[1])
    assert abs(shown - row["size_index"]) < 0.01 * row["size_index"] + 0.005
    assert "no interval: out of the scope of these weights" in text
    assert row.filter(like="lower").isna().all()
    assert "no millimeter calibration for this scope" in text
    assert "1 of 1 frame counts; box drawn" in text
    assert page.is_visible("#overlay img")
    assert not page.is_visible("#strip img")


def test_another_box_gives_another_size_and_none_gives_a_message(run, page):
    before = re.search(r"\n(\d+\.\d\d)\n", measured(page))[1]
    corner(page, 40, 40, "opposite corner.")
    corner(page, 440, 330, "1 drawn box")
    page.click("#go")
    other = page.wait_for_function(
        """old => {
            const found = document.querySelector("#card").innerText.match(/\\n(\\d+\\.\\d\\d)\\n/);
            return found && found[1] !== old && found[1];
        }""",
        arg=before,
    )
    assert float(other.json_value()) > float(before)  # most of the frame is a larger polyp
    page.click("#clear")
    page.get_by_text("click two opposite corners").wait_for()


def test_a_clip_is_measured_on_its_drawn_frames(run, page):
    remove(page)
    drop(page, run.folder / "clip.mp4")
    corner(page, BOX[0], BOX[2], "opposite corner.")
    corner(page, BOX[1], BOX[3], "1 drawn box")
    page.fill("#place input[type=number]", "3")
    page.press("#place input[type=number]", "Tab")
    corner(page, BOX[0], BOX[2], "opposite corner.")
    corner(page, BOX[1], BOX[3], "2 drawn boxes")
    assert "2 of 2 frames count; box drawn" in measured(page)
    page.wait_for_selector("#strip img")


def test_rendered_polyps_have_millimeters_and_their_true_size(page):
    page.click("#example")
    page.wait_for_selector("#card .quiet")
    corner(page, 100, 100, "opposite corner.")
    corner(page, 220, 200, "1 drawn box")
    text = measured(page)
    assert re.search(r"\d+\.\dmm", text.replace("\n", ""))
    assert re.search(r"true size of the rendered polyp: \d+\.\d mm", text)
    assert page.is_visible("#card svg.ruler")


def test_what_cannot_be_read_is_said(run, page):
    remove(page)
    page.set_input_files("#drop input[type=file]", str(run.folder / "broken.png"))
    page.wait_for_selector("#card .warned")
    assert "cannot be read" in page.inner_text("#card")


def test_nothing_leaves_the_machine(run, server, page):
    local = re.compile(rf"^(data:|blob:|{re.escape(server)})")
    assert page.asked
    assert not [url for url in page.asked if not local.match(url)]
    asked = run.folder / "asked.txt"
    assert not asked.exists(), asked.read_text()


def test_a_taken_port_is_said_in_one_line(run, server):
    port = server.rpartition(":")[2]
    words = ("--weights", "ward", "--segmenter", "segmenter.safetensors", "--port", port)
    assert run.refuse("endoscopy", "demo", *words) == (
        f"gates endoscopy demo: error: port {port} is taken: give another --port, or 0"
    )


def test_long_clips_are_thinned_evenly(tmp_path):
    for index in range(150):
        Image.fromarray(np.full((8, 8, 3), index, np.uint8)).save(tmp_path / f"{index:03d}.png")
    clip = read_clip(tmp_path, tmp_path / "kept")
    values = [int(image[0, 0, 0]) for image in clip.images]
    assert values == list(range(0, 150, 4))
    assert len(values) <= MOST_FRAMES
    assert len(list(clip.source.iterdir())) == len(values)
    clip.remove()
    assert not clip.folder.exists()


def test_corners_may_come_in_any_order(tmp_path):
    clip = Clip(tmp_path, [np.zeros((120, 240, 3), np.uint8)])
    for x, y in ((200, 100), (40, 20)):
        clip.click(0, x, y)
    assert clip.drawn == {0: (20, 100, 10, 50)}  # the picture is twice as large
    clip.click(0, 10, 10)
    clip.click(0, 10, 10)
    assert clip.drawn == {0: (20, 100, 10, 50)}
    assert clip.corner is None


def test_the_shipped_network_measures_most_of_the_examples(tmp_path):
    bundle = load_bundle(WEIGHTS / "synthetic/weights/configured-s0")
    segmenter = load_segmenter(WEIGHTS.joinpath(*SHIPPED, "segmenter.safetensors"))
    abstained = []
    for index in range(6):
        clip = rendered_clip(tmp_path, index)
        try:
            abstained.append(measure(clip, 0, bundle, segmenter).reasons)
        except GatesError:  # the polyp is too far for the segmenter
            continue
    assert len(abstained) >= 3
    assert abstained.count("") > len(abstained) / 2, abstained
