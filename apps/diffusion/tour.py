"""The diffusion stop of the tour: prompts, the adapters that they lead to, and images."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from apps.diffusion.embedded_world import World
from apps.diffusion.generate import PairImages, pair_images
from apps.diffusion.studio import GATED, SUM, Sources, shipped, studio
from diffusion.data.concepts import held_out_pairs
from diffusion.evaluation.figures import gate_map_figure, gate_table, sheet_figure
from harness.evidence import Resamples, moments
from harness.report.page import Page, StopSkippedError, TourRow, TourStop, TourTask
from harness.runs.terminal import SHORT, stepping

SHOWN = 4  # pairs of a subject and a style that no gate was trained on together

K = 3
SYSTEM = "AutoLoRA, embedded base"


@dataclass
class Found:
    """What prompts have led to.

    Attributes:
        names: The adapters that were found for each prompt, the best first.
        scores: Their scores.
        wanted: The two adapters that each prompt describes.
        zoo: Number of adapters that were searched.
    """

    names: list[list[str]]
    scores: list[list[float]]
    wanted: list[tuple[str, ...]]
    zoo: int

    @property
    def hits(self) -> int:
        """The number of wanted adapters among those that were found."""
        return sum(len({*one} & {*own}) for one, own in zip(self.wanted, self.names, strict=True))


def tour(folder: Path, say: Callable[[str], None], *, world: World | None = None) -> TourStop:
    """Find adapters by prompts, and make images with gates and with the plain sum.

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
            "--config fusion` trains them"
        )
    say("reading the base, and indexing adapters by their weights")
    pairs = held_out_pairs()
    chosen = pairs[:: len(pairs) // SHOWN][:SHOWN]
    with studio(Sources(), lambda: world, lambda *_: None) as found:
        say(f"making images of {len(chosen)} prompts, with gates and with the plain sum")
        made = pair_images(found, stepping("making images", chosen, seconds=SHORT))
        say("searching")
        matches = [found.finder.library.search(one, K, "weights") for one in made.captions]
        zoo = len(found.finder.library.adapters())
    searched = Found(
        [[match.name for match in own] for own in matches],
        [[match.score for match in own] for own in matches],
        [pair.adapters for pair in chosen],
        zoo,
    )
    draw = partial(_draw, found=searched, made=made)
    result = f"pixels err by {made.errors(GATED).mean():.2f} on a scale of 1"
    done = TourTask("draw a subject in a style, from a prompt", result, "gates diffusion generate")
    return TourStop("Image models: adapters by prompt", rows_of(searched, made), draw, [done])


def rows_of(found: Found, made: PairImages) -> list[TourRow]:
    """Return what was found, and how far images are from what is true."""
    wanted = sum(map(len, found.wanted))
    chance = wanted * K / found.zoo
    gap = made.errors(GATED) - made.errors(SUM)
    _, low, high, _ = Resamples.clusters(range(len(gap))).intervals(moments(gap, name="gap"))["gap"]
    verdict = "closer" if high < 0 else "farther" if low > 0 else "not distinguishable"
    return [
        TourRow(
            SYSTEM,
            f"right adapters among the {K} found of {found.zoo}",
            f"{found.hits} of {wanted}",
            f"chance {chance:.1f}",
            "by weights, which the encoder was trained on; by their names, all are found",
        ),
        TourRow(
            SYSTEM,
            "pixel error to the true drawing, unseen pairs",
            f"{made.errors(GATED).mean():.3f}",
            f"plain sum {made.errors(SUM).mean():.3f}, white {made.white_errors().mean():.3f}",
            f"{verdict}: {gap.mean():+.3f} [{low:+.3f}, {high:+.3f}]",
        ),
    ]


def _draw(page: Page, found: Found, made: PairImages) -> None:
    rows = made.rows()
    page.figure(
        sheet_figure(rows, title="Unseen pairs", note="the same noise for gates and the sum"),
        "A prompt is drawn by a model and two adapters, one trained on its subject, one on its "
        "style. The true drawing, and images with gates, with the plain sum and with the mean of "
        "the two wanted adapters.",
        name="pairs",
        table=(("caption", "column"), [[c, name] for c, row in rows.items() for name in row]),
    )
    page.text(
        f"Every prompt describes a subject in a style, which two of {found.zoo} adapters were "
        "trained on, each alone. They are found by their weights: titles and other metadata are "
        "not read. The encoder was trained on most of these adapters; what they are called is a "
        "word of each prompt, so that a search by names, which comes first in `search`, finds all. "
        "Gates were trained on other pairs; drawings and captions are unseen."
    )
    page.table(
        ["prompt", "found", "wanted"],
        [[caption,
          ", ".join(f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)),
          ", ".join(wanted)]
         for caption, names, scores, wanted in zip(
             made.captions, found.names, found.scores, found.wanted, strict=True)],
    )  # fmt: skip
    if made.gates is not None:
        page.figure(
            gate_map_figure(made.gates, note=made.captions[0]),
            "Mean gates of the first image by layer and step, over tokens and channels; 1 is open.",
            name="gates",
            table=gate_table(made.gates),
        )
