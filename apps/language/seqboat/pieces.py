"""What studies of SeqBoat share: models and data of settings, their training and scores."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor, nn

from core_gates.errors import GatesError
from harness.evidence import Row
from harness.experiment import Arrays, Job, Piece, Run, Store
from harness.files.piece import Record, refuse_changed
from language.data import LanguageDataModule
from language.seqboat.module import SeqBoatModule
from language.seqboat.sequence_model import Activations, SeqBoat, recorded
from language.seqboat.sequences import SequenceData, SequenceLoader, Split

Length = Literal["epochs", "steps"]
DATA = "data.init_args."
PLACES = ("folder", "corpus", "tokenizer", "cache_folder")
"""Options of the data that decide by content alone, which the digest of the data covers."""
MODEL, RATE = "model.model.", "model.learning_rate"
LOGITS, DENSITY = "logits", "density"

Places = Mapping[str, Any]
"""Values of these options, by name."""


def module_of(settings: Mapping[str, Any]) -> SeqBoatModule:
    """Return the module that settings describe, with weights drawn now."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SeqBoatModule, "model", fail_untyped=False)
    nested = _nested(settings, "model.")
    module: SeqBoatModule = parser.instantiate(parser.parse_object({"model": nested})).model
    return module


def size_of(settings: Mapping[str, Any]) -> int:
    """Return how many weights the model that settings describe has."""
    with torch.device("meta"):
        model = module_of(settings).model
    return sum(p.numel() for p in model.parameters())


def as_large(
    settings: Mapping[str, Any], own: Mapping[str, Any], name: str, unit: int = 1
) -> dict[str, Any]:
    """Return what differs for another model, with a size that gives it about as many weights.

    Args:
        settings: Of the model that it is to be as large as.
        own: What differs from these.
        name: Of the size.
        unit: The size is a multiple of it.
    """
    counts = [size_of({**settings, **own, name: unit * units}) for units in (1, 2)]
    units = 1 + round((size_of(settings) - counts[0]) / (counts[1] - counts[0]))
    return {**own, name: unit * max(1, units)}


def data_of(settings: Mapping[str, Any], places: Places) -> Any:
    """Return the data that settings describe, set up.

    Args:
        settings: With names that begin by ``data.``, and the seed of the order.
        places: Where the files are.
    """
    nested = _nested(settings, "data.")
    nested.pop("digest", None)
    nested["init_args"] |= {**places, "seed": settings.get("seed") or 0}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    data = parser.instantiate(parser.parse_object({"data": nested})).data
    data.prepare_data()
    data.setup("fit")
    return data


def places_of(data: L.LightningDataModule) -> Places:
    """Return where the files of the data are."""
    values = {name: getattr(data, name) for name in PLACES if hasattr(data, name)}
    return {n: str(value) if isinstance(value, Path) else value for n, value in values.items()}


def train(piece: Piece, job: Job, places: Places, ticks: Length = "epochs") -> dict[str, Tensor]:
    """Train one model as ``fit`` does, and return its state."""
    L.seed_everything(piece.seed, verbose=False)
    data, module = data_of(piece.settings, places), module_of(piece.settings)
    options = {
        n.removeprefix("trainer."): v for n, v in piece.settings.items() if n.startswith("trainer.")
    } | {name: piece.get(f"checkpoint.{name}") for name in ("monitor", "mode")}
    job.note(objects=data.training_objects(), classes=list(getattr(data, "classes", ())))
    job.fit(module, data, ticks=ticks, **options)
    return dict(module.model.state_dict())


class Study:
    """What is trained, scored and compared of one configuration.

    Args:
        run: Keeps what is trained and scored.
        data: Of the kind that the study is about.
        seeds: Of every method that is trained by gradient descent.
        stage: What the data are set up for; other splits of them test if it is not ``test``.

    Attributes:
        kind: The class of the data.
        needs: Name of the study, and what it needs, for messages.
        places: Where the files of the data are.

    Raises:
        GatesError: The data are of another kind.
    """

    kind: ClassVar[type[L.LightningDataModule]]
    needs: ClassVar[str]

    def __init__(self, run: Run, data: Any, seeds: Sequence[int], stage: str = "test") -> None:
        self.run, self.data, self.seeds = run, data, seeds
        if not isinstance(data, self.kind):
            raise GatesError(f"study {self.needs}, found {type(data).__name__}")
        self.data.setup(stage)
        run.settings["data.digest"] = [part.sha256 for part in self.data.digest()]
        self.places = places_of(data)
        self.pieces: list[Piece] = []

    def scores_of(
        self,
        pieces: Sequence[Piece],
        scoring: Callable[..., Any],
        *,
        ticks: Length | None = "epochs",
        parts: int = 1,
    ) -> list[Mapping[str, Tensor]]:
        """Train and score what is missing, and return the scores in order.

        Args:
            pieces: Of one method or several.
            scoring: Scores one, as `score` does.
            ticks: What the length of a training is counted in; None where nothing is trained.
            parts: Ticks of one scoring.
        """
        run = self.run
        self.pieces += pieces
        weights, scores = run.store("weights", Arrays()), run.store("scores", Arrays())
        if ticks:
            wanted = scores.missing(pieces)  # what is scored needs no weights
            length = max(1, run.settings.get(f"trainer.max_{ticks}") or 1)
            work = partial(train, places=self.places, ticks=ticks)
            trained = run.obtain(weights, wanted, work, ticks=length, unit=ticks)
            pieces = [piece for piece in pieces if piece not in wanted or piece in trained]
        scoring = partial(scoring, places=self.places, weights=weights)
        made = run.obtain(scores, pieces, scoring, ticks=parts, scoring=True)
        return [scores.load(piece) for piece in made]

    def finish_with(self, rows: Sequence[Row], headline: str, notes: Sequence[str]) -> Path:
        """Write ``scores.json``, print it and how many scores come ready, and return its path."""
        store = self.run.store("scores", Arrays())
        package = store.shipped and store.shipped.parents[1]
        if ready := sum(package in (store.find(p) or Path()).parents for p in self.pieces):
            said = "scores come with the package; --shipped false trains and scores again."
            notes = [*notes, f"{ready} of {len(self.pieces)} {said}"]
            print(notes[-1])
        return self.run.finish(
            rows, seeds=self.seeds, data=self.data.digest(), headline=headline, notes=notes
        )


def score(
    piece: Piece, job: Job, places: Places, weights: Store[Any], split: Split = "test"
) -> dict[str, Tensor]:
    """Return the logits (N, classes) of a trained model, and the density of its layers."""
    del job
    data = data_of(piece.settings, places)
    model = trained_model(piece, weights, data)
    return scored(model, data, split)


def trained_model(
    piece: Piece, weights: Store[Any], data: SequenceData | LanguageDataModule
) -> nn.Module:
    """Return a trained model that has seen none of the test sequences of the data."""
    model = module_of(piece.settings).model
    model.load_state_dict(weights.load(piece, tested=data.test_objects()))
    return model.eval()


def open_trained(folder: Path, record: Record) -> SeqBoat:
    """Return the SeqBoat in a folder of trained weights, in evaluation mode.

    Raises:
        GatesError: It is another network, was changed, or was written by another version.
    """
    refuse_changed(folder, record)
    try:
        model = module_of(record.settings).model
    except ArgumentError as error:
        raise GatesError(
            f"{folder} was written by another version, whose settings are not understood: train it "
            "again"
        ) from error
    if not isinstance(model, SeqBoat):
        raise GatesError(f"{folder} has a network without gates: give one named seqboat")
    model.load_state_dict(Arrays().load(folder))
    return model.eval()


@torch.no_grad()
def scored(model: nn.Module, data: SequenceData, split: Split) -> dict[str, Tensor]:
    """Return the logits (N, classes) of a split, and the density of the layers over it."""
    with recorded(model) as passes:
        logits = [
            model(batch.x, padding_mask=batch.padding_mask)
            for batch in SequenceLoader(data.part(split), data.batch_size)
        ]
    return {LOGITS: torch.cat(logits), **density_of(passes)}


def density_of(passes: Sequence[Activations]) -> dict[str, Tensor]:
    """Return the fraction of all tokens that each layer activated, by name; none of no pass."""
    if not passes:
        return {}
    tokens = torch.stack([(~one.padding_mask).sum() for one in passes]).sum()
    return {DENSITY: torch.stack([one.active.sum((1, 2)) for one in passes]).sum(0) / tokens}


def density_rows(method: str, made: Sequence[Mapping[str, Tensor]]) -> list[Row]:
    """Return the mean density of each layer over the scores of seeds, a row each."""
    mean = torch.stack([one[DENSITY] for one in made]).mean(0).tolist() if made else []
    return [
        Row(method, "activation", f"density of layer {number}", density)
        for number, density in enumerate(mean, 1)
    ]


def hits(logits: Tensor, labels: np.ndarray) -> np.ndarray:
    """Return 1 where the most probable class is the label, else 0 (N,)."""
    return (logits.argmax(-1).numpy() == labels).astype(float)


def _nested(settings: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    nested = Namespace()
    for name, value in settings.items():
        if name.startswith(prefix) and value is not None:  # absent equals null
            nested[name.removeprefix(prefix)] = value
    return nested.as_dict()
