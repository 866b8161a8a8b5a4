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

from apps.language.diagnose import opened
from apps.language.fit_gates import FineTuning
from apps.language.generate import EXPERTS
from core_gates.errors import GatesError
from harness.command.verbs import Place
from harness.evidence import Bar, Resamples, Row, compare, moments
from harness.experiment import Job, Piece, Written
from language.data import LanguageDataModule
from language.gated.gate_training import GatedModel, bits_per_token
from language.hf.gate_file import weights_digest
from language.hf.pregating import level_of, pregate, save_pregated
from language.hf.pretrained import open_model
from language.module import LanguageModule
from language.tokenizer import Tokenizer

MODELS, LISTS = "models", ("corpus", "levels")
CONTROL, LEVEL, BEFORE = "conventional", "level {}", "{}, not trained"
METRIC = "nats per token"
NOTE = (
    "All models start at the same weights and are trained with the same batches and steps, without"
    " a loss of balance. Intervals are over held-out windows and seeds; differences are paired."
)


@dataclass(frozen=True)
class PregateRecipe(FineTuning):
    """How models are trained.

    Attributes:
        levels: Layers of experts between a decision and its use, a model for each.
    """

    context: int = 128
    batch_size: int = 8
    steps: int = 480
    warmup_steps: int = 0
    levels: tuple[int, ...] = (1, 2)


def write_tuned(folder: Path, result: tuple[Any, Tokenizer]) -> None:
    """Write a model of transformers, pre-gated or not, with its tokenizer."""
    model, tokenizer = result
    write = save_pregated if level_of(model) else type(model).save_pretrained
    with redirect_stderr(io.StringIO()):  # a progress bar
        write(model, folder)
    tokenizer.save(folder)


def fine_tune(
    piece: Piece, job: Job, model: Path, data: LanguageDataModule
) -> tuple[Any, Tokenizer]:
    """Fine-tune a model, pre-gated if the piece has a level, and note what it needs of windows."""
    L.seed_everything(piece.seed, verbose=False)
    tuned = open_model(model)
    data.seed = piece.seed or 0
    if piece["level"]:
        pregate(tuned, piece["level"])
    held_out = data.val_dataloader()
    before = bits_per_token(tuned, held_out)
    whole: Any = GatedModel(tuned, "all", piece["context"])
    module = LanguageModule(whole, piece["learning_rate"], warmup_steps=piece["warmup_steps"])
    job.fit(
        module, data, ticks="steps", max_steps=piece["steps"], max_epochs=-1,
        gradient_clip_val=1.0, limit_val_batches=0,
    )  # fmt: skip
    after = bits_per_token(tuned, held_out)
    job.note(objects=data.training_objects(), before=before, after=after)
    return tuned, data.shards.tokenizer


def pregate_models(
    place: Place,
    recipe: PregateRecipe,
    model: str = EXPERTS,
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
        model: Folder of a mixture model as transformers writes it, or ``experts``, the mixture of
            bytes that ships.
        seeds: Seeds of the order of windows.
        most_lost: The most nats that the first level may lose; no bar if null.
        overwrite: Replace models of the run that were trained with other settings.
    """
    if not seeds or min(seeds) < 0 or not recipe.levels:
        raise GatesError(
            f"--levels is {list(recipe.levels)} and --seeds is {list(seeds)}, expected one or more"
            " of each, seeds from 0"
        )
    run, pretrained = place.run(overwrite=overwrite), opened(place, model)
    pretrained.require_context(recipe.context)
    for level in recipe.levels:
        pregate(open_model(pretrained.folder), level)  # which refuses models and levels
    cache = str(place.run_folder.path.parent / "cache")
    data = LanguageDataModule(
        recipe.corpus, str(pretrained.folder), recipe.context, recipe.batch_size, cache
    )
    data.prepare_data()
    given = {name: value for name, value in asdict(recipe).items() if name not in LISTS}
    given |= {
        "base": weights_digest(pretrained.model),
        "digest": [file.sha256 for file in data.digest()],
    }
    pieces = [
        run.piece(f"level-{level}" if level else CONTROL, seed, level=level, **given)
        for seed in seeds
        for level in (0, *recipe.levels)
    ]
    store = run.store(MODELS, Written(write_tuned))
    work = partial(fine_tune, model=pretrained.folder, data=data)
    run.obtain(store, pieces, work, ticks=recipe.steps, unit="steps")
    rows = rows_of({piece: store.record(piece).facts for piece in pieces})
    lost = next(row for row in rows if row.versus and row.method == LEVEL.format(recipe.levels[0]))
    name = f"{lost.method}: {METRIC} above {CONTROL}"
    bars = [] if most_lost is None else [Bar(name, lost.value, "<=", most_lost)]
    run.finish(
        rows, bars, seeds=seeds, data=data.digest(), headline=headline(rows), notes=[NOTE]
    )  # fmt: skip
    for piece in pieces:
        print(store.find(piece))


def rows_of(facts: dict[Piece, Any]) -> list[Row]:
    """Return nats per token of every model, and the differences from the conventional one."""
    scores: dict[str, list[Any]] = {}
    for piece, piece_facts in facts.items():
        level = piece["level"]
        nats = {name: np.log(2) * np.array(piece_facts[name]) for name in ("before", "after")}
        name = LEVEL.format(level) if level else CONTROL
        scores.setdefault(name, []).append(moments(nats["after"], name=METRIC))
        scores[BEFORE.format(name)] = [moments(nats["before"], name=METRIC)]
    draws = Resamples.clusters(range(len(next(iter(facts.values()))["after"])))
    return compare(scores, draws, task="fine-tuning", reference=CONTROL)


def headline(rows: Sequence[Row]) -> str:
    """Return a sentence on how much loss each level adds after equal training."""
    said = [
        f"{row.method} {row.value:+.4f} [{row.low:+.4f}, {row.high:+.4f}]"
        for row in rows
        if row.versus and row.method.startswith(LEVEL.format("")) and "," not in row.method
    ]
    return f"{METRIC.capitalize()} of pre-gated models above {CONTROL} ones: {', '.join(said)}."
