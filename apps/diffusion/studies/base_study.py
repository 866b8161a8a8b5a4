"""Studies of the embedded base and its zoo: drawing, styles, parity, and search by weights."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from apps.diffusion.embedded_world import World
from core_gates.errors import GatesError
from diffusion.data.concepts import base_rows, caption_of, concepts, rows_of, style
from diffusion.data.drawings import STYLES
from diffusion.evaluation.fusion_scores import ranks_of
from diffusion.evaluation.parity import ADVICE, COMPARISONS, TOLERANCE
from diffusion.evaluation.retrieval_scores import (
    BM25,
    by_captions,
    chance,
    concept_cosines,
    delta_cosine,
    search_values,
    sketches,
)
from diffusion.experiments.made_images import BATCH, STYLE_NAMES, judge_of, judged, make_images
from diffusion.experiments.zoo import captions_of, images_of, shape_of, spread
from diffusion.lora_file import LoraBundle, load_lora
from diffusion.retrieval import TrainedEncoder, collate, modules_of
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


UNSEEN = ("food-vegetable", "musical-instrument", "duotone", "scanned")
"""Concepts that no encoder is trained on."""

QUERIES = 12  # captions of a concept that are searched for; fewer where it has fewer

ENCODER: dict[str, Any] = {
    "encoder": {"dim": 64, "depth": 2, "heads": 4, "head_dim": 16, "hidden_dim": 256},
    "steps": 600,
    "captions": 96,
    "learning_rate": 2e-3,
    "loss": "contrastive",
    "augmented": True,
}  # how the shipped encoder is trained

PUBLISHED = ENCODER | {
    "encoder": ENCODER["encoder"]
    | {"normalization": "none", "attention_mask": "causal", "missing": "mask"},
    "loss": "published",
    "augmented": False,
}  # the published loss and mask at the same size

METHODS = {
    "encoder": ENCODER,
    "published loss and mask": PUBLISHED,
    "published loss and mask, augmented": PUBLISHED | {"augmented": True},
}
TELLING = ("modelspec.title", "modelspec.tags", "modelspec.trigger_phrase", "ss_tag_frequency")
TASKS = {"seen": "36 trained concepts", "unseen": "four unseen concepts"}


class Searched(NamedTuple):
    """Q captions that no adapter has seen, and the N adapters that are searched."""

    text: Tensor
    captions: list[str]
    owners: list[str]
    names: list[str]
    bundles: list[LoraBundle]

    def relevant(self) -> np.ndarray:
        """Return whether an adapter is right (Q, N)."""
        return np.array(self.owners)[:, None] == np.array(self.names)[None]

    def part(self, unseen: bool) -> np.ndarray:
        """Return the captions of concepts that encoders have not, or have, been trained on."""
        return np.flatnonzero(np.isin(self.owners, UNSEEN) == unseen)


def retrieval_study(asked: Asked, world: World) -> None:
    """Score the search of independently trained adapters by captions that none has seen."""
    trained = [one.name for one in concepts() if one.name not in UNSEEN]
    encoders = world.encoders(METHODS, asked.seeds, concepts=trained)
    first, second = world.zoo(0), world.zoo(1)
    searched = searched_of(world, second)
    found: dict[str, list[Any]] = {
        name: [searched.text @ vectors(one, searched.bundles).T for one in own]
        for name, own in encoders.items()
    }
    found |= rivals(world, searched, first)
    rows: list[Row] = []
    for key, task in TASKS.items():
        rows += _rows(found, searched, searched.part(key == "unseen"), task)
    more, gap = cosines(encoders, searched, first, trained)
    recall = {r.metric: r.value for r in rows if (r.method, r.task, r.versus) == (
        "encoder", TASKS["seen"], "")}  # fmt: skip
    bars = [
        Bar("recall@1 of unseen adapters", recall["recall@1"], ">=", 0.8),
        Bar("recall@3 of unseen adapters", recall["recall@3"], ">=", 0.95),
        Bar("intra − inter cosine", gap, ">=", 0.49),
    ]
    asked.run.finish(
        [*rows, *more, *sizes(encoders, first)],
        bars,
        seeds=asked.seeds,
        data=[Data("drawings", "all", world.drawings.digest, len(world.drawings), "drawings")],
        headline=(
            f"By its weights alone the right one of {len(second)} anonymous adapters of another "
            f"training comes first for {recall['recall@1']:.0%} of unseen captions."
        ),
        notes=notes_of(rows),
    )


def notes_of(rows: Sequence[Row]) -> list[str]:
    """Return what speaks against the encoder."""

    def recall(method: str, task: str) -> float:
        return next(
            row.value
            for row in rows
            if (row.method, row.task, row.metric, row.versus) == (method, task, "recall@1", "")
        )

    nearest = "nearest caption, then ΔW of seed 0"
    return [
        f"Captions of the {len(UNSEEN)} concepts that no encoder was trained on find their adapter "
        f"first in {recall('encoder', TASKS['unseen']):.1%}, by chance in "
        f"{recall('chance', TASKS['unseen']):.1%}: the encoder does not know new concepts.",
        f"Where a zoo of known captions is at hand, {nearest} finds "
        f"{recall(nearest, TASKS['seen']):.1%}, the encoder "
        f"{recall('encoder', TASKS['seen']):.1%}.",
    ]


def searched_of(world: World, files: dict[str, Any]) -> Searched:
    """Return captions of the test part and the anonymous adapters of seed 1."""
    captions, owners = [], []
    for name in files:
        own = spread(captions_of(world.drawings, name, "test"), QUERIES)
        captions += own
        owners += [name] * len(own)
    bundles = [load_lora(file) for file in files.values()]
    return Searched(world.text.embed(captions), captions, owners, list(files), bundles)


def vectors(encoder: TrainedEncoder, bundles: Sequence[LoraBundle]) -> Tensor:
    """Return the vectors (N, e) of adapters."""
    return torch.stack([encoder.encode(bundle) for bundle in bundles])


def rivals(
    world: World, searched: Searched, first: dict[str, Any]
) -> dict[str, list[Tensor | np.ndarray]]:
    """Return scores (Q, N) of what needs no trained encoder; of some, metadata or a known zoo."""
    told = [load_lora(first[name]).metadata for name in searched.names]
    with_metadata = BM25([" ".join(one.get(key, "") for key in TELLING) for one in told])
    without = BM25([""] * len(searched.names))
    known = [load_lora(file) for file in first.values()]
    texts = [
        spread(captions_of(world.drawings, name, "adapter"), ENCODER["captions"]) for name in first
    ]
    by_words = BM25([" ".join(own) for own in texts])
    embedded = world.text.embed([text for own in texts for text in own])
    owners = torch.tensor([place for place, own in enumerate(texts) for _ in own])
    modules = modules_of(shape_of(world.base))
    old, new = collate(known, modules), collate(searched.bundles, modules)
    delta = delta_cosine(old, new).float()
    sketch = (sketches(old, modules) @ sketches(new, modules).T).float()
    return {
        "BM25 of the metadata of seed 0": [_bm25(with_metadata, searched)],
        "BM25 of the captions of seed 0": [_bm25(by_words, searched)],
        "BM25 without metadata": [_bm25(without, searched)],
        "nearest caption, then ΔW of seed 0": [by_captions(searched.text, embedded, owners, delta)],
        "nearest caption, then untrained sketch": [
            by_captions(searched.text, embedded, owners, sketch)
        ],
    }


def _bm25(index: BM25, searched: Searched) -> np.ndarray:
    return np.stack([index.scores(caption) for caption in searched.captions])


def _rows(
    found: dict[str, list[Any]], searched: Searched, queries: np.ndarray, task: str
) -> list[Row]:
    right = searched.relevant()[queries]
    values = {
        name: [search_values(np.asarray(one)[queries], right) for one in own]
        for name, own in found.items()
    }
    values["chance"] = [chance(right)]
    draws = Resamples.clusters([searched.owners[query] for query in queries])
    rows: list[Row] = []
    for metric in ("recall@1", "recall@3", "mrr", "ndcg"):
        scores = {
            name: [moments(one[metric], name=metric) for one in own] for name, own in values.items()
        }
        rows += compare(scores, draws, task=task, reference="encoder")
    return rows


def cosines(
    encoders: dict[str, list[TrainedEncoder]],
    searched: Searched,
    first: dict[str, Any],
    trained: Sequence[str],
) -> tuple[list[Row], float]:
    """Return how close the two adapters of a concept lie, and by how much closer than others."""
    rows, gaps = [], {}
    known = [load_lora(first[name]) for name in trained]
    kept = [place for place, name in enumerate(searched.names) if name in set(trained)]
    for method, own in encoders.items():
        found = [
            concept_cosines(
                vectors(one, known),
                list(trained),
                vectors(one, [searched.bundles[place] for place in kept]),
                [searched.names[place] for place in kept],
            )
            for one in own
        ]
        draws = Resamples.clusters(found[0].concepts)
        for name in ("intra", "inter", "gap"):
            scores = [moments(getattr(one, name), name=f"{name} cosine") for one in found]
            rows += compare({method: scores}, draws, task="cosines across training runs")
        gaps[method] = float(np.mean([one.gap.mean() for one in found]))
    return rows, gaps["encoder"]


def sizes(encoders: dict[str, list[TrainedEncoder]], first: dict[str, Any]) -> list[Row]:
    """Return what each way to search by weights has to keep, in MB."""
    task = "size"
    rows = [
        Row(name, task, "kept_MB", sum(p.numel() for p in own[0].encoder.parameters()) * 2 / 1e6)
        for name, own in encoders.items()
    ]
    zoo = sum(file.stat().st_size for file in first.values()) / 1e6
    return [*rows, Row("nearest caption, then ΔW of seed 0", task, "kept_MB", zoo)]
