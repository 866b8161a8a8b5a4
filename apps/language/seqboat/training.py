"""The verbs of ``gates language`` whose configuration describes a SeqBoat."""

from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser

from apps.language.seqboat.pieces import DATA, PLACES
from apps.language.seqboat.speech_study import SpeechStudy
from apps.main import APPS
from core_gates.errors import GatesError
from harness.command import GatesRunCLI, GatesRunTrainer
from harness.experiment import Arrays, Piece, Run
from harness.runs.callbacks import load_weights
from language.seqboat.module import SeqBoatModule
from language.seqboat.sequences import SequenceData

CONFIGURED = "configured"  # what `fit` trains, untuned


class SeqBoatTrainer(GatesRunTrainer):
    """The verbs of sequences; ``fit`` is Lightning's own."""

    def evaluate(
        self,
        model: SeqBoatModule,
        datamodule: L.LightningDataModule,
        seeds: tuple[int, ...] = (0,),
        speakers: bool = False,
        study: Literal["speech"] = "speech",
    ) -> None:
        """Train what is missing, and score it next to rivals on recordings that were never heard.

        Args:
            model: Filled in by the command line.
            datamodule: Filled in by the command line.
            seeds: Seeds of every method.
            speakers: Leave one speaker out at a time, instead of some recordings of all.
            study: This one.
        """
        del model, study
        if not seeds or min(seeds) < 0:
            raise GatesError(f"--seeds is {list(seeds)}, expected one or more from 0")
        SpeechStudy(self.run(seeds=seeds), datamodule, seeds, speakers=speakers).finish()


class SeqBoatCLI(GatesRunCLI):
    """The command line of ``gates language`` on sequences."""

    app = "language"
    verbs = ("fit", "evaluate", "report")
    other_verbs = tuple(sorted(APPS["language"].verbs.keys() - set(verbs)))
    package = "language"
    neutral = tuple(f"{DATA}{name}" for name in PLACES)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let the order of the data follow the seed."""
        super().add_arguments_to_parser(parser)
        parser.link_arguments("seed_everything", f"{DATA}seed", compute_fn=int)

    def after_instantiate_classes(self) -> None:
        """Refuse a model whose classes are not those of the data.

        Raises:
            GatesError: Their numbers differ.
        """
        if isinstance(self.datamodule, SequenceData):
            self.datamodule.setup("fit")
            classes, outputs = len(self.datamodule.classes), self.model.model.vocab_size
            if classes != outputs:
                raise GatesError(
                    f"the data have {classes} classes, but the model {outputs} outputs: set "
                    f"model.model.init_args.outputs to {classes}"
                )
        super().after_instantiate_classes()

    def training(self, run: Run) -> Piece:
        """Return the piece that ``fit`` makes."""
        return run.piece(CONFIGURED, run.settings["seed"])

    def keep(self, run: Run, piece: Piece, objects: Sequence[str], path: Any) -> Any:
        """Keep the state of the model where ``evaluate`` and ``classify`` find it."""
        state = load_weights(path)["state_dict"]
        weights = {n.removeprefix("model."): v for n, v in state.items()}
        return run.store("weights", Arrays()).keep(
            piece, weights, objects=objects, classes=list(getattr(self.datamodule, "classes", ()))
        )


def run_training_verb(arguments: Sequence[str]) -> None:
    """Run one of these verbs, or refuse another."""
    SeqBoatCLI(
        SeqBoatModule, L.LightningDataModule, SeqBoatTrainer, arguments,
        subclass_mode_data=True, trainer_defaults={"enable_model_summary": False},
    )  # fmt: skip
