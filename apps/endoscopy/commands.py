"""``gates endoscopy``: polyp sizing with feature-selection gates and gradient routing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from apps.endoscopy.report import endoscopy_report
from apps.endoscopy.size_scoring import Study, Wanted, run_audit, score, score_honest
from apps.endoscopy.training_runs import (
    WEIGHTS,
    Trainings,
    decisive,
    download_real_colon,
    facts,
    load_checkpoint,
    piece_of,
    prepare_data,
    print_random_start,
    render,
    render_missing,
)
from endoscopy.bundles.bundle_fitting import Bundles, bundle_of
from endoscopy.data.sizing_datamodule import PolypSizingDataModule
from endoscopy.evaluation.size_evaluation import Bars
from endoscopy.experiments.scored_predictions import Budget
from endoscopy.experiments.sizers import (
    CONFIGURED,
    MAIN,
    SHIFTS,
    Rendering,
    Sizers,
    Training,
    file_hash,
    taking_part,
)
from endoscopy.models import load_timm_weights
from endoscopy.training.sizing_module import SizingModule
from harness.command import GatesRunCLI, GatesRunTrainer
from harness.command.verbs import FunctionVerb, run_verb
from harness.experiment import Piece, Run
from harness.files.piece import LENGTHENED

DEFAULT_CONFIG = "synthetic"  # of verbs that need no data
FUNCTIONS = {
    "predict": FunctionVerb("apps.endoscopy.predict:predict", "sources"),
    "export": FunctionVerb("apps.endoscopy.training_runs:export"),
    "demo": FunctionVerb("apps.endoscopy.demo_page:demo"),
}
"""Verbs that need neither data nor a Trainer."""

NEUTRAL = (
    "table", "real_colon", "sun", "synthetic", "split_file", "cache_folder", "cache_epochs",
    "num_workers", "seed",
)  # fmt: skip
"""Options of the data that do not determine results, or only through file contents."""


class EndoscopyTrainer(GatesRunTrainer):
    """The verbs of ``gates endoscopy``; ``fit`` is Lightning's own.

    Attributes:
        rendering: Rendered sets of the configuration.
        timm_weights: State dict of timm from which training runs start.
    """

    rendering: Rendering
    timm_weights: str | None = None

    def render(
        self,
        model: SizingModule,
        datamodule: PolypSizingDataModule,
        sets: tuple[str, ...] = (MAIN, *SHIFTS),
    ) -> None:
        """Render colonoscopies with known truth; a killed rendering continues where it stopped.

        Args:
            model: Filled in by the command line.
            datamodule: Filled in by the command line.
            sets: ``main`` for training; ``agc`` and ``brand_b``, the same with automatic
                exposure and through another endoscope.
        """
        del model
        for rendered_set in render(datamodule, self.rendering, sets):
            print(rendered_set.folder)

    def prepare(
        self,
        model: SizingModule,
        datamodule: PolypSizingDataModule,
        download: str | None = None,
        manifest: str | None = None,
    ) -> None:
        """Read raw data, report every fault, build the cache and write one frame table.

        Args:
            model: Filled in by the command line.
            datamodule: Filled in by the command line.
            download: Folder into which REAL-Colon is downloaded first (about 880 GB), and from
                which it is read; an interrupted download continues.
            manifest: JSON list of the files to download; that of figshare by default.
        """
        del model
        if download is not None:
            download_real_colon(datamodule, download, manifest)
        render_missing(datamodule, self.rendering, (MAIN,))
        print(prepare_data(datamodule, self.run_folder.path))

    def evaluate(
        self,
        model: SizingModule,
        datamodule: PolypSizingDataModule,
        variants: tuple[str, ...] = (CONFIGURED,),
        seeds: tuple[int, ...] = (0,),
        folds: tuple[int, ...] = (),
        shifts: tuple[str, ...] = (),
        bars: Bars | None = None,
        train_objects: tuple[int, ...] = (),
        steps: int = 900,
        trials: dict[str, list[dict[str, float]]] | None = None,
        trial_objects: int = 150,
        only: tuple[str, ...] = (),
        quick: bool = False,
        ckpt_path: str | None = None,
    ) -> None:
        """Score networks next to simple baselines; first train what is missing.

        Args:
            model: Filled in by the command line.
            datamodule: Filled in by the command line.
            variants: Networks to compare, see `endoscopy.experiments.sizers.VARIANTS`;
                bars, intervals and shifts refer to the first.
            seeds: Seeds of each variant.
            folds: Folds whose test parts are pooled; that of the data if none is named.
            shifts: Rendered sets on which the first variant is also scored.
            bars: Scores that must be reached.
            train_objects: Numbers of training objects of the honest table, which compares the
                variants with ``plain`` at each; none for the usual evaluation.
            steps: Optimizer steps of every training of the honest table.
            trials: Settings tried for each variant of the honest table.
            trial_objects: Training objects of a trial.
            only: Variants that take part; all when empty. Bars need all.
            quick: A quick run: no training, no shifts, no bars.
            ckpt_path: A checkpoint to score instead of all seeds; no bars.
        """
        sizers = self.sizers(model, datamodule)
        run = self.run(quick=quick, only=only, seeds=seeds[:1] if ckpt_path else seeds)
        variants = taking_part(variants, only)
        if train_objects:
            budget = Budget(variants, seeds, train_objects, steps, trials or {}, trial_objects)
            score_honest(run, sizers, budget)
            return
        wanted = Wanted(variants, seeds, folds, () if quick else shifts, bars or Bars())
        score(run, sizers, wanted, pinned=ckpt_path)

    def audit(
        self,
        model: SizingModule,
        datamodule: PolypSizingDataModule,
        study: Study = "audits",
        test_objects: int = 300,
        ladder_objects: tuple[int, int] = (700, 3000),
        audit_seed: int = 0,
        images: str = "digits",
    ) -> None:
        """Find out what a trained network relies on, or run a study of gates.

        Args:
            model: Filled in by the command line.
            datamodule: Filled in by the command line.
            study: ``audits`` for all of ``shortcut``, ``masks``, ``boxes``, ``oracle_scale`` and
                ``ladder``, or one of them; ``planted`` features and ``generalization`` to digits
                are studies of gates.
            test_objects: Objects of the audits of masks, boxes and scale.
            ladder_objects: Training and test objects of the ladder.
            audit_seed: Seed of the network that is audited.
            images: Images of the study of generalization: ``digits``, ``fashion_mnist`` from its
                Debian package, or a folder with its files.
        """
        run_audit(
            Trainings(self.run(), self.sizers(model, datamodule)),
            study,
            test_objects=test_objects,
            ladder_objects=ladder_objects,
            seed=audit_seed,
            images=images,
        )

    def report(self, model: SizingModule, datamodule: PolypSizingDataModule) -> None:
        """Write the report of a run as one HTML page.

        Args:
            model: Filled in by the command line.
            datamodule: Filled in by the command line.
        """
        print(endoscopy_report(Trainings(self.run(), self.sizers(model, datamodule))))

    def sizers(self, model: SizingModule, datamodule: PolypSizingDataModule) -> Sizers:
        """Return the networks of the configuration."""
        return Sizers(model, datamodule, self.rendering, self.timm_weights)


class EndoscopyCLI(GatesRunCLI):
    """The command line of ``gates endoscopy``."""

    app = "endoscopy"
    verbs = ("render", "prepare", "fit", "evaluate", "audit", "report")
    other_verbs = tuple(FUNCTIONS)
    package = "endoscopy"
    neutral = tuple(f"data.{name}" for name in NEUTRAL)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add rendering and pretrained weights; the order of the data follows the seed."""
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(Rendering, "rendering")
        parser.add_argument(
            "--timm_weights", type=str | None, help="State dict of timm from which training starts."
        )
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def settings(self) -> dict[str, Any]:
        """Add rendering and pretrained weights."""
        options = self.config[self.subcommand]
        looks = {f"rendering.{n}": v for n, v in vars(options["rendering"]).items()}
        del looks["rendering.shift_objects"]
        return super().settings() | looks | {"timm_weights": file_hash(options["timm_weights"])}

    def training(self, run: Run) -> Piece:
        """Return the piece that ``fit`` makes, under the options of the command line."""
        return run.piece(CONFIGURED, run.settings["seed"])

    def after_instantiate_classes(self) -> None:
        """Pass options to trainer and data."""
        options = self.config_init[self.subcommand]
        self._trainer.rendering = options["rendering"]
        self._trainer.timm_weights = options["timm_weights"]
        self.datamodule.announce = print
        super().after_instantiate_classes()

    def before_fit(self) -> None:
        """Render what is missing and start from pretrained weights, if any are named."""
        trainer = self._trainer
        if trainer.is_global_zero:
            self.datamodule.check_sources()
            print_random_start(self.datamodule, trainer.timm_weights)
            render_missing(self.datamodule, trainer.rendering, (MAIN,))
        if trainer.timm_weights is not None:
            load_timm_weights(self.model.model, trainer.timm_weights)

    def keep(self, run: Run, piece: Piece, objects: Sequence[str], path: Path) -> Path:
        """Store the network with all that predictions need, where the other verbs find it."""
        data, sizers = self.datamodule, self._trainer.sizers(self.model, self.datamodule)
        run.settings = decisive(run.settings, sizers)
        module = sizers.untrained(Training())  # as it is on one rank
        load_checkpoint(path, module)
        sizers.settle(CONFIGURED, module, data)
        training = Training(seed=data.seed)
        kept = piece_of(run, sizers, training, lengthened=piece.get(LENGTHENED))
        bundle = bundle_of(module, data, facts=facts(kept, run.config), settings=kept.settings)
        return run.store(WEIGHTS, Bundles()).keep(kept, bundle, objects=objects)

    @property
    def _trainer(self) -> EndoscopyTrainer:
        assert isinstance(self.trainer, EndoscopyTrainer)
        return self.trainer


def main(arguments: Sequence[str]) -> None:
    """Run one verb."""
    if arguments[0] in FUNCTIONS:
        run_verb("endoscopy", FUNCTIONS, arguments, config=DEFAULT_CONFIG)
        return
    EndoscopyCLI(
        SizingModule,
        PolypSizingDataModule,
        EndoscopyTrainer,
        list(arguments),
        trainer_defaults={"enable_model_summary": False},
    )
