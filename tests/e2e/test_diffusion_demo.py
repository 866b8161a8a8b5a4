"""The page of ``gates diffusion demo`` in a real browser; text of files never runs there."""

import json
import os
import re
import runpy
import sys
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from PIL import Image

SMALL = Path(__file__).parents[1] / "apps" / "diffusion" / "small.py"
SCRIPT = "document.title='run'"
EVIL = f'<img src=x onerror="{SCRIPT}"> snow <script>{SCRIPT}</script> $\\frac'
WORDS = ("--base", "base", "--library", "loras", "--gates", "gates.safetensors", "--steps", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, adapters, one of which has HTML in its metadata, and gates."""
    here = tmp_path_factory.mktemp("demo")
    small = runpy.run_path(str(SMALL))
    base = small["write_base"](here / "base")
    small["write_library"](here / "loras")
    small["write_gates"](here / "gates.safetensors", base, here / "loras")
    metadata = {"modelspec.license": "<b>CC0</b>", "modelspec.trigger_phrase": EVIL}
    small["write_adapter"](here / "loras" / "evil.safetensors", EVIL, 9, **metadata)
    return here


@pytest.fixture(scope="module")
def server(folder, demo_pages):
    """The command in a separate process; yields its address."""
    pytest.importorskip("playwright")  # of the same extra as gradio, which this process spares
    paths = os.pathsep.join(filter(None, sys.path))
    with demo_pages.served(
        folder, os.environ | {"PYTHONPATH": paths}, "diffusion", "demo", *WORDS
    ) as address:
        yield address


@pytest.fixture(scope="module")
def page(server, chromium, demo_pages):
    """The page in a headless browser."""
    with demo_pages.opened(server, chromium, 1400) as page:
        yield page


def test_the_page_is_served(server):
    with urlopen(server, timeout=60) as answer:
        text = answer.read().decode()
    assert "Adapters by prompt" in text
    with urlopen(f"{server}/config", timeout=60) as answer:
        parts = json.load(answer)["components"]
    names = {part["props"].get("elem_id") for part in parts}
    assert {"head", "prompt", "go", "found", "gated", "sum", "map", "strength4"} <= names


def test_a_call_of_the_page_makes_images(server):
    with urlopen(f"{server}/config", timeout=60) as answer:
        config = json.load(answer)
    (number,) = {
        d["id"]
        for d in config["dependencies"]
        if len(d["inputs"]) == 3 and "click" in str(d["targets"])
    }
    call = {"data": ["snow, evil", 2, 0], "fn_index": number, "session_hash": "s"}
    request = Request(
        f"{server}/gradio_api/queue/join",
        json.dumps(call).encode(),
        {"Content-Type": "application/json"},
    )
    with urlopen(request, timeout=60) as answer:
        assert json.load(answer)["event_id"]
    with urlopen(f"{server}/gradio_api/queue/data?session_hash=s", timeout=120) as stream:
        for line in stream:
            if b"process_completed" in line:
                break
    done = json.loads(line.removeprefix(b"data: "))
    assert done["success"], done
    _, first, *_, card, gated, plain, gates = done["output"]["data"]
    assert first["label"].startswith("Strength of ")
    assert "deep snow" in card
    assert "&lt;img src=x onerror=" in card
    assert "<img" not in card
    assert gated["url"] != plain["url"]
    assert gates["value"]["plot"].startswith("data:image/")


def make(page, prompt):
    before = source(page, "gated")
    page.fill("#prompt textarea, #prompt input", prompt)
    page.click("#go")
    return changed(page, "gated", before)


def source(page, name):
    image = page.query_selector(f"#{name} img")
    return image.get_attribute("src") if image else None


def changed(page, name, before):
    page.wait_for_function(
        "([name, old]) => { const i = document.querySelector(`#${name} img`);"
        " return i && i.complete && i.src !== old }",
        arg=[name, before],
    )
    return source(page, name)


def test_a_prompt_gives_adapters_both_images_and_gates(page):
    gated = make(page, "a red fox")
    text = page.inner_text("#found")
    assert "a red fox" in text
    assert "words: red, fox" in text
    assert re.search(r"fox\s+a red fox\s+1\.000\s+0\.\d{3}", text)
    assert source(page, "sum") != gated
    page.wait_for_selector("#map img")
    assert page.is_visible("#strength0")
    assert "Strength of fox" in page.inner_text("#strength0")


def test_a_strength_changes_the_image(page):
    before = make(page, "night sky"), source(page, "sum")
    page.fill("#strength0 input[type=number]", "0.2")
    page.press("#strength0 input[type=number]", "Tab")
    slider = page.locator("#strength0 input[type=range]")
    slider.focus()
    slider.press("ArrowLeft")
    slider.dispatch_event("pointerup")
    assert changed(page, "gated", before[0]) != before[0]
    assert changed(page, "sum", before[1]) != before[1]
    assert "Strength of night" in page.inner_text("#strength0")


def test_text_of_files_is_inert(page):
    make(page, "snow, evil")
    page.get_by_text("<img src=x onerror=").first.wait_for()
    assert "<b>CC0</b>" in page.inner_text("#found")
    assert page.query_selector("#found td img, #found td script, #found td b") is None
    page.wait_for_timeout(300)
    assert page.title() != "run"


def test_an_empty_prompt_gives_a_message(page):
    page.fill("#prompt textarea, #prompt input", " ")
    page.click("#go")
    page.wait_for_selector("#found .warned")
    assert "the prompt is empty" in page.inner_text("#found")
    assert not page.is_visible("#strength0")


def test_nothing_leaves_the_machine(server, page):
    local = re.compile(rf"^(data:|blob:|{re.escape(server)})")
    assert page.asked
    assert not [url for url in page.asked if not local.match(url)]


def test_small_images_are_enlarged(page, tmp_path):
    make(page, "deep snow")
    page.locator("#gated img").screenshot(path=str(tmp_path / "a.png"))
    with Image.open(tmp_path / "a.png") as image:
        assert min(image.size) >= 200
