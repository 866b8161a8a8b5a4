"""The verbs of ``gates language`` whose configuration describes a SeqBoat."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser

from apps.language.seqboat.activation_study import ActivationStudy
from apps.language.seqboat.bytes_study import BytesStudy
from apps.language.seqboat.listops_study import ListOpsStudy
from apps.language.seqboat.pieces import DATA, PLACES
from apps.language.seqboat.speech_study import SpeechStudy
from apps.main import APPS
from core_gates.errors import GatesError
from harness.command import GatesRunCLI, GatesRunTrainer
from harness.experiment import Arrays, Piece, Run, read_scores
from harness.figures.curves import learning_figure
from harness.files import refuse_strangers, require_free
from harness.report.page import Page
from harness.report.sections import UNSCORED, read_curves
from harness.runs.callbacks import load_weights
from harness.runs.processes import in_processes
from harness.runs.terminal import ticking, working
from language.data import LanguageDataModule
from language.seqboat.front_ends import SymbolEmbedding
from language.seqboat.listops import (
    FILES,
    PRESETS,
    ListOpsData,
    TreeSettings,
    draw_splits,
    majority,
    majority_by_root,
    write_splits,
)
from language.seqboat.module import SeqBoatModule
from language.seqboat.sequences import SPLITS, SequenceData

CONFIGURED = "configured"  # what `fit` trains, untuned


class SeqBoatTrainer(GatesRunTrainer):
    """The verbs of sequences; ``fit`` is Lightning's own."""

    def prepare(
        self,
        model: SeqBoatModule,
        datamodule: L.LightningDataModule,
        preset: Literal["tiny", "lra"] = "tiny",
        lengths: tuple[int, int] | None = None,
        sizes: tuple[int, int, int] | None = None,
        max_args: int = 10,
        max_depth: int = 10,
        seed: int = 0,
        overwrite_output: bool = False,
    ) -> None:
        """Make the trees of ListOps that the configuration reads, the same for the same seed.

        Args:
            model: Filled in by the command line.
            datamodule: Filled in by the command line.
            preset: ``tiny``, 12,000 trees of 50 to 200 tokens to train with, or ``lra``, as the
                Long Range Arena has them, 96,000 of 500 to 2,000 tokens.
            lengths: Fewest and most tokens of a tree; those of the preset if null.
            sizes: Trees for training, validation and test; those of the preset if null.
            max_args: Most arguments of an operator.
            max_depth: Most levels of a tree; the last one has digits alone.
            seed: Of the trees.
            overwrite_output: Replace the folder if it exists and holds files of ListOps alone.
        """
        del model
        if not isinstance(datamodule, ListOpsData):
            raise GatesError(
                f"prepare makes trees of ListOps, found {type(datamodule).__name__}: give --config "
                "listops_tiny"
            )
        usual, folder = PRESETS[preset], datamodule.folder
        shortest, longest = lengths or (usual.min_length, usual.max_length)
        try:
            settings = TreeSettings(
                shortest, longest, sizes or usual.sizes, max_args, max_depth, seed
            )
        except ValueError as error:
            raise GatesError(str(error)) from error
        require_free(folder, overwrite=overwrite_output, option="--data.init_args.folder")
        refuse_strangers(folder, [*FILES.values()])
        with ticking("making trees", sum(settings.sizes)) as tick:
            rows = draw_splits(settings, lambda work, calls: in_processes(work, calls, tick))
        write_splits(folder, rows)
        with working("reading the trees"):
            train, validation, test = map(datamodule.part, SPLITS)
        for split, part in zip(SPLITS, (train, validation, test), strict=True):
            print(f"{split:10}{len(part.inputs):9,} trees{sum(map(len, part.inputs)):14,} tokens")
        print(f"accuracy of the most frequent label: {majority(train, test).mean():.3f}")
        print(
            "accuracy of the most frequent label by operator at the root: "
            f"{majority_by_root(train, test).mean():.3f}"
        )
        print(folder)

    def evaluate(
        self,
        model: SeqBoatModule,
        datamodule: L.LightningDataModule,
        seeds: tuple[int, ...] = (0,),
        speakers: bool = False,
        study: Literal["speech", "listops", "activation", "bytes"] = "speech",
    ) -> None:
        """Train what is missing, and score it next to rivals on sequences that were never seen.

        Args:
            model: Filled in by the command line.
            datamodule: Filled in by the command line.
            seeds: Seeds of every method.
            speakers: Leave one speaker out at a time, instead of some recordings of all.
            study: ``speech``, next to a regression and convolutions; ``listops``, next to the most
                frequent label, also by operator at the root; ``activation``, learned gates next to
                all tokens, none and random ones; or ``bytes``, next to a decoder, counts and PPMd.
        """
        del model
        if not seeds or min(seeds) < 0 or len({*seeds}) < len(seeds):
            raise GatesError(f"--seeds is {list(seeds)}, expected one or more from 0, each once")
        run = self.run(seeds=seeds)
        studies: dict[str, Any] = {
            "speech": partial(SpeechStudy, speakers=speakers),
            "activation": ActivationStudy,
            "bytes": BytesStudy,
            "listops": ListOpsStudy,
        }
        studies[study](run, datamodule, seeds).finish()

    def add_to_report(
        self, page: Page, model: SeqBoatModule, datamodule: L.LightningDataModule
    ) -> None:
        """Add how many tokens attended in each layer while `fit` trained, and a tree or bytes."""
        del model
        layers = {
            metric.partition("/")[2]: [{"density": curve}]
            for metric, curve in read_curves(self.run().folder).get("fit", {}).items()
            if metric.startswith("density/")
        }
        if layers:
            page.section("Density over training").figure(
                learning_figure(layers, title="Density over training"),
                "The fraction of the validation tokens that attend in each layer, logged by fit."
                + UNSCORED,
            )
        studies: dict[type, Any] = {ListOpsData: ListOpsStudy, LanguageDataModule: BytesStudy}
        if (study := studies.get(type(datamodule))) is not None:
            seeds = read_scores(self.run_folder.scores, "language").seeds
            study(self.run(), datamodule, seeds).add_to(page)

    def report_options(self) -> dict[str, Any]:
        """Return the method that ``fit`` trains, which ``evaluate`` does not score."""
        return {"unscored": CONFIGURED}


class SeqBoatCLI(GatesRunCLI):
    """The command line of ``gates language`` on sequences."""

    app = "language"
    verbs = ("prepare", "fit", "evaluate", "report")
    other_verbs = tuple(sorted(APPS["language"].verbs.keys() - set(verbs)))
    package = "language"
    neutral = tuple(f"{DATA}{name}" for name in PLACES)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let the order of the data follow the seed."""
        super().add_arguments_to_parser(parser)
        parser.link_arguments("seed_everything", f"{DATA}seed", compute_fn=int)

    def after_instantiate_classes(self) -> None:
        """Refuse a model whose classes or symbols are not those of the data.

        Raises:
            GatesError: Their numbers differ.
        """
        if isinstance(self.datamodule, SequenceData) and self.subcommand != "prepare":
            self.datamodule.setup("fit")
            model, arguments = self.model.model, "set model.model.init_args"
            classes, symbols = len(self.datamodule.classes), self.datamodule.symbols
            if classes != model.vocab_size:
                raise GatesError(
                    f"the data have {classes} classes, but the model {model.vocab_size} outputs: "
                    f"{arguments}.outputs to {classes}"
                )
            if (symbols > 0) != isinstance(model.front, SymbolEmbedding):
                what, fronts = ("symbols", "a") if symbols else ("samples", "no")
                raise GatesError(
                    f"the data are {what}, but the front end is a {type(model.front).__name__}: "
                    f"{arguments}.front to {fronts} SymbolEmbedding"
                )
            if symbols and model.front.vocab_size < symbols:
                raise GatesError(
                    f"the data have {symbols} symbols, but the model {model.front.vocab_size}: "
                    f"{arguments}.front.init_args.vocab_size to {symbols}"
                )
        super().after_instantiate_classes()

    def training(self, run: Run) -> Piece:
        """Return the piece that ``fit`` makes."""
        return run.piece(CONFIGURED, run.settings["seed"])

    def keep(self, run: Run, piece: Piece, objects: Sequence[str], path: Any) -> Any:
        """Keep the state of the model where ``evaluate`` and ``classify`` find it."""
        state = load_weights(path)["state_dict"].items()
        weights = {name.removeprefix("model."): value for name, value in state}
        return run.store("weights", Arrays()).keep(
            piece, weights, objects=objects, classes=list(getattr(self.datamodule, "classes", ()))
        )


def run_training_verb(arguments: Sequence[str]) -> None:
    """Run one of these verbs, or refuse another."""
    SeqBoatCLI(
        SeqBoatModule, L.LightningDataModule, SeqBoatTrainer, arguments,
        subclass_mode_data=True, trainer_defaults={"enable_model_summary": False},
    )  # fmt: skip
