"""Losses of sets of adapters that a search retrieves, some of which captions need."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from core_gates.adapters import AdapterCapacity, RelevanceGate
from diffusion.data.concepts import Combination
from diffusion.data.paraphrases import in_other_words
from diffusion.data.scenes import Part, Scene, spread
from diffusion.evaluation.fusion_scores import fixed_draws
from diffusion.experiments.adapter_conditions import CaptionScores
from diffusion.experiments.combined_losses import note_trained, seed_of
from diffusion.experiments.made_images import judge_of, judged_right
from diffusion.experiments.trained_gates import (
    FILE,
    OTHER_WORDS,
    Bench,
    combinations,
    searched,
)
from diffusion.experiments.work import Job
from diffusion.fusion.fusion_tasks import FusionTask
from diffusion.fusion.gated_fusion import GatedFusion
from diffusion.fusion.protocol import Fusion
from diffusion.fusion.retrieved import Retrieved
from diffusion.lora_file import LoraBundle, load_lora
from diffusion.models.flow_matching import Noised, flow_matching_losses
from diffusion.rivals.opening import LESS_SIMILARITY, RULES, less_similarity
from diffusion.rivals.registry import make_rival
from harness.files.piece import Piece

GATE, NEEDED, TOLD, CONSTANT = "relevance gate", "needed", "needed of the six", "constant gates"
"""Ways without a rule: the gate, the needed adapters alone, those of them that were retrieved,
and gates that ship, which are open for all."""

TIMES, MOST = 8, 2  # times of a loss, and drawings of a combination
TRIED_TIMES = 3  # times where settings are chosen


class Sets(NamedTuple):
    """Combinations with the adapters that are retrieved for their captions.

    Attributes:
        bench: The base.
        library: Concept -> adapter.
        group: The combinations.
        tasks: Of each, whose adapters are those retrieved.
        floor: Smallest cosine of the best adapter for which any is used by default.
    """

    bench: Bench
    library: dict[str, LoraBundle]
    group: list[Combination]
    tasks: list[FusionTask]
    floor: float


def sets_of(
    base_folder: Path, encoder: Path, files: Mapping[str, Path], group: str, part: Part
) -> Sets:
    """Return the sets of the combinations of a group, for at most `MOST` drawings of a part each.

    Args:
        base_folder: Of the base.
        encoder: Folder of the encoder of adapters.
        files: Concept -> LoRA file.
        group: See `diffusion.experiments.trained_gates.combinations`.
        part: Of the drawings.
    """
    return _sets(base_folder, encoder, tuple(files.items()), group, part)


@lru_cache(maxsize=8)
def _sets(
    base_folder: Path, encoder: Path, files: tuple[tuple[str, Path], ...], group: str, part: Part
) -> Sets:
    bench, wanted = Bench.load(base_folder), combinations(group)
    read = {name: load_lora(file) for name, file in files}
    library = {n: replace(b, modules=dict(b.modules)) for n, b in read.items()}  # read once
    suits = CaptionScores(encoder, searched(library, group))
    say = in_other_words if group == OTHER_WORDS else Scene.caption
    tasks = suits.retrieved(bench.tasks(wanted, part, MOST, say))
    return Sets(bench, library, wanted, tasks, suits.floor(bench.base.encoder()))


def needed(pair: Combination, names: tuple[str, ...]) -> Tensor:
    """Return which of some adapters (K,) a combination needs, as 0 or 1."""
    return torch.tensor([float(name in pair.adapters) for name in names])


class Way(NamedTuple):
    """How retrieved adapters are used.

    Attributes:
        rule: One of `RULES`, of those above, or a rival.
        settings: Of it, with ``strength`` for what all adapters are multiplied by; with ``floor``
            nothing is opened where the best cosine is below that of the sets, as in `generate`.
        trained: Folder of trained gates.
    """

    rule: str
    settings: Mapping[str, Any] = {}
    trained: Path | None = None

    def opening(self, gate: RelevanceGate, found: Retrieved, pair: Combination) -> Tensor:
        """Return how far it opens adapters for captions (N, K)."""
        if self.rule == GATE:
            return gate.openness(found.cosines, found.similarities)
        if self.rule == TOLD:
            return needed(pair, found.names).expand_as(found.cosines)
        own = {n: value for n, value in self.settings.items() if n not in ("strength", "floor")}
        if self.rule == LESS_SIMILARITY:
            return less_similarity(found.cosines, found.similarities, **own)
        return RULES[self.rule](found.cosines, **own)

    def made(self, sets: Sets, pair: Combination, names: Sequence[str]) -> Fusion | None:
        """Return a merge, constant gates or the needed adapters of a set; None for the base."""
        model, own = sets.bench.base.transformer, dict(self.settings)
        adapters = {n: sets.library[n] for n in (pair.adapters if self.rule == NEEDED else names)}
        if not adapters:
            return None
        if self.rule != CONSTANT:
            return make_rival("sum" if self.rule == NEEDED else self.rule, model, adapters, **own)
        assert self.trained is not None
        fusion = GatedFusion(model, adapters, gates=self.trained / FILE)
        fusion.set_strengths(dict.fromkeys(adapters, own.get("strength", 1.0)))
        return fusion


Applied = tuple[Combination, FusionTask, Fusion | None, Tensor | None]


@torch.no_grad()
def applied(sets: Sets, way: Way, repeat: int = 1) -> Iterator[Applied]:
    """Yield each combination with its task, and the fusion in force with its openness (N, K).

    Args:
        sets: What is retrieved.
        way: How it is used.
        repeat: How often the captions come in a batch, one round after the other.
    """
    held = None
    if way.rule in (*RULES, LESS_SIMILARITY, GATE, TOLD):
        first = {name: sets.library[name] for name in sets.tasks[0].adapters}
        rank = max(max(bundle.ranks().values()) for bundle in sets.library.values())
        held = GatedFusion(
            sets.bench.base.transformer,
            first,
            mode="relevance",
            gates=None if way.trained is None else way.trained / FILE,
            everywhere=True,
            capacity=AdapterCapacity(len(first), rank),
        )
    with nullcontext() if held is None else held:
        for pair, task in zip(sets.group, sets.tasks, strict=True):
            if held is None:
                fusion = way.made(sets, pair, task.adapters)
                with nullcontext() if fusion is None else fusion:
                    yield pair, task, fusion, None
                continue
            assert task.found is not None
            held.set_adapters({name: sets.library[name] for name in task.adapters})
            held.suit(task.found)  # refuses a gate of another encoder
            gate = cast(RelevanceGate, held.context)
            value = way.opening(gate, task.found, pair)
            if way.settings.get("floor"):
                value = value * (task.found.cosines.amax(1, keepdim=True) >= sets.floor)
            gate.set_openness(way.settings.get("strength", 1.0) * value.repeat(repeat, 1))
            yield pair, task, held, value


@torch.no_grad()
def losses_of(sets: Sets, way: Way, times: int) -> dict[str, Tensor]:
    """Return the losses of each combination, and how far which adapters are open.

    Returns:
        ``losses`` (P,), means over drawings; of rules and gates ``needed_open``, ``useless_open``
        and ``any_open`` (P,): the mean openness of needed and of other adapters, NaN where there
        is none, and the fraction of captions with an adapter more than half open.
    """
    rows = []
    model, shift = sets.bench.base.transformer, sets.bench.base.shift
    for pair, task, _, openness in applied(sets, way, times):
        drawn = fixed_draws(task.latents, times, seed_of(pair.name), shift)
        at = Noised(*(torch.cat(parts) for parts in zip(*drawn, strict=True)))
        text = task.text.of(torch.arange(len(task.latents)).repeat(times))
        row = {"losses": flow_matching_losses(model, at, text).mean()}
        if openness is not None:
            wanted = needed(pair, task.adapters).bool()
            row["needed_open"] = openness[:, wanted].mean()
            row["useless_open"] = openness[:, ~wanted].mean()
            row["any_open"] = (openness > 0.5).any(1).float().mean()
        rows.append(row)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def way_of(piece: Piece, trained: Mapping[str, Path]) -> Way:
    """Return the way of a piece: its ``rule``, its settings, and the gates trained for it."""
    return Way(piece["rule"], piece.get("own") or {}, trained.get(piece.name))


def trial(
    piece: Piece, job: Job, base_folder: Path, files: Mapping[str, Path], encoder: Path,
    trained: Mapping[str, Path],
) -> dict[str, float]:  # fmt: skip
    """Return the mean logarithm of the losses of training combinations under a setting."""
    sets = sets_of(base_folder, encoder, files, piece["group"], "gate")
    own = dict(piece.get("fixed") or {}) | {name: piece[name] for name in piece["tuned"]}
    way = Way(piece["rule"], own, trained.get(piece["rule"]))
    score = float(losses_of(sets, way, TRIED_TIMES)["losses"].log().mean())
    job.tick()
    return {"score": score}


def retrieved_losses(
    piece: Piece, job: Job, base_folder: Path, files: Mapping[str, Path], encoder: Path,
    trained: Mapping[str, Path],
) -> dict[str, Tensor]:  # fmt: skip
    """Return what `losses_of` returns of each of the ``groups`` of a piece, as ``group.name``."""
    note_trained(job, trained.get(piece.name))
    found = dict[str, Tensor]()
    for group in piece["groups"]:
        sets = sets_of(base_folder, encoder, files, group, "test")
        values = losses_of(sets, way_of(piece, trained), TIMES)
        found |= {f"{group}.{name}": value for name, value in values.items()}
        job.tick()
    return found


def retrieved_images(
    piece: Piece, job: Job, base_folder: Path, files: Mapping[str, Path], encoder: Path,
    trained: Mapping[str, Path], judge: dict[str, Tensor],
) -> dict[str, Tensor]:  # fmt: skip
    """Return how often shape and style are both right in images, as ``group.both_right`` (P,)."""
    note_trained(job, trained.get(piece.name))
    found, network = dict[str, Tensor](), judge_of(judge)
    way = way_of(piece, trained)
    for group in piece["groups"]:
        sets, right = sets_of(base_folder, encoder, files, group, "test"), []
        base, empty = sets.bench.base, sets.bench.empty()
        for pair, task, *_ in applied(sets, way):
            shown = spread(pair.scenes("test"), MOST)
            seeds = [seed_of(pair.name) + number for number in range(len(shown))]
            made = base.images(task.text, empty, seeds=seeds, **piece["sampler"])
            both = judged_right(network, (made * 255).round().to(torch.uint8), shown)
            right.append(both["both_right"].mean())
        found[f"{group}.both_right"] = torch.tensor(right)
        job.tick()
    return found
