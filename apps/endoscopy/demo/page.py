"""The page of ``gates endoscopy demo``: layout and actions."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from apps.endoscopy.demo.cards import empty_card, header, hint, message_card, result_card
from apps.endoscopy.demo.clip import Clip, Measured, measure, read_clip, rendered_clip
from apps.endoscopy.weights import NamedBundle
from core_gates.errors import GatesError
from endoscopy.segmentation.segmenter import Segmenter

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

    def __init__(self, found: NamedBundle, segmenter: Segmenter, root: Path) -> None:
        self.found, self.segmenter, self.root = found, segmenter, root

    def drop(self, path: str, old: Clip | None) -> list[Any]:
        """Read the dropped files."""
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
