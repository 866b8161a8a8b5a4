"""Studies of the embedded base and its zoo: drawing, styles, parity, and search by weights."""

from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from apps.diffusion.embedded_world import World
from core_gates.errors import GatesError
from diffusion.data.concepts import concepts, held_out_pairs
from diffusion.data.paraphrases import PARAPHRASES
from diffusion.data.scenes import WORLD, Part, Scene, images_of, scenes, spread
from diffusion.data.shapes import NEW_SHAPES, SHAPES
from diffusion.data.styles import STYLES
from diffusion.evaluation.fusion_scores import Judge
from diffusion.evaluation.parity import ADVICE, COMPARISONS, TOLERANCE
from diffusion.evaluation.retrieval_scores import (
    BM25,
    chance,
    closeness,
    search_values,
)
from diffusion.experiments.made_images import (
    BATCH,
    judge_of,
    judged_right,
    make_images,
    prompts,
)
from diffusion.experiments.trained_gates import captions
from diffusion.experiments.word_reading import common_words, given, read_vectors
from diffusion.experiments.zoo import FOLDER, EncoderForm, captions_of
from diffusion.lora_file import LoraBundle, load_lora
from diffusion.models.flow_matching import GUIDANCE
from diffusion.retrieval import TrainedEncoder
from harness.evidence import Bar, Resamples, Row, compare, moments
from harness.experiment import Arrays, Piece, Run
from harness.files import Data
from harness.runs.terminal import working


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
        trained: Pieces of what is trained, by seed; empty if nothing is trained.
    """

    name: str
    rival: str
    settings: Mapping[str, Any]
    trained: Mapping[int, Piece] = {}


class Comparison(Protocol):
    """What figures of ways to use several adapters are made with.

    Attributes:
        run: Of the comparison.
        world: Base and zoo.
        files: Concept -> LoRA file.
        places: Where files are on this machine.
    """

    run: Run
    world: World
    files: dict[str, Path]
    places: dict[str, Any]

    @property
    def encoder(self) -> Path | None:
        """Folder of the encoder of adapters; None if it is missing."""

    def piece(self, method: Method, group: str, seed: int | None, **changes: Any) -> Piece:
        """Return the piece that a figure of a method on the test drawings of a group is."""


CAPTIONS, EACH, JUDGED = 256, 16, 4000  # images of the base, of each adapter, true drawings
SAMPLER: dict[str, Any] = {"steps": 20, "guidance": GUIDANCE}


def world_data(part: Part = "test") -> Data:
    """Return the data set of a part's scenes, with the digest that tells it from others."""
    shown = scenes(part)
    digest = sha256(repr((WORLD, shown, held_out_pairs())).encode()).hexdigest()
    return Data("scenes", part, digest, len(shown), "scenes of the base")


FRESH: Part = "gate"
"""Scenes that neither base nor adapters are trained on; sums of 16 pairs in their colors chose the
length of adapters."""


def shown_scenes(name: str) -> list[Scene]:
    """Return the unseen scenes that are drawn by the base (``none``) or an adapter of a concept."""
    if name == "none":
        return spread(scenes(FRESH), CAPTIONS)
    concept = next(concept for concept in concepts() if concept.name == name)
    return prompts(concept.scenes(FRESH), EACH)


def image_pieces(world: World) -> list[Piece]:
    """Return the pieces of images of the base, and of each adapter."""
    return [
        world.run.piece(
            name,
            captions=captions(shown_scenes(name)),
            start=world.base_fingerprint,
            adapter=None if name == "none" else world.zoo_digest,
            **SAMPLER,
        )
        for name in ("none", *(concept.name for concept in world.concepts))
    ]


def made_images(world: World) -> dict[str, Tensor]:
    """Return ``none`` or concept -> images (N, 3, 32, 32) uint8, made where they are missing."""
    store, pieces = world.run.store("images", Arrays()), image_pieces(world)
    work = partial(make_images, base_folder=world.base_folder, adapters=world.zoo(0))
    world.run.obtain(store, pieces, work, ticks=lambda p: -(-len(p["captions"]) // BATCH))
    return {piece.method: store.load(piece)["images"] for piece in pieces if store.find(piece)}


def base_study(asked: Asked, world: World) -> None:
    """Score what a judge names in images of unseen captions, by the base and by each adapter."""
    judge = judge_of(world.judge())
    judged = {
        name: judged_right(judge, images, shown_scenes(name))
        for name, images in made_images(world).items()
    }
    rows = base_rows(judge, judged)
    values = {(row.method, row.task, row.metric): row.value for row in rows}
    bars = [
        Bar(
            f"{method}, {task}: {metric.replace('_', ' ')}", values[method, task, metric], ">=", bar
        )
        for method, task, metric, bar in (
            (TRUE, UNSEEN_SCENES, "style_right", 0.97),
            (TRUE, UNSEEN_SCENES, "shape_right", 0.97),
            ("base", UNSEEN_SCENES, "both_right", 0.85),
            ("adapters", ALONE, "concept_right", 0.8),
        )
    ]
    asked.run.finish(
        rows,
        bars,
        seeds=[0],
        data=[world_data(FRESH)],
        headline=(
            f"Of {CAPTIONS} unseen captions the embedded base draws shape and style right in "
            f"{bars[2].value:.0%}, and its 40 adapters alone their concept in {bars[3].value:.0%}."
        ),
    )


TRUE, UNSEEN_SCENES, ALONE = "true drawings", "unseen captions", "each adapter alone"


def base_rows(judge: Judge, found: Mapping[str, Mapping[str, np.ndarray]]) -> list[Row]:
    """Return how often the judge is right about true drawings, the base, and each adapter."""
    shown = shown_scenes("none")
    every = spread(scenes(FRESH, list(SHAPES), list(zip(STYLES, strict=True))), JUDGED)
    true = judged_right(judge, ((images_of(every) + 1) * 127.5).round(), every)
    rows = [Row(TRUE, UNSEEN_SCENES, name, float(right.mean()), n=len(every))
            for name, right in true.items()]  # fmt: skip
    draws = Resamples.clusters(
        [" ".join((scene.shape, scene.color, scene.ground)) for scene in shown]
    )
    for metric, right in found["none"].items():
        rows += compare({"base": [moments(right, name=metric)]}, draws, task=UNSEEN_SCENES)
    right_of = {
        concept.name: found[concept.name][
            f"{'shape' if concept.kind == 'subject' else 'style'}_right"
        ]
        for concept in concepts()
        if concept.name in found
    }
    draws = Resamples.clusters([name for name, right in right_of.items() for _ in right])
    alone = {
        "concept_right": np.concatenate(list(right_of.values())),
        "both_right": np.concatenate([found[name]["both_right"] for name in right_of]),
    }
    for metric, right in alone.items():
        rows += compare({"adapters": [moments(right, name=metric)]}, draws, task=ALONE)
    rows += [
        Row(name, ALONE, "concept_right", float(right.mean()), n=len(right))
        for name, right in right_of.items()
    ]
    return rows


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


UNSEEN = ("cup", "umbrella", "duotone", "rayed")
"""Concepts that no encoder is trained on."""

TRAINED = [concept.name for concept in concepts() if concept.name not in UNSEEN]

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
KNOWN, NEW = "known concepts", "new concepts"
MEAN, WORD = "nearest mean caption", "nearest word"
READ, SHIPPED, WORDS = "answers to words", "adapters that ship, none of them known", 3000
TOLD = (
    "Captions, words, phrases and metadata are told more: what an adapter was trained with. "
    "Encoders and answers to words know its weights alone."
)


class Searched(NamedTuple):
    """Q descriptions without the words of adapters, and the N adapters that are searched."""

    text: Tensor
    captions: list[str]
    owners: list[str]
    names: list[str]
    bundles: list[LoraBundle]

    def relevant(self) -> np.ndarray:
        """Return whether an adapter is right (Q, N)."""
        return np.array(self.owners)[:, None] == np.array(self.names)[None]

    def tasks(self) -> dict[str, np.ndarray]:
        """Return task -> places of its descriptions.

        Concepts are known that encoders have been trained on; subjects and styles among these
        are two further tasks.
        """
        new = np.isin(self.owners, UNSEEN)
        subjects = np.isin(self.owners, list(NEW_SHAPES))
        groups = {KNOWN: ~new, "known subjects": ~new & subjects, "known styles": ~new & ~subjects}
        return {task: np.flatnonzero(members) for task, members in (groups | {NEW: new}).items()}


def encoder_of(world: World) -> Path | None:
    """Return the folder of the encoder of the adapters of a world; None if it is missing."""
    piece = world.encoder_piece("encoder", 0, concepts=TRAINED, **ENCODER)
    folder = world.run.store("encoders", EncoderForm()).find(piece)
    return None if folder is None else folder / FOLDER


def retrieval_study(asked: Asked, world: World) -> None:
    """Score the search of independently trained adapters by captions that none has seen."""
    first, second = world.zoo(0), world.zoo(1)
    with working("reading what adapters answer to"):
        rows = rows_without_training(world, searched_of(world, first))
    if not second:  # in a quick run
        asked.run.finish(rows, seeds=asked.seeds, data=[world_data()], notes=[TOLD])
        return
    encoders = world.encoders(METHODS, asked.seeds, concepts=TRAINED)
    searched = searched_of(world, second)
    scores: dict[str, list[Any]] = {
        name: [searched.text @ vectors(one, searched.bundles).T for one in own]
        for name, own in encoders.items()
    }
    scores |= rivals(world, searched, first)
    for task, queries in searched.tasks().items():
        rows += _rows(scores, searched, queries, task)
    more, gap = cosines(
        encoders,
        [load_lora(first[name]) for name in TRAINED],
        [searched.bundles[searched.names.index(name)] for name in TRAINED],
    )
    own = {(r.method, r.task, r.metric): r for r in rows if not r.versus}
    found3, by_chance, read3 = (
        own[name, task, "recall@3"]
        for name, task in (("encoder", NEW), ("chance", NEW), (READ, SHIPPED))
    )
    bars = [
        Bar(
            "known concepts: recall@1 over that of nearest mean captions or words",
            own["encoder", KNOWN, "recall@1"].value
            - max(own[name, KNOWN, "recall@1"].value for name in (MEAN, WORD)),
            ">=",
            -0.01,
        ),
        Bar("new concepts: recall@3 over chance", found3.value / by_chance.value, ">=", 5),
        Bar("new concepts: recall@3, lower end", found3.low, ">=", by_chance.value),
        Bar(f"{READ}: recall@3 over chance", read3.value / by_chance.value, ">=", 5),
        Bar(f"{READ}: recall@3, lower end", read3.low, ">=", by_chance.value),
        Bar("intra − inter cosine", gap, ">=", 0.49),
    ]
    asked.run.finish(
        [*rows, *more],
        bars,
        seeds=asked.seeds,
        data=[world_data()],
        headline=(
            f"By its weights alone the right one of {len(second)} anonymous adapters comes first "
            f"for {own['encoder', KNOWN, 'recall@1'].value:.0%} of descriptions in other words, by "
            f"{MEAN} for {own[MEAN, KNOWN, 'recall@1'].value:.0%}; of new concepts "
            f"{found3.value:.0%} are among the first three, by chance {by_chance.value:.0%}."
        ),
        notes=[TOLD],
    )


def read_scores(world: World, searched: Searched) -> Tensor:
    """Return scores (Q, N) of adapters by the words that they answer to; nothing is trained."""
    words = [f"a {word}" for word in common_words(WORDS)]
    embedded = world.text.embed(words)
    found = read_vectors(searched.bundles, given(world.base, words), embedded)
    return (searched.text - embedded.mean(0)) @ found.T


def rows_without_training(world: World, searched: Searched) -> list[Row]:
    """Return retrieval scores of untrained methods."""
    found = {
        READ: [read_scores(world, searched)],
        WORD: [searched.text @ world.text.embed(searched.names).T],
    }
    return _rows(found, searched, np.arange(len(searched.owners)), SHIPPED, READ)


def searched_of(world: World, files: dict[str, Any]) -> Searched:
    """Embed the paraphrased descriptions of adapters as queries, and load the adapters."""
    queries = [text for name in files for text in PARAPHRASES[name]]
    owners = [name for name in files for _ in PARAPHRASES[name]]
    bundles = [load_lora(file) for file in files.values()]
    return Searched(world.text.embed(queries), queries, owners, list(files), bundles)


def vectors(encoder: TrainedEncoder, bundles: Sequence[LoraBundle]) -> Tensor:
    """Return the vectors (N, e) of adapters."""
    return torch.stack([encoder.encode(bundle) for bundle in bundles])


def rivals(
    world: World, searched: Searched, first: dict[str, Any]
) -> dict[str, list[Tensor | np.ndarray]]:
    """Return scores (Q, N) of what needs no trained encoder; of some, metadata or a known zoo."""
    told = [load_lora(first[name]).metadata for name in searched.names]
    index = BM25([" ".join(one.get(key, "") for key in TELLING) for one in told])
    own = [world.text.embed(captions_of(name, "adapter", ENCODER["captions"])) for name in first]
    means = torch.stack([one.mean(0) for one in own])
    nearest = torch.stack([(searched.text @ one.T).amax(1) for one in own], 1)
    return {
        "BM25 of the metadata of seed 0": [np.stack([*map(index.scores, searched.captions)])],
        "phrase lookup": [
            1.0
            * np.array(
                [
                    [name in caption.replace(",", "").split() for name in searched.names]
                    for caption in searched.captions
                ]
            ),
        ],
        "nearest caption": [nearest],
        MEAN: [searched.text @ means.T],
        WORD: [searched.text @ world.text.embed(list(first)).T],
        READ: [read_scores(world, searched)],
    }


def _rows(
    found: dict[str, list[Any]],
    searched: Searched,
    queries: np.ndarray,
    task: str,
    reference: str = "encoder",
) -> list[Row]:
    right = searched.relevant()[queries]
    values = {
        name: [search_values(np.asarray(run)[queries], right) for run in runs]
        for name, runs in found.items()
    }
    values["chance"] = [chance(right)]
    draws = Resamples.clusters([searched.owners[query] for query in queries])
    rows: list[Row] = []
    for metric in ("recall@1", "recall@3", "mrr"):
        scores = {
            name: [moments(run[metric], name=metric) for run in runs]
            for name, runs in values.items()
        }
        rows += compare(scores, draws, task=task, reference=reference)
    return rows


def cosines(
    encoders: dict[str, list[TrainedEncoder]],
    first: Sequence[LoraBundle],
    second: Sequence[LoraBundle],
) -> tuple[list[Row], float]:
    """Return how close the two adapters of a concept lie, and by how much closer than others."""
    rows, gaps = [], {}
    draws = Resamples.clusters(list(range(len(first))))
    for method, trained in encoders.items():
        measured = [
            closeness(vectors(encoder, first), vectors(encoder, second)) for encoder in trained
        ]
        for name in ("intra", "inter", "gap"):
            scores = [moments(run[name], name=f"{name} cosine") for run in measured]
            rows += compare({method: scores}, draws, task="cosines across training runs")
        gaps[method] = float(np.mean([run["gap"].mean() for run in measured]))
    return rows, gaps["encoder"]
