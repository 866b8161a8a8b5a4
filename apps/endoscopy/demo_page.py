"""``gates endoscopy demo``: a local page that sizes the polyps on dropped files."""

import math
import random
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from apps.endoscopy.demo_clip import Clip, Measured, measure, read_clip, rendered_clip
from apps.endoscopy.training_runs import NamedBundle, find_bundle, find_segmenter
from core_gates.errors import GatesError
from endoscopy.bundles.sizing_bundle import NO_CALIBRATION, RESEARCH_ONLY, SizingBundle
from endoscopy.segmenter import Segmenter
from harness.command.local_page import check_port, private_folder, serve
from harness.command.verbs import Place

LEAST, MOST = 1.0, 32.0  # ends of the ruler, mm
TICKS = (1, 2, 5, 10, 20)
WIDTH, BASE = 440.0, 34.0  # of the ruler, pixels


def header(found: NamedBundle) -> str:
    """Return the head of the page."""
    scopes = ", ".join(found.bundle.scope.calibrated_for) or "nothing"
    return (
        '<div class="top"><div><h1>Polyp size</h1>'
        "<p>Drop a frame or a clip, accept the proposed box or draw your own, and measure.</p>"
        f'</div><div class="badges"><span class="badge warn">{RESEARCH_ONLY}</span>'
        '<span class="badge">nothing leaves this machine</span>'
        f'<span class="badge">weights: {escape(found.name)}</span>'
        f'<span class="badge">millimeters for: {escape(scopes)}</span></div></div>'
    )


def hint(clip: Clip | None) -> str:
    """Return instructions for the next step."""
    if clip is None:
        text = "Or try the example, a rendered polyp, whose true size is known."
    elif clip.corner is not None:
        text = "Now click the opposite corner."
    elif clip.drawn:
        count = len(clip.drawn)
        text = f"{count} drawn box{'es' if count > 1 else ''}: only drawn frames count. Measure."
    elif clip.found:
        text = (
            f"Automatic box on {len(clip.found)} of {len(clip.images)} frames (dashed): accept it "
            "with Measure, or click two opposite corners to draw your own."
        )
    else:
        text = "No polyp found: click two opposite corners around it."
    return f'<div class="hint">{text}</div>'


def empty_card() -> str:
    """Return the card before anything is measured."""
    return '<div class="card quiet"><div class="label">Size</div><div class="value">–</div></div>'


def message_card(text: str) -> str:
    """Return a card with an error."""
    return f'<div class="card warned"><div class="label">Not measured</div>{escape(text)}</div>'


def result_card(result: Measured, bundle: SizingBundle, truth: float | None) -> str:
    """Return the card of a size."""
    kind, label = "", "Size" if result.calibrated else "Size index"
    if result.reasons:
        kind, label = " warned", f"Abstains: {escape(result.reasons)}"
    size = f"{result.size:.2f}"
    if result.calibrated:
        size = f'{result.size:.1f}<span class="unit">mm</span>'
    return (
        f'<div class="card{kind}"><div class="label">{label}</div><div class="value">{size}</div>'
        f"{_interval(result, bundle)}{_ruler(result, truth) if result.calibrated else ''}"
        f"{_notes(result, bundle, truth)}</div>"
    )


def _interval(result: Measured, bundle: SizingBundle) -> str:
    conformal = bundle.intervals.get("automatic" if result.origin == "automatic" else "boxes")
    if conformal is None or not math.isfinite(result.low):
        why = f"these weights have none for {result.origin} boxes"
        if not result.calibrated:
            why = "out of the scope of these weights"
        elif result.reasons:
            why = "the polyp abstains"
        return f'<div class="interval">no interval: {why}</div>'
    return (
        f'<div class="interval">{conformal.coverage:.0%} interval '
        f"{result.low:.3g} to {result.high:.3g} mm</div>"
    )


def _notes(result: Measured, bundle: SizingBundle, truth: float | None) -> str:
    counting, total = result.frames
    count = "frames count" if total > 1 else "frame counts"
    lines = [f"{counting} of {total} {count}; box {result.origin}"]
    if not result.calibrated:
        lines.append(
            f"{NO_CALIBRATION}: 1 stands for an average lesion of the training data "
            f"({bundle.scope.trained_on}), and no size in millimeters"
        )
    elif truth is not None:
        lines.append(f"true size of the rendered polyp: {truth:.1f} mm")
    lines.append(f"{RESEARCH_ONLY}, no medical device")
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="notes">{items}</ul>'


def _ruler(result: Measured, truth: float | None) -> str:
    """Draw size and interval on a logarithmic ruler with the clinical classes."""
    parts = [f'<svg class="ruler" viewBox="0 0 {WIDTH:.0f} 66" role="img" '
             f'aria-label="{result.size:.1f} millimeters on a ruler">']  # fmt: skip
    classes = (("diminutive", LEAST, 5.0), ("small", 5.0, 10.0), ("large", 10.0, MOST))
    for number, (name, low, high) in enumerate(classes):
        x, width = _x(low), _x(high) - _x(low)
        parts.append(f'<rect class="class{number}" x="{x:.1f}" y="{BASE - 12}" '
                     f'width="{width:.1f}" height="12"/>')  # fmt: skip
        parts.append(f'<text class="name" x="{x + width / 2:.1f}" y="{BASE - 18}">{name}</text>')
    parts += [
        f'<text class="tick" x="{_x(tick):.1f}" y="{BASE + 26}">{tick}</text>' for tick in TICKS
    ]
    if math.isfinite(result.low):
        low, high = _x(result.low), _x(result.high)
        parts.append(f'<rect class="band" x="{low:.1f}" y="{BASE + 3}" '
                     f'width="{high - low:.1f}" height="8" rx="4"/>')  # fmt: skip
    parts.append(f'<circle class="dot" cx="{_x(result.size):.1f}" cy="{BASE + 7}" r="7"/>')
    if truth is not None:
        x = _x(truth)
        parts.append(f'<path class="truth" d="M{x:.1f} {BASE - 14}V{BASE + 14}"/>')
    return "".join([*parts, "</svg>"])


def _x(mm: float) -> float:
    share = math.log(min(max(mm, LEAST), MOST) / LEAST) / math.log(MOST / LEAST)
    return 10 + share * (WIDTH - 20)


STYLE = (Path(__file__).with_name("demo.css")).read_text(encoding="utf-8")
EXPIRY = 1800  # seconds after which the frames of a closed page are deleted


def build_page(found: NamedBundle, segmenter: Segmenter, root: Path) -> gr.Blocks:
    """Return the page.

    Args:
        found: Sizing network.
        segmenter: Proposes boxes.
        root: Folder of dropped frames.
    """
    act = Actions(found, segmenter, root)
    with gr.Blocks(title="Polyp size", analytics_enabled=False, delete_cache=(600, EXPIRY)) as page:
        gr.HTML(header(found), elem_id="head")
        clip = gr.State(None, time_to_live=EXPIRY, delete_callback=_forget)
        with gr.Row(equal_height=False):
            with gr.Column(scale=6, min_width=420):
                file = gr.File(
                    label="Drop a frame or a clip: JPEG, PNG, MP4, AVI, DICOM",
                    height=118, elem_id="drop",
                )  # fmt: skip
                frame = gr.Image(
                    label="Frame", show_label=False, interactive=False, buttons=[], elem_id="frame",
                    visible=False, format="png",
                )  # fmt: skip
                place = gr.Slider(
                    1, 2, 1, step=1, label="Frame of the clip", visible=False, elem_id="place"
                )
                note = gr.HTML(hint(None), elem_id="hint")
                with gr.Row():
                    example = gr.Button("Example", elem_id="example")
                    clear = gr.Button("Clear boxes", interactive=False, elem_id="clear")
                    go = gr.Button("Measure", variant="primary", interactive=False, elem_id="go")
            with gr.Column(scale=5, min_width=380):
                card = gr.HTML(empty_card(), elem_id="card")
                overlay = gr.Image(
                    label="What the network looks at", interactive=False, buttons=[],
                    visible=False, elem_id="overlay", format="png",
                )  # fmt: skip
                strip = gr.Plot(label="Frames of the clip", visible=False, elem_id="strip")
        loaded = [clip, frame, place, note, clear, go, card, overlay, strip]
        file.upload(act.drop, [file, clip], loaded)
        example.click(act.example, [clip], loaded)
        frame.select(act.click, [clip, place], [frame, note, clear])
        place.change(act.turn, [clip, place], frame)
        clear.click(act.clear, [clip, place], [frame, note, clear])
        go.click(act.measure, [clip, place], [card, overlay, strip])
    return page


class Actions:
    """The actions of the page; every method returns the new state of some components.

    Args:
        found: Sizing network.
        segmenter: Proposes boxes.
        root: Folder of dropped frames.
    """

    def __init__(self, named_bundle: NamedBundle, segmenter: Segmenter, root: Path) -> None:
        self.found, self.segmenter, self.root = named_bundle, segmenter, root

    def drop(self, path: str, old: Clip | None) -> list[Any]:
        """Read the dropped files as a clip, and return the updates of the page."""
        return self._load(lambda: read_clip(path, self.root), old)

    def example(self, old: Clip | None) -> list[Any]:
        """Render a polyp of known size."""
        index = random.randrange(10_000)
        return self._load(lambda: rendered_clip(self.root, index), old)

    def click(self, clip: Clip, place: int, event: gr.SelectData) -> list[Any]:
        """Take a corner of a box."""
        x, y = event.index
        clip.click(place - 1, float(x), float(y))
        return [clip.picture(place - 1), hint(clip), gr.update(interactive=bool(clip.drawn))]

    def clear(self, clip: Clip, place: int) -> list[Any]:
        """Forget the drawn boxes."""
        clip.drawn, clip.corner = {}, None
        return [clip.picture(place - 1), hint(clip), gr.update(interactive=False)]

    def turn(self, clip: Clip | None, place: int) -> np.ndarray | None:
        """Show another frame."""
        return None if clip is None else clip.picture(place - 1)

    def measure(self, clip: Clip, place: int) -> list[Any]:
        """Size the polyp."""
        bundle = self.found.bundle
        try:
            result: Measured = measure(clip, place - 1, bundle, self.segmenter)
        except GatesError as error:
            return [message_card(str(error)), gr.update(visible=False), gr.update(visible=False)]
        return [
            result_card(result, bundle, clip.truth),
            gr.update(value=result.overlay, visible=True),
            gr.update(value=result.strip, visible=result.strip is not None),
        ]

    def _load(self, read: Callable[[], Clip], old: Clip | None) -> list[Any]:
        _forget(old)
        hidden = gr.update(visible=False)
        try:
            clip = read()
        except GatesError as error:
            off = gr.update(interactive=False)
            return [None, hidden, hidden, hint(None), off, off, message_card(str(error)), hidden,
                    hidden]  # fmt: skip
        clip.find(self.segmenter)
        first = min(clip.found, default=0)
        several = len(clip.images) > 1
        return [
            clip,
            gr.update(value=clip.picture(first), visible=True),
            gr.update(value=first + 1, maximum=max(len(clip.images), 2), visible=several),
            hint(clip),
            gr.update(interactive=False),
            gr.update(interactive=True),
            empty_card(),
            hidden,
            hidden,
        ]


def _forget(clip: Clip | None) -> None:
    if clip is not None:
        clip.remove()


def demo(
    place: Place,
    weights: str | None = None,
    segmenter: str | None = None,
    port: int = 7860,
    browser: bool = False,
) -> None:
    """Serve a page: drop a frame or a clip, draw or accept the box, get the size and an overlay.

    The page is served to this machine only. Nothing is sent anywhere, and what was dropped is
    deleted when the command ends. Research only.

    Args:
        place: Filled in by the command line.
        weights: Folder of weights; by default those of the run, else the shipped ones.
        segmenter: Weights of another segmenter than the shipped one, which proposes the box.
        port: Port of the page; 0 takes a free one.
        browser: Open a browser, too.
    """
    check_port(port)
    named_bundle = find_bundle(place, weights)
    network = find_segmenter(segmenter)
    with private_folder() as folder:
        serve(
            lambda: build_page(named_bundle, network, folder),
            port=port,
            browser=browser,
            css=STYLE,
            lines=[f"weights: {named_bundle.name}"],
        )
