"""The verbs of ``gates video`` that train or compare networks: fit, tune, evaluate, report."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only

from apps.main import APPS
from apps.video.commands import MODEL
from apps.video.comparison import Comparison, Study
from apps.video.controls import OPEN_BANDIT, control_rows_and_bars
from core_gates.errors import GatesError
from harness.command import GatesRunCLI, GatesRunTrainer
from harness.command.configfile import CHECKPOINT
from harness.experiment import Arrays, Piece, Run, flatten, print_choices
from harness.files import content_digest
from harness.report.page import Page
from harness.runs.callbacks import load_weights
from recsys.baselines import BaseRates
from recsys.data.datamodule import TableDataModule, data_module
from recsys.data.doubts import of_hierarchy, of_loss, of_rates
from recsys.data.table_files import SUFFIXES
from recsys.data.tables import Part
from recsys.experiments import (
    Claims,
    Contest,
    Fold,
    Probabilities,
    check_finite,
    folds_of,
    gap_of,
    module_of,
    probabilities,
    summed_log_loss_of,
    with_whole_mappings,
)
from recsys.model_folder import save_model
from recsys.ranker_module import MultiTaskModule
from recsys.vocabulary import UNKNOWN
from video_multitask.stream.parquet_stream import ParquetStream

SOURCE = "data.source.init_args."
START = "model.start"
PLACES = (*(f"{SOURCE}{name}" for name in ("path", "folder", "test_path", "users_path")), START)
WINDOW = f"{SOURCE}window"
LARGEST_SEED = 2**32 - 1
KUAIRAND = ".kuairand"  # in the names of classes that read the folders of a release
DRAFTS = "; gates video prepare TABLE --table.labels LABEL drafts its configuration"
NEUTRAL = ("data.eval_batch_size", *PLACES)
"""Options of the data that decide no result, or only by the content of files."""


class VideoTrainer(GatesRunTrainer):
    """The verbs of ``gates video``; ``fit`` is Lightning's own.

    Attributes:
        contest: Networks and baselines of the configuration.
        places: Where its files are, by dotted name.
        shown: Seeds and folds of the networks that the report draws.
    """

    contest: Contest
    places: Mapping[str, str]
    shown: tuple[tuple[int, ...], tuple[Fold, ...]]

    def tune(
        self, model: MultiTaskModule, datamodule: TableDataModule, only: tuple[str, ...] = ()
    ) -> None:
        """Choose the settings of every network and baseline by equally many trials.

        Args:
            model: Filled in by the command line.
            datamodule: Filled in by the command line.
            only: Methods that take part; all when empty.
        """
        del model, datamodule
        run = self.run(only=only)
        print_choices(Comparison(run, self.contest, (), places=self.places).chosen())

    def evaluate(
        self,
        model: MultiTaskModule,
        datamodule: TableDataModule,
        seeds: tuple[int, ...] = (0, 1, 2),
        folds: tuple[int, ...] = (),
        fold_setting: str = WINDOW,
        claims: Claims | None = None,
        exact_auc: bool = False,
        averaged: bool = False,
        experts: bool = False,
        slices: bool = False,
        controls: bool = False,
        open_bandit: str = OPEN_BANDIT,
        study: Study | None = None,
        only: tuple[str, ...] = (),
        quick: bool = False,
    ) -> None:
        """Tune all methods, train what is missing, and score them next to simple baselines.

        Args:
            model: Filled in by the command line.
            datamodule: Filled in by the command line.
            seeds: Seeds of every network.
            folds: Values of ``fold_setting``: the test rows of all these splits are pooled.
            fold_setting: Setting in which the splits differ.
            claims: What must hold.
            exact_auc: Whether AUC gets intervals and paired differences.
            averaged: Whether the mean prediction of the seeds is scored, too.
            experts: Whether the three faults of experts are measured in every network.
            slices: Whether new users, new videos, activity and exposure are scored by themselves.
            controls: Whether permuted labels and a planted leak are checked, where the source has
                both, and the rates and off-policy estimates of a simulated feed.
            open_bandit: Open Bandit log on which policies estimate each other, if it is there.
            study: Another question than which method is best, instead of all above but the seeds.
            only: Methods that take part; all when empty. Bars need all.
            quick: A quick run: baselines are fitted, no network is tuned or trained, no bars.
        """
        check_seeds(seeds)
        run = self.run(quick=quick, only=only, seeds=seeds)
        if study is not None:
            study.finish(run, self.contest, seeds, self.places)
            return
        split = folds_of(fold_setting, folds, run.settings)
        contest = Comparison(
            run,
            self.contest,
            seeds,
            split,
            exact_auc=exact_auc,
            averaged=averaged,
            places=self.places,
        )
        further = None
        if controls:
            log, data = Path(open_bandit), contest.data(split[0])
            further = control_rows_and_bars(
                run, self.contest, data, places=self.places, open_bandit=log
            )
        contest.finish(claims or Claims(), experts=experts, slices=slices, further=further)

    def report(
        self,
        model: MultiTaskModule,
        datamodule: TableDataModule,
        seed: int = 0,
        folds: tuple[int, ...] = (),
        fold_setting: str = WINDOW,
    ) -> None:
        """Write the report of a run as one HTML page, and its figures as PNG with their numbers.

        Args:
            model: Filled in by the command line.
            datamodule: Filled in by the command line.
            seed: Seed of the networks that are drawn.
            folds: Splits that ``evaluate`` has pooled; networks of the first one are drawn.
            fold_setting: Setting in which these splits differ.
        """
        self.shown = (seed,), folds_of(fold_setting, folds, self.run().settings)
        super().report(model, datamodule)

    def add_to_report(
        self, page: Page, model: MultiTaskModule, datamodule: TableDataModule
    ) -> None:
        """Add calibration, one user's list, experts, gates and the importance of fields.

        Args:
            page: The report.
            model: Filled in by the command line.
            datamodule: Filled in by the command line.
        """
        from apps.video.report import add_figures

        del model, datamodule
        add_figures(page, self._drawn)

    def report_options(self) -> dict[str, Any]:
        """Return report options: the settings of each method, and names of intervals and trials."""
        shown = self._drawn
        user = shown.data(shown.folds[0]).schema.user
        return {
            "own": shown.own_of_all(),
            "units": "users" if user else "rows",
            "score": "validation log-loss, lower is better",
        }

    @cached_property
    def _drawn(self) -> Comparison:
        """The comparison that the report draws; it reads its data once."""
        return Comparison(self.run(), self.contest, *self.shown, places=self.places)


class VideoCLI(GatesRunCLI):
    """The command line of ``gates video``."""

    app = "video"
    verbs = ("fit", "tune", "evaluate", "report")
    other_verbs = tuple(sorted(APPS["video"].verbs.keys() - set(verbs)))
    package = "video_multitask"
    neutral = NEUTRAL

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the contest; the order of training rows follows the seed."""
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(Contest, "contest")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def after_instantiate_classes(self) -> None:
        """Pass the contest to the trainer."""
        assert isinstance(self.trainer, VideoTrainer)
        self.trainer.contest = self.config_init[self.subcommand]["contest"]
        self.trainer.places = self._places()
        if self.subcommand not in self.trains and START in self.trainer.places:
            raise GatesError(f"--{START} is for fit: give methods of the contest a start instead")
        super().after_instantiate_classes()

    def settings(self) -> dict[str, Any]:
        """Add a hash of the files that the data come from; options stay as they were given.

        Raises:
            GatesError: One does not exist.
        """
        paths = {name: Path(place) for name, place in self._places().items()}
        kind = str(self._data_options().get("data.source.class_path"))
        by_release = KUAIRAND in kind
        for name, path in paths.items():  # readers of KuaiRand say themselves how to get theirs
            if not by_release and name.endswith("path") and not path.exists():
                raise GatesError(
                    f"{path} does not exist: name a file or a folder of {', '.join(SUFFIXES)}, "
                    f"by --{name}{DRAFTS * kind.endswith('.OwnTable')}"
                )
        hashes = {
            f"content.{name.rpartition('.')[2]}": content_digest(path).sha256[:16]
            for name, path in paths.items()
            if path.exists()
        }
        options = yaml.safe_load(self._portable_config())
        source = options["data"].get("source")
        arguments = source.get("init_args") if isinstance(source, dict) else None
        settings = with_whole_mappings(super().settings(), "model.", options["model"])
        return with_whole_mappings(settings, SOURCE, arguments or {}) | hashes

    def _places(self) -> dict[str, str]:
        options = self._data_options() | {START: self.config[self.subcommand]["model"]["start"]}
        return {name: str(options[name]) for name in PLACES if options.get(name)}

    def _data_options(self) -> dict[str, Any]:
        return flatten(yaml.safe_load(self._portable_config())["data"], "data.")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Stop training early by the contest's patience, and print the loss of base rates first."""
        trainer = super().instantiate_trainer(**kwargs)
        if self.subcommand in self.trains and (patience := self._patience()):
            monitor, mode = (self.config[self.subcommand]["checkpoint"][n] for n in CHECKPOINT)
            callbacks = [
                BaseRateLine(),
                EarlyStopping(monitor, mode=mode, patience=patience, strict=False),
            ]
            trainer.callbacks[:0] = callbacks  # type: ignore[attr-defined]
        return trainer

    def _patience(self) -> int | None:
        """Return the validations without a better score that end ``fit``; None without a score."""
        options = self.config[self.subcommand]
        return options["contest"]["patience"] if options["checkpoint"]["monitor"] else None

    def training(self, run: Run) -> Piece:
        """Return the piece that ``fit`` makes."""
        return run.piece("fit", run.settings["seed"], patience=self._patience())

    def keep(self, run: Run, piece: Piece, objects: Sequence[str], path: Path) -> Path:
        """Keep the weights, and write the model folder that the other verbs read."""
        return keep_model(path, run, piece, objects, self.datamodule)


class BaseRateLine(Callback):
    """Print what is doubtful about the rows, and the loss that a network has to beat, at first."""

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print it."""
        assert isinstance(pl_module, MultiTaskModule)
        data: TableDataModule = trainer.datamodule  # type: ignore[attr-defined]
        for line in [*getattr(data, "doubts", ()), *of_hierarchy([pl_module.net], data.schema)]:
            print(line)
        data.batch(held_out(data))  # so that a fault of theirs is found before the training
        rates, rows = base_rates_of(data, pl_module.intercepts), data.batch("validation")
        print(f"validation loss of base rates: {summed_log_loss_of(rows, rates):.4f}")


def held_out(data: TableDataModule | ParquetStream) -> Part:
    """Return the part by which calibration is judged: that for tests, if it is in memory."""
    tested = isinstance(data, TableDataModule) and len(data.table("test"))
    return "test" if tested else "validation"


def base_rates_of(data: TableDataModule | ParquetStream, intercepts: str | None) -> Probabilities:
    """Return base rates as predictions (N, T) of validation rows: those of the training rows.

    They are those of the validation rows of a stream, and where networks get intercepts from these.

    Args:
        data: Rows.
        intercepts: Where networks get their intercepts from, if they do.
    """
    rows = data.batch("validation")
    needs_training_rows = intercepts is not None or not isinstance(data, TableDataModule)
    return BaseRates().fit(rows if needs_training_rows else data.batch("train"), rows).predict(rows)


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse seeds that no generator takes.

    Raises:
        GatesError: One is negative or too large.
    """
    if wrong := [seed for seed in seeds if not 0 <= seed <= LARGEST_SEED]:
        raise GatesError(f"--seeds names {wrong[0]}: expected 0 to {LARGEST_SEED:,}")


def run_training_verb(arguments: Sequence[str]) -> None:
    """Run one of these verbs, or refuse another."""
    defaults: dict[str, Any] = {"enable_model_summary": False, "max_epochs": 10}
    VideoCLI(MultiTaskModule, data_module, VideoTrainer, list(arguments), trainer_defaults=defaults)


def keep_model(
    path: Path, run: Run, piece: Piece, objects: Sequence[str], data: TableDataModule
) -> Path:
    """Keep the weights of a training run, and return its model folder.

    Args:
        path: Checkpoint.
        run: Its results.
        piece: What was trained.
        objects: Short hashes of what it was trained on.
        data: Whose transform the model folder holds.

    Raises:
        GatesError: The training has diverged.
    """
    module = module_of(piece.settings)
    module.build(data.transform)
    module.load_state_dict(load_weights(path)["state_dict"])
    rows = data.batch("validation")
    ranker = module.served(rows)
    check_finite(ranker, rows)
    predicted, base = probabilities(ranker, rows), base_rates_of(data, module.intercepts)
    loss, least = (summed_log_loss_of(rows, p) for p in (predicted, base))
    print(f"validation loss of {module.net}: {loss:.4f}, of base rates: {least:.4f}")
    for line in of_loss(module.net, loss, gap_of([predicted], [base], rows)):
        print(f"WARNING: {line}")
    held = data.batch(held_out(data))
    for line in of_rates(module.net, data.schema.task_names, held, probabilities(ranker, held)):
        print(line)
    run.store("weights", Arrays()).keep(piece, ranker.state_dict(), objects=objects)
    count = ranker.count_params()
    dense = count["net"] + count["encoders"]
    print(f"weights: {dense:,} of the network, {count['tables']:,} of embedding tables")
    unknown = (rows.sparse == UNKNOWN).double().mean(0).tolist()
    settings = {
        "settings": piece.settings,
        "training_objects": list(objects),
        "unknown": dict(zip(data.transform.sparse_tables, unknown, strict=True)),
    }
    return save_model(run.folder / MODEL, ranker, data.transform, settings)
