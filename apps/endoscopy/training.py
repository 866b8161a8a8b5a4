"""Training runs of sizing networks as pieces of work: named, found, trained, kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import lightning as L

from apps.endoscopy.rendering import render_missing
from core_gates.errors import GatesError
from endoscopy.bundles.building import bundle_of
from endoscopy.bundles.contents import SizingBundle
from endoscopy.bundles.form import Bundles
from endoscopy.data.datamodule import REAL, PolypSizingDataModule
from endoscopy.data.provenance import Provenance
from endoscopy.experiments.rendered_sets import MAIN
from endoscopy.experiments.sizers import Sizers, Training
from endoscopy.training.module import SizingModule
from endoscopy.training.variants import CONFIGURED, VARIANTS
from harness.experiment import Job, Piece, Run, Store
from harness.runs.checkpoint import load_weights, seen

WEIGHTS = "weights"
TRAINER, CHECKPOINT = "trainer.", "checkpoint."
OPTIONS = signature(SizingModule).parameters


def decisive(settings: Mapping[str, Any], sizers: Sizers) -> dict[str, Any]:
    """Return what determines a network: settings of the Trainer and of the domain."""
    trained = {n: v for n, v in settings.items() if n.startswith((TRAINER, CHECKPOINT))}
    return trained | sizers.settings()


def piece_of(run: Run, sizers: Sizers, training: Training, **settings: Any) -> Piece:
    """Return the piece of a training run.

    Args:
        run: With the settings of :func:`decisive`.
        sizers: The networks.
        training: Which.
        settings: Arguments of :class:`SizingModule`, or others that differ.
    """
    training = sizers.resolved(training)
    numbers = {"n": training.objects, "f": training.fold}
    keys = {name: number for name, number in numbers.items() if number is not None}
    changed = sizers.version(training.variant) | settings
    return run.piece(training.variant, training.seed, keys, **changed)


def training_of(piece: Piece) -> Training:
    """Return the training run of a piece."""
    seed, keys = piece.seed or 0, piece.keys
    objects = keys.get("n", piece.get("objects"))
    fold = keys.get("f")
    return Training(
        piece.method,
        seed,
        None if objects is None else int(objects),
        None if fold is None else int(fold),
    )


def trained(
    piece: Piece, job: Job, sizers: Sizers, **trainer: Any
) -> tuple[SizingModule, PolypSizingDataModule]:
    """Return the trained module of a piece and the data that it was trained on.

    Args:
        piece: With ``trainer.`` options, and options of the module without a prefix.
        job: Trains.
        sizers: The networks.
        trainer: Options of the Trainer that are not in the piece.
    """
    training = training_of(piece)
    L.seed_everything(training.seed, verbose=False)
    changed = {name: value for name, value in piece.settings.items() if name in OPTIONS}
    module = sizers.untrained(training, **changed)
    data = sizers.data(training)
    job.note(objects=data.training_objects())
    monitor = piece.get("checkpoint.monitor")
    options = trainer | {
        name.removeprefix(TRAINER): value
        for name, value in piece.settings.items()
        if name.startswith(TRAINER)
    }
    if monitor is None:
        options["limit_val_batches"] = 0
    mode = piece.get("checkpoint.mode", "min")
    job.fit(module, data, monitor=monitor, mode=mode, **options)
    sizers.settle(training.variant, module, data)
    return module, data


def train(piece: Piece, job: Job, *, sizers: Sizers, config: str) -> SizingBundle:
    """Train one network and fit all that predictions need."""
    module, data = trained(piece, job, sizers)
    return bundle_of(module, data, facts=facts(piece, config), settings=piece.settings)


def facts(piece: Piece, config: str) -> dict[str, Any]:
    """Return the facts of a training run for its model card."""
    return {
        "configuration": config,
        "variant": VARIANTS[piece.method].summary,
        "seed": piece.seed,
        "epochs": piece.get("trainer.max_epochs"),
    }


class Trainings:
    """The networks of a run: existing ones, and those to be trained.

    Args:
        run: Where they are kept; its settings become those of :func:`decisive`.
        sizers: The networks.
    """

    def __init__(self, run: Run, sizers: Sizers) -> None:
        run.settings = decisive(run.settings, sizers)
        self.run, self.sizers = run, sizers
        self.store: Store[SizingBundle] = run.store(WEIGHTS, Bundles())

    def pieces(self, trainings: Iterable[Training]) -> list[Piece]:
        """Return the pieces of training runs."""
        return [piece_of(self.run, self.sizers, one) for one in trainings]

    def obtain(self, wanted: Sequence[Training], sets: Sequence[str] = (MAIN,)) -> list[Training]:
        """Render and cache what training and prediction read, and train what is missing.

        Args:
            wanted: Training runs.
            sets: Names of rendered sets.

        Returns:
            Those with results.
        """
        pieces = self.pieces(wanted)
        self.store.missing(pieces)  # refuses before anything is rendered
        make_ready(self.sizers, sets)
        for training in wanted:
            self.sizers.data(training).prepare_data()
        work = partial(train, sizers=self.sizers, config=self.run.config)
        found = self.run.obtain(self.store, pieces, work, ticks=_epochs)
        return [training_of(piece) for piece in found]

    def load(self, training: Training) -> SizingBundle:
        """Return a trained network.

        Raises:
            GatesError: It is missing or damaged, or was trained on test objects.
        """
        data = self.sizers.data(training)
        tested = {key for part in ("test", "calibration") for key in data.object_keys(part)}
        (piece,) = self.pieces([training])
        return self.store.load(piece, tested=tested)


def make_ready(sizers: Sizers, sets: Sequence[str] = (MAIN,)) -> None:
    """Render and cache what is missing, and read the data; only one process may do so."""
    if sizers.rendering is not None:
        render_missing(sizers.datamodule, sizers.rendering, sets)
    sizers.datamodule.check_sources()
    print_random_start(sizers.datamodule, sizers.timm_weights)
    sizers.datamodule.prepare_data()
    sizers.datamodule.setup("fit")


def print_random_start(data: PolypSizingDataModule, timm_weights: str | None) -> None:
    """Say that training on real frames starts from random weights, if it does."""
    if timm_weights is None and set(REAL) & data.sources.keys():
        print(
            "training starts from random weights, the published one from those of ImageNet: give "
            "--timm_weights FILE"
        )


def checkpoint_bundle(sizers: Sizers, path: Path) -> SizingBundle:
    """Return the network of a checkpoint, its intervals fitted to the present data.

    Raises:
        GatesError: It is damaged or belongs to another configuration.
    """
    module, data = sizers.untrained(Training()), sizers.datamodule
    objects = load_checkpoint(path, module)
    data.setup("test")
    sizers.settle(CONFIGURED, module, data)
    bundle = bundle_of(module, data, facts={"checkpoint": str(path)})
    bundle.training = Provenance({}, objects)
    return bundle


def load_checkpoint(path: Path, module: SizingModule) -> tuple[str, ...]:
    """Read the weights of a checkpoint into a module; return the keys of its training objects.

    Raises:
        GatesError: It is damaged or belongs to another configuration.
    """
    checkpoint = load_weights(path)
    try:
        module.load_state_dict(checkpoint.get("state_dict", {}))
    except RuntimeError as error:
        raise GatesError(
            f"{path} is a checkpoint of another configuration: give the one it was trained with"
        ) from error
    own = checkpoint.get(PolypSizingDataModule.__name__, {}).get("trained_on", ())
    return tuple(sorted({*own, *seen(checkpoint)}))


def _epochs(piece: Piece) -> int:
    return int(piece.get("trainer.max_epochs") or 1)
