"""The page of ``gates diffusion demo``: layout, and what its actions change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from apps.diffusion.demo.actions import Actions, Asked, Shown
from apps.diffusion.demo.cards import header, hint
from apps.diffusion.generation.modes import GATED, SUM
from apps.diffusion.generation.studio import Studio

STYLE = (Path(__file__).with_name("demo.css")).read_text(encoding="utf-8")
MOST = 5
"""Adapters that the page shows sliders for."""


def build_page(studio: Studio, *, steps: int = 20, size: int | None = None) -> gr.Blocks:
    """Return the page.

    Args:
        studio: What makes images.
        steps: Number of denoising steps.
        size: Side of images in pixels, for other bases than the embedded one.
    """
    act = Actions(studio, steps, size)

    def found(prompt: str, k: float, seed: float) -> list[Any]:
        asked, shown = act.find(prompt, int(k), int(seed or 0))
        return [asked, *_sliders(asked), *_results(shown)]

    def weighed(asked: Asked | None, *strengths: float) -> list[Any]:
        return _results(act.weigh(asked, strengths))

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
            event(found, [prompt, k, seed], [asked, *sliders, *results])
        for slider in sliders:
            slider.release(weighed, [asked, *sliders], results)
    return page


def _sliders(asked: Asked | None) -> list[Any]:
    names = [] if asked is None else asked.names
    shown = [gr.update(visible=True, label=f"Strength of {n}", value=1.0) for n in names]
    return [*shown, *[gr.update(visible=False)] * (MOST - len(shown))]


def _results(shown: Shown) -> list[Any]:
    gates = gr.update(value=shown.gates, visible=shown.gates is not None)
    return [shown.card, shown.gated, shown.plain, gates]
