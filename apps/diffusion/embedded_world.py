"""The embedded world: one base, the zoo of its adapters, the judge of its images."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from core_gates.errors import GatesError
from diffusion.data.concepts import Concept, concepts
from diffusion.data.scenes import WORLD
from diffusion.experiments.made_images import train_judge
from diffusion.experiments.work import Machine
from diffusion.experiments.zoo import (
    BASE,
    AdapterForm,
    BaseForm,
    ZooForm,
    collect,
    file_in,
    train_adapter,
    train_base,
)
from diffusion.lora_file.recognition import shape_in
from diffusion.models.embedded_base import EmbeddedBase
from diffusion.models.flow_matching import layers_of
from diffusion.models.text_encoders import TextEncoder, text_encoder
from harness.command.verbs import Place
from harness.experiment import Arrays, Form, Piece, Run, Work
from harness.files.digest import content_digest, short_digest

if TYPE_CHECKING:
    from diffusion.retrieval import TrainedEncoder


EMBEDDED = "embedded"
LIBRARY = "library"
"""Folder of the index of the shipped adapters, in the run folder."""

ADAPTER: dict[str, Any] = {
    "rank": 4,
    "parts": ["attention", "mlp", "modulation"],
    "steps": 400,
    "batch_size": 16,
    "learning_rate": 1e-2,
    "warmup_steps": 5,
}  # how adapters of seed 0 are trained

JUDGE: dict[str, Any] = {"steps": 3000, "batch_size": 96}  # how the judge of images is trained

RANKS, STEPS, KEPT = (1, 8), (200, 400), (0.5, 1.0)
"""What adapters of seed 1 draw: rank, steps, and the fraction of layers that they change."""


def base_piece(run: Run, seed: int, **changes: Any) -> Piece:
    """Return the piece that an embedded base is."""
    settings = BASE | changes
    digest = text_encoder(settings["text_encoder"]).fingerprint
    settings |= {"text_encoder.fingerprint": digest, "world": WORLD}
    return run.piece("base", seed, **settings)


class World:
    """What all configurations stand on.

    Args:
        root: Folder of all runs.
        shipped: Whether what ships is used.
        overwrite: Whether what was made with other settings is replaced.
        quick: Whether nothing is trained.
        base: Settings of the base, in place of those of the shipped one.
        adapter: Settings of adapters, likewise.
        command: Command line, for records.
    """

    def __init__(
        self,
        root: str | Path = "runs",
        *,
        shipped: bool = True,
        overwrite: bool = False,
        quick: bool = False,
        base: dict[str, Any] | None = None,
        adapter: dict[str, Any] | None = None,
        command: str = "",
    ) -> None:
        self.run = Run(
            Path(root) / "diffusion" / EMBEDDED,
            app="diffusion",
            config_path=Path(f"{EMBEDDED}.yaml"),
            package="diffusion",
            shipped=shipped,
            overwrite=overwrite,
            command=command,
        )
        self.run.quick, self.shipped = quick, shipped
        self._base, self._adapter = base or {}, adapter or {}
        self.bases = self.run.store("bases", BaseForm())
        self.adapters = self.run.store("adapters", AdapterForm())
        self.zoos = self.run.store("zoos", ZooForm())

    concepts = concepts()

    def beside(self, config: str) -> Run:
        """Return the run of another configuration, next to that of the world."""
        return Run(
            self.run.folder.parent / config,
            app="diffusion",
            config_path=Path(f"{config}.yaml"),
            package="diffusion",
            shipped=self.shipped,
        )

    @cached_property
    def base_folder(self) -> Path:
        """Folder of the base, which is trained if it is missing."""
        piece = self.base_piece
        self.run.obtain(self.bases, [piece], train_base, ticks=piece["steps"])
        folder = self.bases.find(piece)
        assert folder is not None
        return folder

    @cached_property
    def base(self) -> EmbeddedBase:
        """The base."""
        return EmbeddedBase.load(self.base_folder)

    @cached_property
    def text(self) -> TextEncoder:
        """The text encoder of the base."""
        return self.base.encoder()

    def judge(self) -> dict[str, Tensor]:
        """Return the weights of the judge of images, which is trained if it is missing."""
        store = self.run.store("judges", Arrays())
        piece = self.run.piece("judge", 0, **JUDGE, world=WORLD)
        self.run.obtain(store, [piece], train_judge, ticks=JUDGE["steps"])
        return store.load(piece)

    def zoo(self, seed: int) -> dict[str, Path]:
        """Return concept -> LoRA file of a seed; what is missing is trained.

        Args:
            seed: 0, or 1: trained independently, with another rank, layers and length.

        Returns:
            Nothing where some are missing and nothing is trained.
        """
        piece = self.zoo_piece(seed)
        if self.zoos.find(piece) is None:
            named = {concept.name: self.adapter_piece(concept, seed) for concept in self.concepts}
            work = partial(train_adapter, base_folder=self.base_folder)
            made = self.run.obtain(
                self.adapters, named.values(), work, ticks=lambda item: int(item["steps"])
            )
            folders = {item.method: self.adapters.find(item) for item in made}
            files = {name: file_in(path) for name, path in folders.items() if path is not None}
            if len(files) == len(named):
                gather = partial(collect, files=files)
                self.run.obtain(self.zoos, [piece], gather, ticks=len(files), scoring=True)
        return self.zoo_files(seed)

    def zoo_files(self, seed: int) -> dict[str, Path]:
        """Return concept -> LoRA file of a seed; nothing where some are missing."""
        folder = self.zoos.find(self.zoo_piece(seed))
        if folder is None:
            return {}
        return {concept.name: folder / f"{concept.name}.safetensors" for concept in self.concepts}

    def zoo_piece(self, seed: int) -> Piece:
        """Return the piece that all adapters of a seed are together."""
        pieces = [self.adapter_piece(concept, seed).fingerprint for concept in self.concepts]
        return self.run.piece(
            "zoo", seed, start=self.base_fingerprint, adapters=short_digest(pieces)
        )

    def encoders(
        self, methods: Mapping[str, Mapping[str, Any]], seeds: Sequence[int], **settings: Any
    ) -> dict[str, list["TrainedEncoder"]]:
        """Return method -> encoders, one a seed, trained on adapters of seed 0.

        Args:
            methods: Settings of each method.
            seeds: Of the encoders.
            settings: Of all methods, among them the ``concepts``.
        """
        from diffusion.experiments.zoo import EncoderForm, train_encoder

        store = self.run.store("encoders", EncoderForm())
        zoo = self.zoo(0)
        pieces = [
            self.encoder_piece(name, seed, **settings, **options)
            for name, options in methods.items()
            for seed in seeds
        ]
        work = partial(train_encoder, base_folder=self.base_folder, files=zoo)
        made = self.run.obtain(store, pieces, work, ticks=lambda piece: int(piece["steps"]))
        trained: dict[str, list[TrainedEncoder]] = {}
        for piece in made:
            trained.setdefault(piece.method, []).append(store.load(piece))
        return trained

    def encoder_piece(self, method: str, seed: int, **settings: Any) -> Piece:
        """Return the piece that trains an encoder on the adapters of seed 0; nothing is trained."""
        return self.run.piece(method, seed, start=self.zoo_digest, **settings)

    @property
    def zoo_digest(self) -> str:
        """Fingerprint of the adapters of seed 0 and their base."""
        return self.zoo_piece(0).fingerprint

    def present_base(self) -> Path:
        """Return the folder of the base.

        Raises:
            GatesError: It was never trained and does not ship.
        """
        folder = self.bases.find(self.base_piece)
        if folder is None:
            raise GatesError(
                "there is no embedded base: run `gates diffusion train-base` first, or give --base"
            )
        return folder

    def adapter_piece(self, concept: Concept, seed: int) -> Piece:
        """Return the piece that trains the adapter of a concept; nothing is trained."""
        settings = {**ADAPTER, **self._adapter, "start": self.base_fingerprint}
        if seed:
            digest = hashlib.sha256(f"{concept.name} {seed}".encode()).digest()
            random = np.random.default_rng(int.from_bytes(digest[:8], "big"))
            layers = layers_of(self.base.transformer, ADAPTER["parts"])
            kept = random.random(len(layers)) < random.uniform(*KEPT)
            settings |= {
                "rank": int(random.integers(RANKS[0], RANKS[1] + 1)),
                "steps": int(random.integers(STEPS[0], STEPS[1] + 1)),
                "layers": [name for name, keep in zip(layers, kept, strict=True) if keep],
            }
        return self.run.piece(concept.name, seed, kind=concept.kind, **settings)

    @cached_property
    def base_fingerprint(self) -> str:
        """Fingerprint of the piece that trains the base model."""
        return self.base_piece.fingerprint

    @cached_property
    def base_piece(self) -> Piece:
        """The piece that trains the base model."""
        return base_piece(self.run, 0, **self._base)


class Base(NamedTuple):
    """A base.

    Attributes:
        folder: Of the embedded base or of a pipeline.
        digest: What tells it from others.
    """

    folder: Path
    digest: str


def root_of(place: Place) -> Path:
    """Return the folder of all runs."""
    return place.run_folder.path.parents[1]


def run_of(place: Place, *, overwrite: bool = False, seed: int = 0) -> Run:
    """Return the run of a verb, with the seed of what it trains.

    Raises:
        GatesError: The seed is out of range.
    """
    if not 0 <= seed < 2**32:
        raise GatesError(f"--seed is {seed}, expected a number from 0 to {2**32 - 1}")
    return Run(
        place.run_folder.path,
        app="diffusion",
        config_path=Path(f"{place.config}.yaml"),
        package="diffusion",
        overwrite=overwrite,
        command=place.command,
    )


def obtained(run: Run, kind: str, form: Form[Any], piece: Piece, work: Work[Any]) -> Iterator[Path]:
    """Train what is missing, and yield its folder.

    Args:
        run: Of a training verb.
        kind: Folder of results like it.
        form: How it is stored.
        piece: What is trained, for so many ``steps``.
        work: Trains it.
    """
    store = run.store(kind, form)
    for made in run.obtain(store, [piece], work, ticks=piece["steps"]):
        path = store.find(made)
        assert path is not None
        yield path


def base_at(base: str | None, place: Place) -> Base:
    """Return the base that an option names; the embedded one if None.

    Raises:
        GatesError: There is none, or it is of another kind.
    """
    if base is None:
        world = World(root_of(place))
        return Base(world.present_base(), world.base_fingerprint)
    folder = Path(base)
    if not folder.is_dir():
        raise GatesError(f"--base is {base}, which is no folder: give that of a pipeline or a base")
    shape_in(folder)
    return Base(folder, digest_of(folder))


def digest_of(path: Path) -> str:
    """Return 16 hex digits of the SHA-256 of the content of a file or folder."""
    return content_digest(path).sha256[:16]


def table_digest(csv: Path, names: Iterable[str]) -> str:
    """Return a short hash of the contents of a table and of the files that it names."""
    return short_digest(
        {"": digest_of(csv)} | {name: digest_of(csv.parent / name) for name in names}
    )


def zoo_of(world: World, machine: Machine) -> dict[str, Path]:
    """Return LoRA files of seed 0 by concept; missing ones are trained, but only by one process.

    Raises:
        GatesError: Some are missing, and several processes are asked for.
    """
    world.present_base()
    if machine.processes > 1 and not world.zoo_files(0):
        raise GatesError("adapters of the zoo are missing: train them first with --devices 1")
    return world.zoo(0)
