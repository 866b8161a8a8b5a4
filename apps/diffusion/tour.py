"""The diffusion stop of the tour: adapters are found for a prompt, a gate opens what it needs."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from apps.diffusion.embedded_world import World
from apps.diffusion.generate import TRUE, in_bytes
from apps.diffusion.studio import RELEVANCE, SUM, Sources, Studio, shipped, studio
from diffusion.data.concepts import Combination, held_out_pairs
from diffusion.data.scenes import drawn
from diffusion.evaluation.figures import openness_figure, sheet_figure
from diffusion.fusion.pipeline import Used
from harness.evidence import Resamples, moments
from harness.report.page import Page, StopSkippedError, TourRow, TourStop, TourTask
from harness.runs.terminal import SHORT, stepping

SHOWN = 4  # pairs of a subject and a style that no gate was trained on together
K, STEPS = 6, 20
SYSTEM = "AutoLoRA, embedded base"
GATE, ALL, NEEDED = "relevance gate", f"sum of the {K}", "the two needed, told"
HALF = 0.5  # openness from which an adapter counts as open


class Drawn(NamedTuple):
    """Images of P combinations, from the same noise.

    Attributes:
        combinations: Subjects and styles.
        captions: Of drawings that no adapter and no gate has seen.
        images: `TRUE`, `GATE`, `ALL` and `NEEDED` -> (P, H, W, 3) uint8.
        adapters: Those that were found for each, with how far the gate opened them.
    """

    combinations: list[Combination]
    captions: list[str]
    images: dict[str, np.ndarray]
    adapters: list[tuple[Used, ...]]

    def errors(self, name: str) -> np.ndarray:
        """Return the root mean square error (P,) of the pixels of a way, from 0 to 1."""
        gap = (self.images[name].astype(float) - self.images[TRUE]) / 255
        return np.sqrt((gap**2).mean((1, 2, 3)))

    def opened(self) -> dict[bool, list[float]]:
        """Return how far adapters are open, those that captions need (True) and others."""
        found: dict[bool, list[float]] = {True: [], False: []}
        for pair, adapters in zip(self.combinations, self.adapters, strict=True):
            for one in adapters:
                found[one.name in pair.adapters].append(one.open or 0.0)
        return found


def drawn_ways(studio: Studio, combinations: Iterable[Combination]) -> Drawn:
    """Find adapters by their weights, and draw combinations with them in each way.

    Args:
        studio: Of the embedded base, with a relevance gate.
        combinations: Subjects and styles.
    """
    chosen, captions = list[Combination](), list[str]()
    images = {name: list[np.ndarray]() for name in (TRUE, GATE, ALL, NEEDED)}
    adapters = list[tuple[Used, ...]]()
    options = studio.options(STEPS, None, None)
    for one in combinations:
        chosen.append(one)
        scene = one.scenes("test")[-1]
        captions.append(caption := scene.caption())
        images[TRUE].append(in_bytes(drawn([scene])[0]))
        gated = studio.make(caption, mode=RELEVANCE, k=K, **options)
        added = partial(studio.make, caption, mode=SUM, **options)
        ways = {
            GATE: gated,
            ALL: added(adapters=[used.name for used in gated.adapters]),
            NEEDED: added(adapters=list(one.adapters)),
        }
        for name, way in ways.items():
            images[name].append(np.asarray(way.images[0].convert("RGB")))
        adapters.append(gated.adapters)
    stacked = {name: np.stack(own) for name, own in images.items()}
    return Drawn(chosen, captions, stacked, adapters)


def tour(folder: Path, say: Callable[[str], None], *, world: World | None = None) -> TourStop:
    """Find adapters by prompts, and make images with those that a gate opens.

    Args:
        folder: For the index of the adapters.
        say: Tells the progress.
        world: In which nothing is trained; that of the folder if None.

    Raises:
        StopSkippedError: Weights are missing.
    """
    world = world or World(folder, quick=True)
    if lacking := shipped(world).lacking:
        raise StopSkippedError(
            f"diffusion: weights are missing ({', '.join(lacking)}): `gates diffusion evaluate "
            "--config retrieved` trains them"
        )
    say("reading the base, and indexing adapters by their weights")
    pairs = held_out_pairs()
    chosen = pairs[:: len(pairs) // SHOWN][:SHOWN]
    with studio(Sources(least=-1), lambda: world, lambda *_: None) as opened:
        opened.finder.by = "weights"  # what prompts call adapters is not looked at
        say(f"making images of {len(chosen)} prompts with {K} adapters each")
        made = drawn_ways(opened, stepping("making images", chosen, seconds=SHORT))
        zoo = len(opened.finder.library.adapters())
    result = f"pixels err by {made.errors(GATE).mean():.2f} on a scale of 1"
    done = TourTask("draw a subject in a style, from a prompt", result, "gates diffusion generate")
    draw = partial(_draw, made=made, zoo=zoo)
    return TourStop("Image models: adapters by prompt", rows_of(made, zoo), draw, [done])


def rows_of(made: Drawn, zoo: int) -> list[TourRow]:
    """Return what was opened, and how far images are from what is true.

    Args:
        made: Images and what they were made of.
        zoo: Number of adapters that were searched.
    """
    opened = {needed: [value > HALF for value in own] for needed, own in made.opened().items()}
    wanted = sum(len(pair.adapters) for pair in made.combinations)
    gap = made.errors(GATE) - made.errors(ALL)
    _, low, high, _ = Resamples.clusters(range(len(gap))).intervals(moments(gap, name="gap"))["gap"]
    verdict = "closer" if high < 0 else "farther" if low > 0 else "not distinguishable"
    return [
        TourRow(
            SYSTEM,
            f"needed adapters opened, of {K} found of {zoo}",
            f"{sum(opened[True])} of {wanted}",
            f"{len(opened[True])} of {wanted} are found",
            f"of {len(opened[False])} useless ones {sum(opened[False])} opened",
        ),
        TourRow(
            SYSTEM,
            "pixel error to the true drawing, unseen pairs",
            f"{made.errors(GATE).mean():.3f}",
            f"{ALL} {made.errors(ALL).mean():.3f}, needed told {made.errors(NEEDED).mean():.3f}",
            f"{verdict}: {gap.mean():+.3f} [{low:+.3f}, {high:+.3f}]",
        ),
    ]


def _draw(page: Page, made: Drawn, zoo: int) -> None:
    needed = [pair.adapters for pair in made.combinations]
    openness = [{one.name: one.open or 0.0 for one in found} for found in made.adapters]
    page.figure(
        openness_figure(dict(zip(made.captions, openness, strict=True)), needed),
        f"The {K} of {zoo} adapters that suit a prompt best by their weights, and how far the gate "
        "opens each; those that the prompt needs are bold. The gate sees embeddings alone, no "
        "names, and was trained on other pairs.",
        name="openness",
        table=(
            ("caption", "adapter", "needed", "open"),
            [[caption, name, name in own, value]
             for caption, own, found in zip(made.captions, needed, openness, strict=True)
             for name, value in found.items()],
        ),
    )  # fmt: skip
    page.figure(
        sheet_figure(rows_of_images(made), title="Unseen pairs", note="the same noise for all"),
        f"The true drawing, and images with what the gate opens, with the sum of all {K}, and with "
        "the two adapters that the prompt needs, which the last column alone is told.",
        name="pairs",
        table=(("caption", "column"), [[c, name] for c in made.captions for name in made.images]),
    )


def rows_of_images(made: Drawn) -> dict[str, dict[str, np.ndarray]]:
    """Return rows of images by way, for `diffusion.evaluation.figures.sheet_figure`."""
    return {
        caption: {name: images[[place]] for name, images in made.images.items()}
        for place, caption in enumerate(made.captions)
    }
