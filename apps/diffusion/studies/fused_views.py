"""How combinations are scored, and their images, retention and cost: what losses do not show."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from apps.diffusion.studies.base_study import SAMPLER, Comparison, Method
from diffusion.data.concepts import Combination
from diffusion.evaluation.fusion_scores import pixel_errors
from diffusion.experiments.combined_losses import FITTING, fusion_of, seen_losses
from diffusion.experiments.made_images import (
    fused_images,
    judge_of,
    judged_right,
    prompts,
    retained,
)
from diffusion.experiments.trained_gates import Bench, GatesForm, combinations, train_gates
from diffusion.lora_file import load_lora
from diffusion.models.flow_matching import velocity
from diffusion.models.text_encoders import TextStates
from harness.evidence import Resamples, Row, compare, moments
from harness.experiment import Arrays, Piece, Run, SettingsDiffer, Store
from harness.files import remove
from harness.files.piece import read_record
from harness.runs.cost import interleaved_seconds, peak_bytes


def crossed(combinations: Sequence[Combination]) -> Resamples:
    """Return resamples of combinations, by their subjects, by each style and by useless adapters.

    Combinations of one subject have its adapter and its drawings in common, those of one style its
    adapter: all are drawn.

    Args:
        combinations: Of each sample, all of them with equally many adapters.
    """
    return Resamples.crossed(
        *zip(*(combination.adapters for combination in combinations), strict=True)
    )


def refuse_stale(run: Run, store: Store[Any], trained: Mapping[Piece, Piece]) -> None:
    """Refuse, or remove, what was made with other weights than the current ones.

    Works note the fingerprint of what was trained; a result without a note is taken as it is.

    Args:
        run: In whose folder results are.
        store: Of the results.
        trained: Piece of a result -> piece of what is trained for it.

    Raises:
        SettingsDiffer: A result was made with other weights, and may not be replaced.
    """
    for piece, weights in trained.items():
        path = store.find(piece)
        record = None if path is None else read_record(path)
        known = weights.fingerprint if record is None else record.facts.get("trained")
        if path is None or known in (None, weights.fingerprint):
            continue
        if not run.overwrite:
            raise SettingsDiffer(
                f"{path} was made with {weights.name} of other settings ({known}, now "
                f"{weights.fingerprint}): give --name NEW for another run, or --overwrite to "
                "replace it"
            )
        remove(path)


PAIRS = "test2"  # of which combinations they are shown

SEEING = {"lorahub (sees the pair)": "lora_hub"}
"""Method -> rival."""


def losses_of_seeing(compared: Comparison) -> dict[str, list[np.ndarray]]:
    """Return method -> mean losses (P,) of the unseen pairs, after what is missing was fitted.

    A quick run fits nothing.
    """
    store = compared.run.store("losses", Arrays())
    pieces = [
        compared.piece(Method(name, rival, FITTING[rival]), PAIRS, None)
        for name, rival in SEEING.items()
    ]
    work = partial(seen_losses, form=Arrays(), **compared.places)
    made = compared.run.obtain(store, pieces, work, ticks=len(combinations(PAIRS)))
    return {
        piece.method: [np.nanmean(store.load(piece)["losses"].numpy(), axis=1)] for piece in made
    }


DRAWN, FEWER_DRAWN = 16, 4  # images of a pair and of a triple
COSTED = 32  # images of the batch that is timed


def pictured(fused: Comparison, methods: Sequence[Method], group: str, task: str) -> list[Row]:
    """Return rows of pixel errors of images, and of how often style, shape and both are right."""
    most = DRAWN if group == PAIRS else FEWER_DRAWN
    pictures = stored(fused, methods, "images", fused_images, group, most=most, **SAMPLER)
    judge = judge_of(fused.world.judge())
    some = next(iter(pictures.values()))[0]
    group_of = combinations(group)
    draws = crossed([group_of[place] for place in some["combination"].tolist()])
    shown = [scene for group in group_of for scene in prompts(group.scenes("test"), most)]
    true = some["true"] / 255
    every = {
        name: [
            {"pixel_rmse": pixel_errors(arrays["made"] / 255, true).numpy()}
            | judged_right(judge, arrays["made"], shown)
            for arrays in runs
        ]
        for name, runs in pictures.items()
    }
    white = torch.ones_like(true[:1]).expand(true.shape)
    every["white image"] = [{"pixel_rmse": pixel_errors(white, true).numpy()}]
    every["drawings"] = [judged_right(judge, some["true"], shown)]
    rows: list[Row] = []
    for metric in next(iter(every.values()))[0]:
        values = {
            name: [moments(run[metric], name=metric) for run in runs if metric in run]
            for name, runs in every.items()
        }
        reference = "gates" if "gates" in values else None
        rows += compare(values, draws, task=f"images of {task}", reference=reference)
    return rows


def stored(
    fused: Comparison,
    methods: Sequence[Method],
    kind: str,
    work: Callable[..., Any],
    group: str,
    **changes: Any,
) -> dict[str, list[dict[str, Any]]]:
    """Return method -> what is stored for a group, a result per seed of what is trained.

    What is missing is made, after the gates that it needs were trained: results that ship need
    none.

    Args:
        fused: The comparison.
        methods: Of them.
        kind: Folder of the results.
        work: Makes one that is missing.
        group: Of combinations.
        changes: Of the settings of a piece.
    """
    run, store = fused.run, fused.run.store(kind, Arrays())
    pieces: dict[str, list[Piece]] = {}
    trained: dict[Piece, Piece] = {}
    for method in methods:
        for seed in method.trained or (None,):
            piece = fused.piece(method, group, seed, **changes)
            pieces.setdefault(method.name, []).append(piece)
            if seed is not None:
                trained[piece] = method.trained[seed]
    refuse_stale(run, store, trained)
    places, gates = fused.places | {"encoder": fused.encoder}, run.store("gates", GatesForm())
    missing = store.missing([piece for wanted in pieces.values() for piece in wanted])
    needed = [trained[piece] for piece in missing if piece in trained]
    run.obtain(
        gates, needed, partial(train_gates, **places), ticks=lambda piece: int(piece["steps"])
    )
    folders = {p.name: gates.find(trained[p]) for p in missing if p in trained}
    work = partial(work, trained=folders, **places)
    ready = [piece for piece in missing if folders.get(piece.name, piece) is not None]
    run.obtain(store, ready, work, ticks=len(combinations(group)), scoring=True)
    loaded = {
        name: [store.load(p) for p in wanted if store.find(p)] for name, wanted in pieces.items()
    }
    return {name: runs for name, runs in loaded.items() if runs}


KINDS, RETENTION, BOTH = ("subject", "style"), "retention in unseen pairs", "both_right"


def retained_of(kind: str) -> str:
    """Return the metric of what is left of one of `KINDS`."""
    return f"{kind}_log_loss_over_alone"


def retention_rows(fused: Comparison, methods: Sequence[Method]) -> list[Row]:
    """Return how much of the gain of each adapter of a pair is left for its own concept."""
    loaded = stored(fused, methods, "retained", retained, PAIRS, what="retention")
    draws = crossed(combinations("test2"))
    rows: list[Row] = []
    for place, kind in enumerate(KINDS):
        metric = retained_of(kind)
        scores = {
            name: [moments(run["ratios"][:, place].numpy(), name=metric) for run in runs]
            for name, runs in loaded.items()
        }
        rows += compare(scores, draws, task=RETENTION)
    return rows


def cost_rows(fused: Comparison, methods: Sequence[Method]) -> list[Row]:
    """Return seconds and memory of a step with two adapters, over those of the base alone.

    Each method has a copy of the base; all are timed interleaved.
    """
    pair = combinations("test2")[0]
    adapters = {name: load_lora(fused.files[name]) for name in pair.adapters}
    functions: dict[str, Callable[[], Any]] = {}
    gates = fused.run.store("gates", GatesForm())
    for method in methods:
        bench = Bench.load(fused.world.base_folder)
        task = bench.tasks([pair], "test", COSTED)[0]
        weights = next(iter(method.trained.values()), None)
        trained = None if weights is None else gates.find(weights)
        fusion = fusion_of(bench, method.rival, method.settings, adapters, trained)
        if fusion is not None:
            fusion.attach()
        repeat = torch.arange(COSTED) % len(task.latents)
        functions[method.name] = partial(
            step, bench.base.transformer, task.latents[repeat], task.text.of(repeat)
        )
    seconds = interleaved_seconds(functions)
    memory = {name: peak_bytes(function) for name, function in functions.items()}
    title = f"cost of a step, {COSTED} images, two adapters"
    return [
        Row(name, title, f"{what}_over_none", value / measured["none"])
        for what, measured in (("seconds", seconds), ("memory", memory))
        for name, value in measured.items()
        if name != "none"
    ]


@torch.no_grad()
def step(model: Any, x: torch.Tensor, text: TextStates) -> torch.Tensor:
    """Return the velocity of a batch."""
    return velocity(model, x, torch.full((len(x),), 0.5), text)
