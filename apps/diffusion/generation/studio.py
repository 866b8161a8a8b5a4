"""What makes images: a base, a library and gates, read and checked."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from apps.diffusion.generation.finding import Finder
from apps.diffusion.generation.modes import GATED, SUM, maker
from apps.diffusion.generation.shipped import collected, shipped
from apps.diffusion.generation.sources import Sources
from apps.diffusion.index import read_encoder
from apps.diffusion.works.base import weights_digest
from apps.diffusion.works.encoder import shape_of
from apps.diffusion.works.gates_base import refuse_gates_of_another
from apps.diffusion.world import World
from core_gates.errors import GatesError
from diffusion.fusion.gate_file import load_gates
from diffusion.fusion.pipeline import AutoLoraPipeline, Generated
from diffusion.fusion.sites import family_of, sites_of
from diffusion.library import LoraLibrary
from diffusion.models.base import EmbeddedBase
from diffusion.models.loading import load_pipeline
from diffusion.models.text import MiniLM, TextEncoder, text_encoder
from diffusion.retrieval import TrainedEncoder
from harness.experiment.record import read_record
from harness.files import content_digest

Progress = Callable[[int, int | None], None]
LIBRARY = "library"
"""Folder of the copies of the shipped adapters, with their index, in the run folder."""

NO_GATES = "no gates are given: adapters are combined by the plain sum"
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
        notices: What a user has to know.
    """

    pipe: AutoLoraPipeline
    finder: Finder
    base: EmbeddedBase | None
    gates: Path | None
    hashes: dict[str, str | None]
    model: str
    dtype: str | None = None
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
        found: dict[str, Any] = {"num_inference_steps": steps}
        if guidance is not None:
            found[scale] = guidance
        side = size if self.base is None else self.base.size
        if side is not None:
            found |= {"height": side, "width": side}
        return found

    def unread(self, prompt: str) -> str:
        """Return what a user has to know of a prompt that is too long; empty if it is read."""
        rest = self.pipe.text.unread(prompt) if isinstance(self.pipe.text, MiniLM) else ""
        return f"the prompt is too long for this base, which does not read {rest!r}" if rest else ""

    def make(self, prompt: str, *, mode: str = GATED, **options: Any) -> Generated:
        """Return an image, and what made it; without gates, ``gated`` is the plain sum."""
        asked = SUM if mode == GATED and self.gates is None else mode
        return self.pipe(prompt, mode=maker(asked), record_gates=asked == GATED, **options)

    def close(self) -> None:
        """Close the index."""
        self.finder.library.close()


def opened(sources: Sources, world: Callable[[], World], progress: Progress) -> Studio:
    """Return what makes images, after the library was brought up to date.

    Args:
        sources: Where everything is read from.
        world: Returns the embedded world, called only where what ships is needed.
        progress: Of the scan of the library.

    Raises:
        GatesError: Something is missing, damaged, or of another base.
    """
    given = _filled(sources, world)
    assert given.base is not None
    assert given.library is not None
    place = Path(given.base)
    pipe, base = load_pipeline(
        place,
        components=given.components,
        dtype=getattr(torch, given.dtype),
        offload=given.offload,
    )
    if base is not None and given.dtype != "float32":
        raise GatesError(
            f"--dtype is {given.dtype}, the embedded base computes in float32: leave it out"
        )
    text = None if base is None else _text_of(base)
    encoder = None if given.encoder is None else _encoder(given.encoder, base, text)
    gates = None if given.gates is None else Path(given.gates)
    hashes: dict[str, str | None] = {"base": _digest(place, base), "gates": None, "encoder": None}
    if gates is not None:
        _check_gates(gates, pipe.transformer, place)
        hashes["gates"] = content_digest(gates).sha256[:DIGITS]
    if encoder is not None:
        hashes["encoder"] = encoder.fingerprint
    if given.components is not None:
        hashes["components"] = content_digest(Path(given.components)).sha256[:DIGITS]
    library = LoraLibrary(given.library, encoder, text, index=given.index)
    _scan(library, progress)
    finder = Finder(library)
    auto = AutoLoraPipeline(pipe, finder, gates, text)
    notices = [NO_GATES] if gates is None else _lacking(gates)
    dtype = given.dtype if base is None else None
    return Studio(auto, finder, base, gates, hashes, place.stem, dtype, notices)


def studio(sources: Sources, world: Callable[[], World], progress: Progress) -> closing[Studio]:
    """Return :func:`opened` as a context manager that closes the index."""
    return closing(opened(sources, world, progress))


def _filled(sources: Sources, world: Callable[[], World]) -> Sources:
    """Return the sources with what ships where nothing is given."""
    if sources.base is not None:
        if sources.library is None:
            raise GatesError(
                "the shipped adapters are for the embedded base alone: give --library FOLDER for "
                f"{sources.base}"
            )
        return sources
    found = shipped(root := world())
    if found.base is None:
        raise GatesError(
            "the embedded base is missing: train it by `gates diffusion train-base`, or give --base"
        )
    encoder, gates = (None if p is None else str(p) for p in (found.encoder, found.gates))
    sources = replace(
        sources,
        base=str(found.base),
        encoder=sources.encoder or encoder,
        gates=sources.gates or gates,
    )
    if sources.library is not None:
        return sources
    if not found.adapters:
        raise GatesError(
            "the shipped adapters are missing: train them by `gates diffusion evaluate --config "
            "base`, or give --library FOLDER"
        )
    folder = collected(found.adapters, root.run.folder / LIBRARY)
    return replace(sources, library=str(folder))


def _text_of(base: EmbeddedBase) -> TextEncoder:
    text = text_encoder(base.text_encoder["name"])
    base.check_text_encoder(text)
    return text


def _encoder(folder: str, base: EmbeddedBase | None, text: TextEncoder | None) -> TrainedEncoder:
    """Read the encoder of adapters.

    Raises:
        GatesError: It reads adapters of another base, or prompts of another text encoder.
    """
    if base is None or text is None:
        raise GatesError(
            "--encoder is for the embedded base: adapters of other models are found by metadata"
        )
    found = read_encoder(folder, text.fingerprint)
    if found.config.shape != shape_of(base):
        raise GatesError(
            f"{folder} reads adapters of another base, with other layers: give the encoder that was"
            " trained for this base"
        )
    return found


def _check_gates(path: Path, model: torch.nn.Module, base: Path) -> None:
    """Refuse gates that were trained on another base.

    Raises:
        GatesError: Their layers, or the base that their record names, are others.
        LoraFileError: The file is damaged.
    """
    load_gates(path, [site.name for site in sites_of(model, family_of(model))])
    refuse_gates_of_another(base, path)


def _lacking(gates: Path) -> list[str]:
    """Return what gates were trained with and images are made without, in words."""
    record = read_record(gates.parent)
    rank = None if record is None else record.settings.get("global_rank")
    if not rank:
        return []
    return [
        f"the gates were trained with one more adapter, what all have in common in rank {rank}: it"
        " takes no part here"
    ]


def _digest(place: Path, base: EmbeddedBase | None) -> str:
    return content_digest(place).sha256[:DIGITS] if base is None else weights_digest(place)


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
    except BaseException:
        library.close()
        raise
    if not report.kept:
        library.close()
        reason = f", {report.refused[0].path}: {report.refused[0].reason}" if report.refused else ""
        raise GatesError(
            f"{library.root} holds no adapter{reason}: give a folder of .safetensors files"
        )
