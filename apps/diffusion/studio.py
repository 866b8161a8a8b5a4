"""What makes images: a base, a library of adapters and gates, found, read and checked."""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

from apps.diffusion.adapter_files import roles_of
from apps.diffusion.embedded_world import EMBEDDED, LIBRARY, World
from apps.diffusion.finder import Finder
from apps.diffusion.search import read_encoder
from apps.diffusion.studies.base_study import encoder_of
from core_gates.errors import GatesError, check_option
from diffusion.data.shapes import BASE_SHAPES
from diffusion.experiments.trained_gates import FILE, GatesForm, refuse_gates_of_another
from diffusion.experiments.zoo import shape_of, weights_digest
from diffusion.fusion.baking import depends_on_roles
from diffusion.fusion.gated_fusion import Mode
from diffusion.fusion.gates_file import load_gates, mode_of
from diffusion.fusion.pipeline import AutoLoraPipeline, Generated
from diffusion.fusion.protocol import family_of, sites_of
from diffusion.library import LoraLibrary
from diffusion.library.prompts import told_words
from diffusion.models.embedded_base import EmbeddedBase
from diffusion.models.pipelines import load_pipeline
from diffusion.models.text_encoders import MiniLM, TextEncoder
from diffusion.retrieval import TrainedEncoder
from diffusion.rivals import RIVALS, make_rival
from harness.files import content_digest
from harness.files.piece import read_record


@dataclass(frozen=True)
class Sources:
    """Where everything is read from.

    Attributes:
        library: Folder of adapters, which is indexed; those that ship if null.
        base: Folder of a pipeline of diffusers or of an embedded base, or a GGUF file; the embedded
            base that ships if null.
        gates: File of trained gates, which decides how adapters are combined; those that ship for
            the embedded base, and none for others, if null.
        encoder: Folder of the encoder of adapters; the shipped one for the embedded base if null.
        index: Folder of the index; .gates-index in the library if null.
        least: Smallest cosine of prompt and weights of adapters that are found and not named; if
            null, what prompts of images that no adapter draws hardly ever reach.
        components: Folder of a pipeline with all other parts, for a GGUF file.
        dtype: Type of the parameters of other bases than the embedded one.
        offload: What is moved to a device at a time, where its memory is small.
    """

    library: str | None = None
    base: str | None = None
    gates: str | None = None
    encoder: str | None = None
    index: str | None = None
    least: float | None = None
    components: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    offload: Literal["none", "model", "sequential", "group"] = "none"


DRAWS = (
    f"this base draws one of {len(BASE_SHAPES)} shapes, {', '.join(BASE_SHAPES)}, and what adapters"
    " that the prompt names add; it does not know the rest of the prompt"
)


GATED, SUM, STRENGTHS, RELEVANCE = get_args(Mode)
RIVAL_MODES = tuple(
    name
    for name, rival in RIVALS.items()
    if not (rival.trainable or rival.sees_pair or name == SUM)
)  # rivals that need neither training nor images of the pair

MODES = (*get_args(Mode), *RIVAL_MODES)


def maker(mode: str) -> Any:
    """Return the mode, or a function that makes the rival of that name.

    Raises:
        GatesError: There is no such mode, or it needs more than adapters and gates.
    """
    if mode in RIVALS and mode not in MODES:
        raise GatesError(f"--mode {mode} has to be trained first: choose from {list(MODES)}")
    check_option("--mode", mode, MODES, GatesError)
    return mode if mode in get_args(Mode) else partial(make_rival, mode)


USED = {
    RELEVANCE: ("retrieved", "relevance_gate-s0"),
    GATED: (EMBEDDED, "gates-s0"),
    STRENGTHS: (EMBEDDED, "layer_strengths_+_role-s0"),
}
"""Mode -> the run that trains what it needs, and the folder of that."""

TRAIN = {
    RELEVANCE: "evaluate --config retrieved",
    GATED: "train-gates",
    STRENGTHS: "train-gates --what strengths --role_fraction 1",
}  # what trains it


class Shipped(NamedTuple):
    """Paths of what is at hand.

    Attributes:
        base: Folder of the base; None if it is missing.
        adapters: Concept -> file of its adapter of seed 0; empty if some are missing.
        encoder: Folder of the encoder of adapters; None if it is missing.
        gates: Mode -> file of what it needs; without what is missing, or of another base or zoo.
    """

    base: Path | None
    adapters: dict[str, Path]
    encoder: Path | None
    gates: dict[str, Path]

    @property
    def lacking(self) -> list[str]:
        """Names of the parts that are missing."""
        names = ("base", "adapters", "encoder")
        gate = [] if RELEVANCE in self.gates else ["relevance gate"]
        return [name for name in names if not getattr(self, name)] + gate


def shipped(world: World) -> Shipped:
    """Return the files of a world that exist: base, adapters, encoder and gates.

    Raises:
        GatesError: The run folder holds results with other settings.
    """
    adapters = world.zoo_files(0)
    return Shipped(
        world.bases.find(world.base_piece),
        adapters,
        encoder_of(world) if adapters else None,
        {m: file for m in USED if adapters and (file := _gates(world, *USED[m])) is not None},
    )


def _gates(world: World, run: str, folder: str) -> Path | None:
    store = world.beside(run).store("gates", GatesForm())
    for place in (store.folder, store.shipped):
        record = None if place is None else read_record(place / folder)
        if record is not None and record.settings.get("start") == world.zoo_digest:
            assert place is not None
            return place / folder / FILE
    return None


Progress = Callable[[int, int | None], None]
NO_GATES = "no gates are given: adapters are combined by their sum"
LACKING = (
    "the gates were trained with one more adapter, what all have in common in rank {}: it takes no"
    " part here"
)
DIGITS = 16


@dataclass
class Studio:
    """What makes images.

    Attributes:
        pipe: Finds adapters, fuses them and generates.
        finder: The library.
        base: The embedded base; None for other models.
        gates: File of gates; None if there are none.
        hashes: Of base, gates and encoder.
        model: Name of the base.
        dtype: Type of the parameters of the base; None for the embedded one, which has its own.
        mode: How adapters are combined where nothing else is asked for.
        notices: What a user has to know.
    """

    pipe: AutoLoraPipeline
    finder: Finder
    base: EmbeddedBase | None
    gates: Path | None
    hashes: dict[str, str | None]
    model: str
    dtype: str | None = None
    mode: str = SUM
    notices: list[str] = field(default_factory=list)

    @property
    def guided(self) -> bool:
        """Whether images are guided away from those of another prompt; FLUX.1 knows its scale."""
        return self.base is not None or self.pipe.family != "flux"

    def options(self, steps: int, guidance: float | None, size: int | None) -> dict[str, Any]:
        """Return the options of the pipeline of diffusers.

        Raises:
            GatesError: The base cannot make images of this size.
        """
        if self.base is not None and size not in (None, self.base.size):
            raise GatesError(
                f"--size is {size}, the embedded base makes images of {self.base.size} pixels:"
                " leave it out"
            )
        scale = "guidance_scale" if self.base is None else "true_cfg_scale"
        options: dict[str, Any] = {"num_inference_steps": steps}
        if guidance is not None:
            options[scale] = guidance
        side = size if self.base is None else self.base.size
        if side is not None:
            options |= {"height": side, "width": side}
        return options

    def unread(self, prompt: str) -> str:
        """Return a warning that a prompt is too long for the text encoder, or nothing."""
        rest = self.pipe.text.unread(prompt) if isinstance(self.pipe.text, MiniLM) else ""
        return f"the prompt is too long for this base, which does not read {rest!r}" if rest else ""

    def unknown(self, prompt: str, scores: Mapping[str, float | None]) -> str:
        """Return a warning that the embedded base cannot draw what a prompt asks for.

        Such a prompt names no shape of the base, and calls no adapter that is not one of a style.

        Args:
            prompt: What was asked for.
            scores: Of the search, by adapter; None for one that was named instead.
        """
        asked = told_words(prompt)
        named = [item.name for item in self.finder.found if item.named]
        taken = [name for name, score in scores.items() if score is None or name in named]
        drawable = any(told_words(shape) in asked for shape in BASE_SHAPES) or any(
            "style" not in self.finder.library.find(name).tags for name in taken
        )
        return "" if drawable or self.base is None else DRAWS

    def make(
        self,
        prompt: str,
        *,
        mode: str | None = None,
        roles: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Generated:
        """Return an image, and what made it.

        Args:
            prompt: What to show.
            mode: How adapters are combined; that of the studio if None.
            roles: Name -> role; by default see `apps.diffusion.adapter_files.roles_of`.
            options: Of the pipeline.

        Raises:
            GatesError: There is nothing trained for the mode, or roles have to be given.
        """
        asked = mode or self.mode
        if asked in TRAIN and self.gates is None:
            raise GatesError(
                f"--mode {asked} needs what is trained for it: run `gates diffusion"
                f" {TRAIN[asked]}`, or give --gates FILE"
            )
        known_roles = partial(
            roles_of,
            given=roles or {},
            ask=self.gates is not None and depends_on_roles(self.gates),
        )
        return self.pipe(
            prompt,
            mode=maker(asked),
            roles=known_roles if asked in (GATED, STRENGTHS) else None,
            record_gates=asked == GATED,
            **options,
        )

    def close(self) -> None:
        """Close the index."""
        self.finder.library.close()


def studio(
    sources: Sources,
    world: Callable[[], World],
    progress: Progress,
    mode: str | None = None,
    check: Callable[["Studio"], object] = lambda _: None,
) -> closing[Studio]:
    """Return a studio on an up-to-date library of adapters, as a context that closes its index.

    Args:
        sources: Where everything is read from.
        world: Returns the embedded world, called only where what ships is needed.
        progress: Of the scan of the library.
        mode: How adapters will be combined, which decides the file of gates that ships; if None, as
            the file of gates says, a relevance gate where none is given but one ships, or the sum.
        check: Refuses, before the library is read, what the base cannot do.

    Raises:
        GatesError: Something is missing, damaged, or of another base.
    """
    given, notices = _filled(sources, world, mode)
    assert given.base is not None
    assert given.library is not None
    place = Path(given.base)
    pipe, base = load_pipeline(
        place,
        components=given.components,
        dtype=getattr(torch, given.dtype),
        offload=given.offload,
    )
    if base is not None and (given.dtype, given.offload) != ("float32", "none"):
        raise GatesError(
            f"found --dtype {given.dtype} and --offload {given.offload}, but the embedded base"
            " computes in float32 and is never moved: leave both out"
        )
    text = None if base is None else base.encoder()
    encoder = None if given.encoder is None else _encoder(given.encoder, base, text)
    gates = None if given.gates is None else Path(given.gates)
    weights = content_digest(place).sha256[:DIGITS] if base is None else weights_digest(place)
    hashes: dict[str, str | None] = {"base": weights, "gates": None, "encoder": None}
    if gates is not None:
        model = pipe.transformer
        states = load_gates(gates, [site.name for site in sites_of(model, family_of(model))])
        mode = _mode_for(gates, mode_of(states), mode)
        refuse_gates_of_another(place, gates)
        hashes["gates"] = content_digest(gates).sha256[:DIGITS]
    if encoder is not None:
        hashes["encoder"] = encoder.fingerprint
    if given.components is not None:
        hashes["components"] = content_digest(Path(given.components)).sha256[:DIGITS]
    library = LoraLibrary(given.library, encoder, text, index=given.index, least=given.least)
    finder = Finder(library)
    auto = AutoLoraPipeline(pipe, finder, gates, text)
    notices += _notices(gates, mode)
    dtype = given.dtype if base is None else None
    made = Studio(auto, finder, base, gates, hashes, place.stem, dtype, mode or SUM, notices)
    check(made)
    _scan(library, progress)
    return closing(made)


def _filled(
    sources: Sources, world: Callable[[], World], mode: str | None
) -> tuple[Sources, list[str]]:
    """Return the sources with what ships where nothing is given, and notices."""
    if sources.components is not None and Path(sources.base or "").suffix.lower() != ".gguf":
        raise GatesError("--components is for a GGUF file: leave it out, or name one as --base")
    if sources.base is not None:
        if sources.library is None:
            raise GatesError(
                "the shipped adapters are for the embedded base alone: give --library FOLDER for "
                f"{sources.base}"
            )
        return sources, []
    world_files = shipped(root := world())
    if world_files.base is None:
        raise GatesError(
            "the embedded base is missing: train it by `gates diffusion train-base`, or give --base"
        )
    places = (world_files.encoder, world_files.gates.get(mode or RELEVANCE))
    encoder, gates = (None if p is None else str(p) for p in places)
    here = gates is not None and Path(gates).is_relative_to(root.run.folder.parent)
    notices = [f"the gates are {gates}, trained in this run folder, not those that ship"] * (
        here and not sources.gates
    )
    sources = replace(
        sources,
        base=str(world_files.base),
        encoder=sources.encoder or encoder,
        gates=sources.gates or gates,
    )
    if sources.library is None:
        if not world_files.adapters:
            raise GatesError(
                "the shipped adapters are missing: train them by `gates diffusion evaluate --config"
                " base`, or give --library FOLDER"
            )
        sources = replace(
            sources,
            library=str(next(iter(world_files.adapters.values())).parent),
            index=sources.index or str(root.run.folder / LIBRARY),
        )
    return sources, notices


def _mode_for(gates: Path, mode: str, asked: str | None) -> str:
    """Return the mode that is asked for, or that of a file of gates.

    Raises:
        GatesError: The mode needs another file.
    """
    if asked in TRAIN and asked != mode:
        raise GatesError(f"{gates} is for --mode {mode}, not {asked}: leave --mode out")
    return asked or mode


def _notices(gates: Path | None, mode: str | None) -> list[str]:
    """Return what a user has to know of gates."""
    if gates is None:
        return [NO_GATES] if mode is None else []
    record = read_record(gates.parent)
    rank = None if record is None else record.settings.get("global_rank")
    return [LACKING.format(rank)] if rank else []


def _encoder(folder: str, base: EmbeddedBase | None, text: TextEncoder | None) -> TrainedEncoder:
    """Read the encoder of adapters.

    Raises:
        GatesError: It reads adapters of another base, or prompts of another text encoder.
    """
    if base is None or text is None:
        raise GatesError(
            "--encoder is for the embedded base: adapters of other models are found by metadata"
        )
    reader = read_encoder(folder, text.fingerprint)
    if reader.config.shape != shape_of(base):
        raise GatesError(
            f"{folder} reads adapters of another base, with other layers: give the encoder that was"
            " trained for this base"
        )
    return reader


def _scan(library: LoraLibrary, progress: Progress) -> None:
    """Bring the index up to date.

    Raises:
        GatesError: No file of the library is an adapter.
    """
    if library.root.is_dir() and not any(library.root.rglob("*.safetensors")):
        raise GatesError(
            f"{library.root} holds no adapter: give a folder of .safetensors files, or of folders "
            "with some"
        )
    try:
        report = library.scan(progress)
        if not report.kept:
            why = "".join(f", {refusal.path}: {refusal.reason}" for refusal in report.refused[:1])
            raise GatesError(
                f"{library.root} holds no adapter{why}: give a folder of .safetensors files"
            )
    except BaseException:
        library.close()
        raise
