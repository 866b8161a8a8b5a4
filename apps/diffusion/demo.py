"""``gates diffusion demo``: a local page from a prompt to adapters, images and gates."""

from collections.abc import Sequence
from functools import partial
from html import escape
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from matplotlib.figure import Figure

from apps.diffusion.generate import record_of
from apps.diffusion.search import left_out
from apps.diffusion.studio import GATED, SUM, Sources, Studio, studio
from core_gates.errors import GatesError
from diffusion.data.pictures import enlarged
from diffusion.evaluation.figures import gate_map_figure
from diffusion.fusion.pipeline import Generated, most_of
from harness.command.local_page import check_port, private_folder, serve
from harness.command.verbs import Place
from harness.runs.terminal import counting

COLUMNS = ("adapter", "title", "score", "open", "why", "license")


def header(studio: Studio) -> str:
    """Return the head of the page."""
    badges = [
        f"base: {studio.model}",
        f"{len(studio.finder.library.adapters())} adapters",
        "no gates: the sum" if studio.gates is None else studio.mode,
        "nothing leaves this machine",
    ]
    found = "".join(f'<span class="badge">{escape(one)}</span>' for one in badges)
    return (
        '<div class="top"><div><h1>Adapters by prompt</h1><p>Describe an image: adapters are found '
        "by their weights, and a gate opens those that it needs.</p></div>"
        f'<div class="badges">{found}</div></div>'
    )


HINT = '<div class="card quiet">Adapters that are found appear here.</div>'


def message_card(text: str) -> str:
    """Return a card with an error."""
    return f'<div class="card warned">{escape(text)}</div>'


def found_card(adapters: Sequence[dict[str, Any]], notes: Sequence[str]) -> str:
    """Return the adapters with their scores, and why each was found.

    Args:
        adapters: As in the record of an image.
        notes: Lines below them.
    """
    cells = [_cells(one) for one in adapters]
    columns = [name for name in COLUMNS if name != "title" or any(row[name] for row in cells)]
    heads = "".join(f"<th>{name}</th>" for name in columns)
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(row[name])}</td>' for name in columns)}</tr>" for row in cells
    )
    lines = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        f'<div class="card"><table><thead><tr>{heads}</tr></thead>'
        f'<tbody>{rows}</tbody></table><ul class="notes">{lines}</ul></div>'
    )


def _cells(one: dict[str, Any]) -> dict[str, str]:
    title = one["title"] if one["title"] != one["name"] else ""
    figures = _figure(one["score"]), _figure(one["open"])
    found = (one["name"], title, *figures, one["why"], one["license"])
    return dict(zip(COLUMNS, map(str, found), strict=True))


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


SIDE = 320  # pixels that small images are enlarged to


class Asked(NamedTuple):
    """What images are made of: a prompt, a seed, and the names of what was found by it."""

    prompt: str
    seed: int
    names: list[str]


class PageResult(NamedTuple):
    """What the page shows.

    Attributes:
        card: HTML of the adapters, or of an error.
        gated: Image with gates (H, W, 3); None after an error.
        plain: Image of the plain sum.
        gates: Map of the gates; None without gates.
    """

    card: str
    gated: np.ndarray | None = None
    plain: np.ndarray | None = None
    gates: Figure | None = None


class Actions:
    """The actions of the page.

    Args:
        studio: What makes images.
        steps: Number of denoising steps.
        size: Side of images in pixels; that of the base if None.
    """

    def __init__(self, studio: Studio, steps: int, size: int | None) -> None:
        self.studio, self.options = studio, studio.options(steps, None, size)
        self.lock = Lock()  # adapters are attached to one model

    def find(self, prompt: str, k: int, seed: int) -> tuple[Asked | None, PageResult]:
        """Find adapters by a prompt, and make images."""
        made, shown = self._make(prompt, k, seed, None)
        if made is None:
            return None, shown
        return Asked(prompt, made.seed, [one.name for one in made.adapters]), shown

    def weigh(self, asked: Asked | None, strengths: Sequence[float]) -> PageResult:
        """Make images with other strengths of the same adapters."""
        if asked is None:
            return PageResult(message_card("no adapters are found yet: give a prompt"))
        weights = dict(zip(asked.names, strengths, strict=False))
        return self._make(asked.prompt, len(asked.names), asked.seed, weights)[1]

    def _make(
        self, prompt: str, k: int, seed: int, strengths: dict[str, float] | None
    ) -> tuple[Generated | None, PageResult]:
        """Return an image, None after an error, and what is shown of it."""
        make = partial(self.studio.make, prompt, seed=seed, **self.options)
        with self.lock:
            try:
                made = make(k=k, strengths=strengths)
                weights = {one.name: one.strength for one in made.adapters}
                plain = make(mode=SUM, adapters=list(weights), strengths=weights)
            except GatesError as error:
                return None, PageResult(message_card(str(error)))
            record = record_of(self.studio, made)
            found = self.studio.finder.found
        left = [f"left out: {name}: {why}" for name, why in made.skipped.items()]
        unknown = self.studio.unknown(prompt, {one.name: one.score for one in made.adapters})
        notes = [*self.studio.notices, unknown, found.notice, *left_out(found), *left]
        card = found_card(record["adapters"], [note for note in notes if note])
        gates = None if made.gates is None else gate_map_figure(made.gates, note=prompt)
        return made, PageResult(card, _pixels(made), _pixels(plain), gates)


def _pixels(made: Generated) -> np.ndarray:
    return np.asarray(enlarged(made.images[0], SIDE))


STYLE = (Path(__file__).with_name("demo.css")).read_text(encoding="utf-8")
MOST = 8  # adapters that the page shows sliders for


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
                label="Prompt",
                placeholder="a scanned black mushroom on purple",
                elem_id="prompt",
                scale=6,
            )
            k = gr.Slider(
                1, MOST, most_of(studio.mode), step=1, label="Adapters", elem_id="k", scale=2
            )
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed", scale=1)
            go = gr.Button("Make", variant="primary", elem_id="go", scale=1)
        card = gr.HTML(HINT, elem_id="found")
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


def _results(shown: PageResult) -> list[Any]:
    gates = gr.update(value=shown.gates, visible=shown.gates is not None)
    return [shown.card, shown.gated, shown.plain, gates]


def demo(
    place: Place,
    sources: Sources,
    steps: int = 20,
    size: int | None = None,
    port: int = 7861,
    browser: bool = False,
) -> None:
    """Serve a page: a prompt, the adapters that suit it with scores, the image, the gates.

    The page is served to this machine only, and nothing is sent anywhere.

    Args:
        place: Filled in by the command line.
        sources: Base, library and gates.
        steps: Number of denoising steps.
        size: Side of images in pixels, for other bases than the embedded one.
        port: Port of the page; 0 takes a free one.
        browser: Open a browser, too.
    """
    check_port(port)
    with private_folder():
        from apps.diffusion.embedded_world import World

        world = partial(World, place.run_folder.path.parents[1])
        with counting("indexing") as progress:
            opening = studio(
                sources, world, progress, check=lambda one: one.options(steps, None, size)
            )
        with opening as found:
            serve(
                lambda: build_page(found, steps=steps, size=size),
                port=port,
                browser=browser,
                css=STYLE,
                lines=[f"base: {found.model}", *(f"note: {one}" for one in found.notices)],
            )
