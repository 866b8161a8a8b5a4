"""Gates, and rivals that are trained like them, as pieces of work."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import lightning as L
import torch
from torch import nn

from core_gates.adapters import AdapterCapacity, RelevanceGate
from core_gates.errors import GatesError
from diffusion.data.concepts import (
    LEFT_OUT,
    Combination,
    held_out_pairs,
    of_no_adapter,
    of_one_adapter,
    training_pairs,
    with_second_style,
    with_useless,
)
from diffusion.data.published_table import inside
from diffusion.data.scenes import WORDINGS, Part, Scene, images_of, spread
from diffusion.experiments.adapter_conditions import CaptionScores, roles_of
from diffusion.experiments.work import ONE, Job, Machine
from diffusion.experiments.zoo import weights_digest
from diffusion.fusion.fusion_module import FusionModule, strategy_of
from diffusion.fusion.fusion_tasks import (
    FusionTask,
    PairDataModule,
    TargetImages,
    read_target_images,
    tasks_of,
)
from diffusion.fusion.gated_fusion import GatedFusion, global_lora
from diffusion.fusion.gates_file import gate_tensors, load_trained, save_trained
from diffusion.fusion.protocol import linear_sizes, with_roles
from diffusion.lora_file import LoraBundle, load_lora
from diffusion.lora_file.reading import Base
from diffusion.models.embedded_base import WEIGHTS, EmbeddedBase
from diffusion.models.pipelines import load_codec
from diffusion.models.text_encoders import TextEncoder, TextStates, text_encoder
from diffusion.rivals.registry import make_rival
from harness.files import content_digest
from harness.files.piece import Piece, read_record

OTHER_WORDS = "other2"
TRIED = 24  # training pairs, and as many triples, that settings are chosen on


class Bench(NamedTuple):
    """What every work on combinations needs.

    Attributes:
        base: The base.
        text: Its text encoder.
    """

    base: EmbeddedBase
    text: TextEncoder

    @classmethod
    def load(cls, base_folder: Path) -> Self:
        """Read the base."""
        base = EmbeddedBase.load(base_folder)
        return cls(base, base.encoder())

    def tasks(
        self,
        combinations: Sequence[Combination],
        part: Part,
        most: int,
        say: Callable[[Scene, int], str] = Scene.caption,
    ) -> list[FusionTask]:
        """Return tasks of combinations, with at most so many drawings of a part each."""
        scenes = [spread(pair.scenes(part), most) for pair in combinations]
        states = _states(
            self.base.text_encoder["name"],
            tuple(text for shown in scenes for text in captions(shown, say)),
        )
        built, start = [], 0
        for pair, shown in zip(combinations, scenes, strict=True):
            text = states.of(slice(start, start + len(shown)))
            built.append(FusionTask(pair.adapters, self.base.latents(images_of(shown)), text))
            start += len(shown)
        return built

    def empty(self) -> TextStates:
        """Return the states of the empty caption."""
        return self.text.encode([""])


def captions(
    scenes: Sequence[Scene], say: Callable[[Scene, int], str] = Scene.caption
) -> list[str]:
    """Return a caption of each scene, in all wordings, one after the other."""
    return [say(scene, number % WORDINGS) for number, scene in enumerate(scenes)]


@lru_cache(maxsize=8)
def _states(encoder: str, captions: tuple[str, ...]) -> TextStates:
    """Return the states of captions, which the pieces that a process works on share."""
    return text_encoder(encoder).encode(captions)


def combinations(group: str) -> list[Combination]:
    """Return combinations: ``train``, ``train2``, ``tried``, ``tried2``, ``test2``, ...

    ``train`` are the pairs and triples that gates are trained on, none of which holds a test pair;
    ``tried`` are some of them, which settings are chosen on; ``train2`` and ``tried2`` are their
    pairs, for methods for two adapters. ``test2`` are the test pairs, ``test3`` the same with a
    second style. ``train_useless`` and ``useless3`` are those of ``train`` and its pairs, and the
    test pairs, with an adapter that has nothing to do with them. ``train_fewer`` leaves the
    concepts of `diffusion.data.concepts.LEFT_OUT` out, as ``tried_fewer`` does, and ``new2`` are
    the pairs of these. ``retrieved`` and ``retrieved_fewer`` are ``train`` and ``train_fewer`` with
    what needs one adapter, or none; ``tried_retrieved`` and ``tried_retrieved_fewer`` are every
    second of ``tried`` and ``tried_fewer``, with some of these; ``one`` and ``none`` are 24 of
    each. ``other2`` are the test pairs, whose captions do not have the words of adapters.
    """
    tested, pairs = set(held_out_pairs()), training_pairs()
    triples = [
        pair
        for pair in with_second_style(pairs)
        if not any(Combination(pair.subject, (name,)) in tested for name in pair.styles)
    ]
    every = [*pairs, *held_out_pairs()]
    step2, step3 = len(pairs) // TRIED, len(triples) // TRIED
    single, bare = of_one_adapter(), of_no_adapter()
    fewer, single_fewer = (
        [o for o in group if not set(o.adapters) & set(LEFT_OUT)]
        for group in ((*pairs, *triples), single)
    )
    tried = [*pairs[::step2][:TRIED], *triples[::step3][:TRIED]]
    tried_fewer = fewer[:: len(fewer) // (2 * TRIED)][: 2 * TRIED]
    return {
        "train": [*pairs, *triples],
        "train2": pairs,
        "tried": tried,
        "tried2": pairs[::step2][:TRIED],
        "test2": held_out_pairs(),
        "test3": with_second_style(held_out_pairs(), shift=3),
        "train_useless": [*pairs, *triples, *with_useless(pairs)],
        "useless3": with_useless(held_out_pairs()),
        "train_fewer": fewer,
        "tried_fewer": tried_fewer,
        "retrieved": [*pairs, *triples, *single, *bare],
        "retrieved_fewer": [*fewer, *single_fewer, *bare],
        "tried_retrieved": [*tried[::2], *single[::8], *bare[::8]],
        "tried_retrieved_fewer": [*tried_fewer[::2], *single_fewer[::8], *bare[::8]],
        "one": spread(single, TRIED),
        "none": spread(bare, TRIED),
        OTHER_WORDS: held_out_pairs(),
        "new2": sorted(pair for pair in every if set(pair.adapters) <= set(LEFT_OUT)),
    }[group]


def searched(library: Mapping[str, LoraBundle], group: str) -> dict[str, LoraBundle]:
    """Return the adapters that a search for captions of a group of combinations may retrieve."""
    left = LEFT_OUT if "fewer" in group else ()
    return {name: bundle for name, bundle in library.items() if name not in left}


TRANSFORMER = "transformer"  # folder of the transformer in that of a pipeline of diffusers


def base_digest(base: Path) -> str | None:
    """Return 16 hexadecimal digits that distinguish what gates are trained in.

    Args:
        base: Folder of an embedded base, or of a pipeline, of which the transformer alone counts;
            beyond 1 GB names and sizes of its files are hashed.

    Returns:
        None for other files, such as GGUF, which do not tell what they were made of.
    """
    if (folder := base / TRANSFORMER).is_dir():
        return content_digest(folder).sha256[:16]
    return weights_digest(base) if (base / WEIGHTS).is_file() else None


def refuse_gates_of_another(base: Path, gates: Path) -> None:
    """Refuse gates whose record names another base.

    Args:
        base: Folder of the base, or a GGUF file.
        gates: File of gates, with its record next to it if it has one.

    Raises:
        GatesError: It does.
    """
    record = read_record(gates.parent)
    trained = None if record is None else record.facts.get("base")
    digest = base_digest(base)
    if trained is not None and digest is not None and trained != digest:
        raise GatesError(
            f"{gates} was trained on another base ({trained}), found {digest}: give the gates of "
            f"{base}"
        )


FILE = "gates.safetensors"
MOST = 4  # drawings of a combination in training

GATE_OPTIONS = ("mode", "variant", "time", "initialization", "factors", "switch")
"""Settings that are options of `diffusion.fusion.GatedFusion`."""

RIVAL_OPTIONS = ("layerwise", "names")  # settings that are options of a rival
MODULE_OPTIONS = ("steps", "learning_rate", "weight_rate", "schedule", "weight_decay", "contrast",
                  "margin", "relative")  # fmt: skip
DATA_OPTIONS = ("steps", "batch_size", "caption_dropout", "told")


class GatesForm:
    """A file of trained gates, or of another fusion that is trained, in bfloat16."""

    def save(self, folder: Path, result: Mapping[str, torch.Tensor]) -> None:
        """Write tensors to their file."""
        save_trained(folder / FILE, result)

    def load(self, folder: Path) -> dict[str, torch.Tensor]:
        """Read tensors from their file.

        Raises:
            GatesError: It is missing or damaged.
        """
        return load_trained(folder / FILE)


def is_gated(settings: Mapping[str, Any]) -> bool:
    """Return whether settings are of gates or of strengths by layer, not of another rival."""
    return "variant" in settings or "mode" in settings


def as_used(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with which trained gates or a trained rival are applied."""
    return dict(settings) if is_gated(settings) else options_in(settings, RIVAL_OPTIONS)


def options_in(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the settings of some names that are given; others have their defaults."""
    return {name: settings[name] for name in names if settings.get(name) is not None}


def with_common(adapters: Mapping[str, LoraBundle], rank: int | None) -> dict[str, LoraBundle]:
    """Return adapters with what they have in common as one more, where a rank is given."""
    return dict(adapters) | ({"common": global_lora(adapters, rank)} if rank else {})


def untrained(
    piece: Piece,
    model: nn.Module,
    adapters: Mapping[str, LoraBundle],
    capacity: AdapterCapacity | None,
    begin: Path | None = None,
) -> Any:
    """Return the fusion of a piece before it is trained."""
    if is_gated(piece.settings):
        options = options_in(piece.settings, GATE_OPTIONS)
        fusion = GatedFusion(
            model, adapters, gates=begin, everywhere=True, capacity=capacity, **options
        )
        if fusion.mode == "relevance":
            fusion.context = RelevanceGate(
                piece["threshold"], piece["width"], piece["less"], piece["encoder"]
            )
            for parameter in fusion.gates.parameters():
                nn.init.constant_(parameter, piece["strength"])
        return fusion
    options = options_in(piece.settings, RIVAL_OPTIONS)
    return make_rival(piece.get("rival", piece.method), model, adapters, **options)


def train_gates(
    piece: Piece,
    job: Job,
    base_folder: Path,
    files: Mapping[str, Path],
    machine: Machine = ONE,
    **given: Any,
) -> dict[str, torch.Tensor]:
    """Train gates on the training pairs and triples.

    Args:
        piece: What the gates are, and how they are trained.
        job: Of the training.
        base_folder: Of the base.
        files: Concept -> LoRA file.
        machine: Where they are trained.
        given: Further arguments of `fitted`.
    """
    L.seed_everything(piece.seed, verbose=False)
    bench = Bench.load(base_folder)
    group = combinations(piece.get("group", "train"))
    tasks = bench.tasks(group, "gate", MOST)
    if piece.get("contrast"):
        plain = bench.tasks([pair._replace(styles=()) for pair in group], "gate", MOST)
        tasks = [replace(task, wrong=bare.text) for task, bare in zip(tasks, plain, strict=True)]
    job.note(combinations=len(group), base=weights_digest(base_folder))
    library = {name: load_lora(file) for name, file in files.items()}
    library = searched(library, piece.get("group", "train"))
    model, empty = bench.base.transformer, bench.empty()
    shift = bench.base.shift
    return fitted(piece, job, model, library, tasks, empty, machine, shift, **given)


def train_own_gates(
    piece: Piece,
    job: Job,
    csv: Path,
    base_folder: Path,
    size: int | None,
    machine: Machine = ONE,
    **given: Any,
) -> dict[str, torch.Tensor]:
    """Train gates on the images of a table; ``given`` are further arguments of `fitted`."""
    L.seed_everything(piece.seed, verbose=False)
    shown, codec = read_target_images(csv), load_codec(base_folder, size)
    contrast = bool(piece.get("contrast"))
    tasks = tasks_of(
        shown, codec, partners=piece["partners"], contrast=contrast, seed=piece.seed or 0
    )
    library = library_of(shown, csv, linear_sizes(codec.transformer))
    empty = codec.states([""])
    codec.release()
    job.note(combinations=len(tasks), base=base_digest(base_folder))
    model, shift = codec.transformer, codec.shift
    return fitted(piece, job, model, library, tasks, empty, machine, shift, **given)


def library_of(shown: Sequence[TargetImages], csv: Path, base: Base) -> dict[str, LoraBundle]:
    """Return the adapters that a table names.

    Raises:
        GatesError: One is missing or damaged, or belongs to another base.
    """
    names = dict.fromkeys(name for pair in shown for name in pair.adapters)
    return {name: load_lora(inside(csv.parent, name), base) for name in names}


def fitted(
    piece: Piece,
    job: Job,
    model: nn.Module,
    library: Mapping[str, LoraBundle],
    tasks: Sequence[FusionTask],
    empty: TextStates,
    machine: Machine,
    shift: float,
    roles: Mapping[str, str] | None = None,
    **files: Path | None,
) -> dict[str, torch.Tensor]:
    """Train gates on tasks, and return their tensors by the names they have in the file.

    Args:
        piece: What is trained.
        job: Of the training.
        model: The base.
        library: Name -> adapter.
        tasks: What it is trained on.
        empty: States of the empty caption.
        machine: Of the training.
        shift: Of the times.
        roles: Name -> role, in place of what tags name.
        files: ``begin``: gates or strengths to begin at; ``encoder``: what scores adapters, or
            retrieves them for a relevance gate.
    """
    if piece.get("switch") and (encoder := files.get("encoder")) is not None:
        tasks = CaptionScores(encoder, library).scored(tasks)
    if piece.get("mode") == "relevance" and (encoder := files.get("encoder")) is not None:
        tasks = CaptionScores(encoder, library).retrieved(tasks)
    rank = piece.get("global_rank")
    first = with_common({name: library[name] for name in tasks[0].adapters}, rank)
    widest = max(max(bundle.ranks().values()) for bundle in library.values())
    capacity = AdapterCapacity(
        max(len(task.adapters) for task in tasks) + bool(rank), max(widest, rank or 0)
    )
    fusion = untrained(piece, model, first, capacity, files.get("begin"))
    module = FusionModule(
        fusion,
        library,
        roles=with_roles(roles_of(piece.settings, library), roles or {}),
        common=partial(global_lora, rank=rank) if rank else None,
        checkpointing=machine.checkpointing,
        **options_in(piece.settings, MODULE_OPTIONS),
    )
    own = options_in(piece.settings, DATA_OPTIONS)
    data = PairDataModule(tasks, empty, shift=shift, seed=piece.seed or 0, **own)
    options = {"precision": piece.get("precision", "bf16-mixed"), **machine.trainer()}
    if machine.processes > 1:
        options["strategy"] = strategy_of(machine.strategy, machine.processes)
    job.fit(module, data, ticks="steps", max_steps=piece["steps"], **options)
    gated = is_gated(piece.settings)
    return gate_tensors(fusion.gate_states()) if gated else dict(fusion.state_dict())
