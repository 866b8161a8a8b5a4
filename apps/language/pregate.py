"""``gates language pregate``: what a model loses whose gates read the input of an earlier layer."""

import io
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np

from apps.language.byte_scores import ModelFolder
from apps.language.diagnose import opened
from core_gates.errors import GatesError
from core_gates.gates.top_k import TopKGate
from core_gates.moe.experts import StackedExperts
from harness.command.verbs import Place
from harness.evidence import Bar, Resamples, Row, compare, moments
from harness.experiment import Job, Piece, Run, Store
from language.data import LanguageDataModule
from language.decoder import Decoder
from language.gated.gate_training import GatedModel, bits_per_token
from language.hf.gate_file import weights_digest
from language.hf.pregating import level_of, pregate, save_pregated
from language.hf.pretrained import open_model
from language.module import LanguageModule
from language.tokenizer import Tokenizer, load_tokenizer

BYTES, BASES, MODELS = "bytes", "bases", "models"
CONTROL, LEVEL, BEFORE = "conventional", "level {}", "{}, not trained"
METRIC = "nats per token"
SIZES = {
    **{"dim": 128, "num_layers": 6, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32},
    **{"hidden_dim": 64, "qk_norm": True, "tie_embeddings": True},
}
"""Of the mixture of bytes: six layers of 16 experts, two for each token, 2.8 million weights."""

NOTE = (
    "All models start at the same weights and are trained with the same batches and steps, without"
    " a loss of balance. Intervals are over held-out windows and seeds; differences are paired."
)


@dataclass(frozen=True)
class PregateRecipe:
    """How models are trained.

    Attributes:
        levels: Layers of experts between a decision and its use, a model for each.
        corpus: Files, folders, or ``python``.
        context: Tokens of a window.
        batch_size: Windows of a step.
        steps: Steps of fine-tuning, at whose end the learning rate is a tenth.
        learning_rate: Largest learning rate of fine-tuning.
        base_steps: Steps of the mixture of bytes before that.
    """

    levels: tuple[int, ...] = (1, 2)
    corpus: tuple[str, ...] = ("python",)
    context: int = 128
    batch_size: int = 8
    steps: int = 120
    learning_rate: float = 1e-3
    base_steps: int = 450

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            GatesError: One makes no sense.
        """
        for name in ("context", "batch_size", "steps", "base_steps"):
            if getattr(self, name) < 1:
                raise GatesError(f"--{name} is {getattr(self, name)}, expected 1 or more")
        if not 0 < self.learning_rate < float("inf"):
            raise GatesError(f"--learning_rate is {self.learning_rate}, expected more than 0")
        if not self.levels or min(self.levels) < 1:
            raise GatesError(f"--levels is {list(self.levels)}, expected some from 1")


class ModelForm:
    """A model of transformers, pre-gated or not, with its tokenizer."""

    def save(self, folder: Path, result: tuple[Any, Tokenizer]) -> None:
        """Write the model."""
        model, tokenizer = result
        if level_of(model) is None:
            with redirect_stderr(io.StringIO()):  # a progress bar
                model.save_pretrained(folder)
        else:
            save_pregated(model, folder)
        tokenizer.save(folder)

    def load(self, folder: Path) -> Path:
        """Return the folder."""
        return folder


def windows(recipe: PregateRecipe, tokenizer: str, cache: Path, seed: int) -> LanguageDataModule:
    """Return the windows of a corpus, in an order of the seed."""
    return LanguageDataModule(
        recipe.corpus, tokenizer, recipe.context, recipe.batch_size, str(cache), seed
    )


def train_base(
    piece: Piece, job: Job, recipe: PregateRecipe, cache: Path
) -> tuple[Decoder, Tokenizer]:
    """Train the mixture of bytes."""
    L.seed_everything(piece.seed, verbose=False)
    tokenizer, gate = load_tokenizer(BYTES), partial(TopKGate, num_experts=16, k=2)
    experts = partial(StackedExperts, hidden_dim=64)
    sizes: dict[str, Any] = {**SIZES, "context": recipe.context}
    model = Decoder(tokenizer.vocab_size, gate=gate, experts=experts, **sizes)
    module = LanguageModule(model, 3e-3, warmup_steps=50, losses={"balance": 0.01})
    _fit(job, module, windows(recipe, BYTES, cache, 0), piece["base_steps"])
    return model.eval(), tokenizer


def fine_tune(
    piece: Piece, job: Job, folder: Path, recipe: PregateRecipe, cache: Path
) -> tuple[Any, Tokenizer]:
    """Fine-tune a model, pre-gated if the piece has a level, and note what it needs of windows."""
    L.seed_everything(piece.seed, verbose=False)
    model, data = open_model(folder), windows(recipe, str(folder), cache, piece.seed or 0)
    if piece["level"]:
        pregate(model, piece["level"])
    held_out = data.val_dataloader()
    before = bits_per_token(model, held_out)
    whole: Any = GatedModel(model, "all", recipe.context)
    _fit(job, LanguageModule(whole, piece["learning_rate"], warmup_steps=0), data, piece["steps"])
    job.note(before=before, after=bits_per_token(model, held_out))
    return model, data.shards.tokenizer


def _fit(job: Job, module: LanguageModule, data: LanguageDataModule, steps: int) -> None:
    job.fit(
        module, data, ticks="steps", max_steps=steps, max_epochs=-1, gradient_clip_val=1.0,
        limit_val_batches=0,
    )  # fmt: skip
    job.note(objects=data.training_objects())


def pregate_models(
    place: Place,
    recipe: PregateRecipe,
    model: str = BYTES,
    seeds: tuple[int, ...] = (0, 1, 2),
    most_lost: float | None = 0.02,
    overwrite: bool = False,
) -> None:
    """Fine-tune a model with pre-gates next to the same model without, on the same batches.

    A killed command continues. Scores in nats per held-out token, and differences, are printed and
    written to the run; the folders of the models are in it, too.

    Args:
        place: Filled in by the command line.
        recipe: Filled in by the command line.
        model: Folder of a mixture model as transformers writes it, or ``bytes``, a small decoder of
            bytes that is trained first.
        seeds: Seeds of the order of windows.
        most_lost: The most nats that the first level may lose; no bar if null.
        overwrite: Replace models of the run that were trained with other settings.
    """
    if not seeds or min(seeds) < 0:
        raise GatesError(f"--seeds is {list(seeds)}, expected one or more from 0")
    cache = place.run_folder.path.parent / "cache"
    run = place.run(overwrite=overwrite)
    folder = base_of_bytes(run, recipe, cache) if model == BYTES else Path(model)
    found = opened(place, str(folder))
    found.require_context(recipe.context)
    for level in recipe.levels:
        pregate(open_model(folder), level)  # which refuses models and levels
    data = windows(recipe, str(folder), cache, 0)
    data.prepare_data()
    given = {n: v for n, v in asdict(recipe).items() if n in ("context", "batch_size", "steps")}
    given |= {"learning_rate": recipe.learning_rate, "base": weights_digest(found.model)}
    given["digest"] = [one.sha256 for one in data.digest()]
    pieces = [
        run.piece(f"level-{level}" if level else CONTROL, seed, level=level, **given)
        for seed in seeds
        for level in (0, *recipe.levels)
    ]
    store: Store[Any] = run.store(MODELS, ModelForm())
    work = partial(fine_tune, folder=folder, recipe=recipe, cache=cache)
    run.obtain(store, pieces, work, ticks=recipe.steps, unit="steps")
    facts = {piece: store.record(piece).facts for piece in pieces}
    rows = rows_of(facts)
    lost = next(row for row in rows if row.versus and row.method == LEVEL.format(recipe.levels[0]))
    name = f"{lost.method}: {METRIC} above {CONTROL}"
    bars = [] if most_lost is None else [Bar(name, lost.value, "<=", most_lost)]
    run.finish(
        rows, bars, seeds=seeds, data=data.digest(), headline=headline(rows), notes=[NOTE]
    )  # fmt: skip
    for piece in pieces:
        print(store.find(piece))


def base_of_bytes(run: Run, recipe: PregateRecipe, cache: Path) -> Path:
    """Return the folder of the mixture of bytes, trained if it is missing."""
    windows(recipe, BYTES, cache, 0).prepare_data()
    settings = {n: getattr(recipe, n) for n in ("corpus", "context", "batch_size", "base_steps")}
    piece = run.piece(BYTES, 0, **{**settings, "corpus": list(recipe.corpus)})
    store = run.store(BASES, ModelFolder())
    work = partial(train_base, recipe=recipe, cache=cache)
    run.obtain(store, [piece], work, ticks=recipe.base_steps, unit="steps")
    found = store.find(piece)
    assert found is not None
    return found


def rows_of(facts: dict[Piece, Any]) -> list[Row]:
    """Return nats per token of every model, and the differences from the conventional one."""
    scores: dict[str, list[Any]] = {}
    for piece, own in facts.items():
        level = piece["level"]
        nats = {name: np.log(2) * np.array(own[name]) for name in ("before", "after")}
        name = LEVEL.format(level) if level else CONTROL
        scores.setdefault(name, []).append(moments(nats["after"], name=METRIC))
        scores[BEFORE.format(name)] = [moments(nats["before"], name=METRIC)]
    draws = Resamples.clusters(range(len(next(iter(facts.values()))["after"])))
    return compare(scores, draws, task="fine-tuning", reference=CONTROL)


def headline(rows: Sequence[Row]) -> str:
    """Return what each level loses after equal training."""
    said = [
        f"{row.method} {row.value:+.4f} [{row.low:+.4f}, {row.high:+.4f}]"
        for row in rows
        if row.versus and row.method.startswith(LEVEL.format("")) and "," not in row.method
    ]
    return f"{METRIC.capitalize()} of pre-gated models above {CONTROL} ones: {', '.join(said)}."
