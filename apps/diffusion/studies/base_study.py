"""Does the embedded base draw what it is told, and does each style adapter draw in its style?"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from apps.diffusion.embedded_world import World
from core_gates.errors import GatesError
from diffusion.data.concepts import base_rows, caption_of, rows_of, style
from diffusion.data.drawings import STYLES
from diffusion.evaluation.fusion_scores import ranks_of
from diffusion.evaluation.parity import ADVICE, COMPARISONS, TOLERANCE
from diffusion.experiments.made_images import BATCH, STYLE_NAMES, judge_of, judged, make_images
from diffusion.experiments.zoo import images_of
from harness.evidence import Bar, Resamples, Row, compare, moments
from harness.experiment import Arrays, Piece, Run
from harness.files import Data


class Asked(NamedTuple):
    """Options of ``evaluate``.

    Attributes:
        run: In the run folder of the configuration.
        seeds: Of what is trained for the study.
        vectors: Folder of golden vectors; None for that of the configuration.
    """

    run: Run
    seeds: tuple[int, ...] = (0, 1, 2)
    vectors: Path | None = None


class Method(NamedTuple):
    """A row of the tables.

    Attributes:
        name: In tables.
        rival: What computes it.
        settings: Of it.
        trained: Folders of what was trained, by seed; empty if nothing is trained.
    """

    name: str
    rival: str
    settings: Mapping[str, Any]
    trained: Mapping[int, Path] = {}


class Comparison(Protocol):
    """What figures of ways to use several adapters are made with.

    Attributes:
        run: Of the comparison.
        world: Base, zoo and drawings.
        files: Concept -> LoRA file.
        places: Where files are on this machine.
    """

    run: Run
    world: World
    files: dict[str, Path]
    places: dict[str, Any]

    def piece(self, method: Method, group: str, seed: int | None, **changes: Any) -> Piece:
        """Return the piece that a figure of a method on the test drawings of a group is."""


CAPTIONS, STYLED = 256, 16
SAMPLER = {"steps": 20, "guidance": 3.0}


def base_study(asked: Asked, world: World) -> None:
    """Score recall of training captions, and the styles that a judge sees in images."""
    rows, bars = recall(world)
    more, styles = styled(world)
    headline = (
        f"Of {CAPTIONS} training captions the embedded base draws {bars[0].value:.0%} nearest to "
        f"the right one of all {len(world.drawings):,} drawings; a judge names the style of "
        f"{styles.value:.0%} of the images that style adapters make."
    )
    asked.run.finish(
        [*rows, *more],
        [*bars, styles],
        seeds=[0],
        data=[Data("drawings", "all", world.drawings.digest, len(world.drawings), "drawings")],
        headline=headline,
    )


def chosen_rows(world: World) -> np.ndarray:
    """Return the training drawings of the base whose captions are drawn again."""
    rows = base_rows(world.drawings)
    return np.sort(np.random.default_rng(0).choice(rows, CAPTIONS, replace=False))


def styled_rows(world: World, name: str) -> np.ndarray:
    """Return the drawings whose captions the adapter of a style draws, evenly spread."""
    unseen = rows_of(world.drawings, style(name), "test")
    return unseen[:: len(unseen) // STYLED][:STYLED]


def image_pieces(world: World) -> tuple[Piece, list[Piece]]:
    """Return the piece of images of the base, and those of each style adapter."""
    captions = world.drawings.captions
    made: dict[str, Any] = {**SAMPLER, "start": world.base_fingerprint}
    plain = world.run.piece(
        "none", captions=[str(one) for one in captions[chosen_rows(world)]], **made
    )
    pieces = []
    for name in STYLES:
        rows = styled_rows(world, name)
        pieces.append(
            world.run.piece(
                name,
                captions=[caption_of(str(one), (name,)) for one in captions[rows]],
                adapter=world.adapter_piece(style(name), 0).fingerprint,
                **made,
            )
        )
    return plain, pieces


def obtained(world: World) -> tuple[Tensor, dict[str, Tensor]]:
    """Return images (256, 3, 32, 32) of the base, and style -> images (16, 3, 32, 32), uint8."""
    plain, pieces = image_pieces(world)
    store = world.run.store("images", Arrays())
    files = world.zoo(0, [style(name) for name in STYLES])
    work = partial(make_images, base_folder=world.base_folder, adapters=files)
    world.run.obtain(store, [plain, *pieces], work, ticks=lambda p: -(-len(p["captions"]) // BATCH))
    styled = {piece.method: store.load(piece)["images"] for piece in pieces if store.find(piece)}
    return store.load(plain)["images"], styled


def recall(world: World) -> tuple[list[Row], list[Bar]]:
    """Return how often the right drawing is nearest, next to that of its reconstruction."""
    images, _ = obtained(world)
    wanted = torch.from_numpy(chosen_rows(world))
    drawings = images_of(world.drawings, np.arange(len(world.drawings)))
    own = drawings[wanted]
    ceiling = world.base.vae.decode(world.base.vae.encode(own), return_dict=False)[0].clamp(-1, 1)
    found = {
        "base": images.float() / 127.5 - 1,
        "autoencoder alone": ceiling,
        "mean drawing": drawings.mean(0, keepdim=True).expand(len(own), -1, -1, -1),
    }
    rows: list[Row] = []
    ranks = {name: ranks_of(made, drawings, wanted).numpy() for name, made in found.items()}
    draws = Resamples.clusters(wanted.tolist())
    for k in (1, 10):
        scores = {name: [moments(own <= k, name=f"recall@{k}")] for name, own in ranks.items()}
        rows += compare(scores, draws, task="training captions")
    bars = [
        Bar(f"recall@{k} of training captions", float(np.mean(ranks["base"] <= k)), ">=", bar)
        for k, bar in ((1, 0.7), (10, 0.9))
    ]
    return rows, bars


def styled(world: World) -> tuple[list[Row], Bar]:
    """Return how often the judge names the style of an adapter, next to real drawings."""
    _, images = obtained(world)
    judge = judge_of(world.judge())
    real = judged(world.drawings, "test")
    names = list(images)
    hits = {}
    for name in names:
        hits[name] = (judge.named(images[name].float() / 255)[0] == STYLE_NAMES.index(name)).numpy()
    rows = []
    draws = Resamples.clusters([name for name in names for _ in range(STYLED)])
    every = np.concatenate([hits[name] for name in names])
    rows += compare(
        {"style adapters": [moments(every, name="style named")]}, draws, task="images of styles"
    )
    rows += [
        Row(name, "images of styles", "style named", float(hits[name].mean()), n=STYLED)
        for name in names
    ]
    right = torch.cat(
        [
            judge.named(part.float() / 255)[0] == place
            for part, place in zip(real.images.split(512), real.styles.split(512), strict=True)
        ]
    )
    rows.append(Row("real drawings", "images of styles", "style named", float(right.float().mean()),
                    n=len(right)))  # fmt: skip
    return rows, Bar("style that the judge names", float(every.mean()), ">=", 0.8)


def parity_study(asked: Asked, _: World) -> None:
    """Score the worst relative error of each comparison, and note where it is too large.

    Raises:
        GatesError: No folder of golden vectors is given, or a file of it is missing or damaged.
    """
    if asked.vectors is None:
        raise GatesError(f"parity compares with golden vectors: {ADVICE}, as --vectors")
    run, rows, notes = asked.run, [], []
    for name in (name for name in COMPARISONS if not run.only or name in run.only):
        errors = dict(COMPARISONS[name](asked.vectors))
        at = max(errors, key=errors.__getitem__)
        rows.append(Row(name, "golden vectors", "worst", errors[at], n=len(errors)))
        notes += [f"{name}: worst at {at}"] * (errors[at] > TOLERANCE)
    run.finish(
        rows,
        [Bar(row.method, row.value, "<=", TOLERANCE) for row in rows],
        seeds=[0],
        data=[Data.of("golden vectors", "all", asked.vectors)],
        headline=f"{len(rows) - len(notes)} of {len(rows)} figures of "
        f"{sum(row.n for row in rows):,} comparisons agree.",
        notes=notes,
    )
