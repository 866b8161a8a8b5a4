"""The page of ``gates diffusion demo``: layout and actions."""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import gradio as gr
import numpy as np

from apps.diffusion.demo.cards import found_card, header, hint, message_card
from apps.diffusion.generation.modes import GATED, SUM
from apps.diffusion.generation.pictures import record_of
from apps.diffusion.generation.sources import Studio
from core_gates.errors import GatesError
from diffusion.data.contact_sheet import enlarged
from diffusion.evaluation.figures import gate_map_figure
from diffusion.fusion.pipeline import Generated

STYLE = (Path(__file__).with_name("demo.css")).read_text(encoding="utf-8")
MOST = 5
"""Adapters that the page shows sliders for."""

SIDE = 320
"""Pixels that small images are enlarged to."""


def build_page(studio: Studio, *, steps: int = 20, size: int | None = None) -> gr.Blocks:
    """Return the page.

    Args:
        studio: What makes images.
        steps: Number of denoising steps.
        size: Side of images in pixels, for other bases than the embedded one.
    """
    act = Actions(studio, steps, size)
    with gr.Blocks(title="Adapters by prompt", analytics_enabled=False) as page:
        gr.HTML(header(studio), elem_id="head")
        asked = gr.State(None)
        with gr.Row(equal_height=True):
            prompt = gr.Textbox(
                label="Prompt", placeholder="red apple, inverted colors", elem_id="prompt", scale=6
            )
            k = gr.Slider(1, MOST, 3, step=1, label="Adapters", elem_id="k", scale=2)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed", scale=1)
            go = gr.Button("Make", variant="primary", elem_id="go", scale=1)
        card = gr.HTML(hint(), elem_id="found")
        with gr.Row():
            sliders = [
                gr.Slider(0, 2, 1, step=0.05, visible=False, elem_id=f"strength{number}")
                for number in range(MOST)
            ]
        with gr.Row():
            images = [
                gr.Image(label=label, interactive=False, buttons=[], format="png", elem_id=name)
                for name, label in ((GATED, "Gated"), (SUM, "Plain sum"))
            ]
        plot = gr.Plot(label="Gates by layer and step", visible=False, elem_id="map")
        results = [card, *images, plot]
        for event in (go.click, prompt.submit):
            event(act.find, [prompt, k, seed], [asked, *sliders, *results])
        for slider in sliders:
            slider.release(act.weigh, [asked, *sliders], results)
    return page


class Asked(NamedTuple):
    """What images are made of: a prompt, a seed, and the names of what was found by it."""

    prompt: str
    seed: int
    names: list[str]


class Actions:
    """The actions of the page; every method returns the new state of some components.

    Args:
        studio: What makes images.
        steps: Number of denoising steps.
        size: Side of images in pixels; that of the base if None.
    """

    def __init__(self, studio: Studio, steps: int, size: int | None) -> None:
        self.studio, self.options = studio, studio.options(steps, None, size)
        self.lock = Lock()  # adapters are attached to one model

    def find(self, prompt: str, k: float, seed: float) -> list[Any]:
        """Find adapters by a prompt, and make images."""
        hidden = [gr.update(visible=False)] * MOST
        try:
            made, shown = self._make(prompt, int(k), int(seed or 0), None)
        except GatesError as error:
            return [None, *hidden, *_failed(error)]
        names = [one.name for one in made.adapters]
        sliders = [gr.update(visible=True, label=f"Strength of {n}", value=1.0) for n in names]
        return [Asked(prompt, made.seed, names), *sliders, *hidden[len(names) :], *shown]

    def weigh(self, asked: Asked | None, *strengths: float) -> list[Any]:
        """Make images with other strengths of the same adapters."""
        if asked is None:
            return _failed(GatesError("no adapters are found yet: give a prompt"))
        weights = dict(zip(asked.names, strengths, strict=False))
        try:
            return self._make(asked.prompt, len(asked.names), asked.seed, weights)[1]
        except GatesError as error:
            return _failed(error)

    def _make(
        self, prompt: str, k: int, seed: int, strengths: dict[str, float] | None
    ) -> tuple[Generated, list[Any]]:
        """Return an image, and what is shown of it."""
        with self.lock:
            made = self.studio.make(prompt, k=k, seed=seed, strengths=strengths, **self.options)
            return made, self._shown(made)

    def _shown(self, made: Generated) -> list[Any]:
        """Return the card, both images and the gates."""
        weights = {one.name: one.strength for one in made.adapters}
        plain = self.studio.make(
            made.prompt, mode=SUM, adapters=list(weights), strengths=weights, seed=made.seed,
            **self.options,
        )  # fmt: skip
        record = record_of(self.studio, made, made.mode)
        left = [f"left out: {name}: {why}" for name, why in made.skipped.items()]
        notes = [*self.studio.notices, self.studio.finder.notice, *left]
        figure = None
        if made.gates is not None:
            figure = gate_map_figure(made.gates, note=made.prompt)
        return [
            found_card(record["adapters"], [note for note in notes if note]),
            _pixels(made),
            _pixels(plain),
            gr.update(value=figure, visible=figure is not None),
        ]


def _pixels(made: Generated) -> np.ndarray:
    return np.asarray(enlarged(made.images[0], SIDE))


def _failed(error: GatesError) -> list[Any]:
    return [message_card(str(error)), None, None, gr.update(visible=False)]
