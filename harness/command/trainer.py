"""The Trainer whose public methods are the verbs of an application, and its claim of a folder."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from core_gates.errors import GatesError
from harness.experiment import Run
from harness.files.piece import LENGTHENED, RECORD, Piece, Record, differences, gap, read_record
from harness.runs.callbacks import OBJECTS
from harness.runs.folder import RunFolder, git_revision
from harness.runs.loops import ExactTrainer
from harness.runs.terminal import release_warnings

if TYPE_CHECKING:
    from harness.report.page import Page


class GatesRunTrainer(ExactTrainer):
    """Lightning's Trainer with exact resuming and a run folder; an application adds its verbs.

    A verb is a documented, typed method that takes ``model`` and ``datamodule`` first; its other
    arguments become options of the command line::

        class DigitsTrainer(GatesRunTrainer):
            def tune(self, model: Classifier, datamodule: Digits, trials: int = 8) -> None:
                \"\"\"Choose the settings of every method.

    Args:
                    model: Filled in by the command line.
                    datamodule: Filled in by the command line.
                    trials: Trials of each method.
                \"\"\"
                self.run().tune(SPACES, trial, trials=trials)

    Attributes:
        run_folder: Where the verb writes; claimed for ``fit`` once its data are ready, untouched
            for other verbs.
        config_path: The file given with ``--config``, or None.
        run_options: Options of the command line for runs: settings, package, command.
    """

    run_folder: RunFolder
    config_path: Path | None = None
    run_options: dict[str, Any]

    def run(
        self,
        *,
        quick: bool = False,
        only: Collection[str] = (),
        seeds: Collection[int] | None = None,
    ) -> Run:
        """Return the run: its settings, results, tuning and scores.

        Args:
            quick: A quick run: nothing is trained, scores have no bars.
            only: Methods that take part; all when empty.
            seeds: Seeds of an evaluation; None for what writes no scores.

        Raises:
            GatesError: Scores of a full evaluation exist, which a quick run, or one with fewer
                methods or seeds, would replace.
        """
        return Run.of(
            self.run_folder,
            config_path=self.config_path,
            quick=quick,
            only=only,
            seeds=seeds,
            **self.run_options,
        )

    def report(self, model: Any, datamodule: Any) -> None:
        """Write the report of a run as one HTML page, and its figures as PNG with their numbers.

        Args:
            model: Filled in by the command line.
            datamodule: Filled in by the command line.
        """
        from harness.report.sections import run_page  # matplotlib takes a second

        page = run_page(
            self.run(),
            lambda page: self.add_to_report(page, model, datamodule),
            **self.report_options(),
        )
        print(page.write(self.run_folder.report))

    def add_to_report(self, page: "Page", model: Any, datamodule: Any) -> None:
        """Add what only the domain can show, below the scores; an application overrides it.

        Args:
            page: The report.
            model: Untrained network of the configuration.
            datamodule: Data of the configuration.
        """

    def report_options(self) -> dict[str, Any]:
        """Return further options of `harness.report.sections.run_page`."""
        return {}


GROWING = ("trainer.max_epochs", "trainer.max_steps", "trainer.max_time")


class FolderClaim(Callback):
    """Claim the run folder after ``prepare_data`` and ``setup`` of the data, before the first step.

    ``record.json`` in the folder then states what is trained, and a training run that is resumed
    must be the same. Lightning opens the files of its loggers before it sets up the data, so the
    Trainer gets them here. Only the first rank claims; the others wait. A trial run, of
    ``--trainer.fast_dev_run``, claims nothing.

    Args:
        run_folder: The folder of the run.
        config: What becomes its ``config.yaml``.
        loggers: Those of the training.
        describe: Returns the piece that is trained, and short hashes of what it is trained on.
        origin: Other fields of the record.

    Attributes:
        piece: What is trained; None before the claim.
        objects: Short hashes of what it is trained on.
    """

    def __init__(
        self,
        run_folder: RunFolder,
        config: str,
        loggers: Sequence[Logger],
        describe: Callable[[], tuple[Piece, Sequence[str]]],
        origin: dict[str, Any],
    ) -> None:
        self.run_folder, self.config, self.loggers = run_folder, config, list(loggers)
        self.describe, self.origin = describe, origin
        self.piece: Piece | None = None
        self.objects: Sequence[str] = ()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Claim the folder for a training run, once.

        Raises:
            GatesError: Another run has taken it meanwhile, or what is to be resumed is another
                training run.
        """
        release_warnings()
        if stage != "fit" or self.piece is not None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        piece, self.objects = self.describe()
        self.piece = resumed(self.run_folder, piece, self.objects)
        if trainer.is_global_zero:
            revision = git_revision()
            self.run_folder.open()
            self.run_folder.write_config(self.config)
            record = Record.of(
                self.piece, objects=sorted(self.objects), revision=revision, **self.origin
            )
            record.write(self.run_folder.training)
            if LENGTHENED in self.piece.settings:
                print(
                    "a lengthened training does not count as an uninterrupted one, which "
                    "evaluate would train; its checkpoint is "
                    f"{self.run_folder.checkpoints / 'last.ckpt'}"
                )
        trainer.strategy.barrier("claim")
        trainer.loggers = self.loggers

    def state_dict(self) -> dict[str, Any]:
        """Return the names of the training objects, for `harness.runs.callbacks.seen`."""
        return {OBJECTS: sorted(self.objects)}

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the folder back if the training failed before its first checkpoint."""
        if isinstance(exception, Exception):
            self.run_folder.give_back()


def resumed(run_folder: RunFolder, piece: Piece, objects: Sequence[str] | None = None) -> Piece:
    """Return the piece that a folder is claimed for, after comparing it with the folder's record.

    Args:
        run_folder: The folder; nothing is compared unless it is to be resumed and holds a training
            run.
        piece: What is to be trained.
        objects: What it is trained on; None while that is not known.

    Returns:
        The piece; it is marked ``lengthened`` if the training may now take longer.

    Raises:
        GatesError: The training that is there has another identity, other settings or other
            objects, or was longer.
    """
    if not run_folder.resume or not run_folder.exists():
        return piece
    record = read_record(run_folder.training)
    if record is None and run_folder.last_checkpoint is None:
        return piece  # killed while it claimed the folder
    if record is None:
        raise GatesError(
            f"{run_folder.training / RECORD} is missing or damaged, so it is not known what "
            f"{run_folder.training} was trained with: add --overwrite to start again, or --name "
            "NEW for another run"
        )
    if record.settings.get("start") and run_folder.last_checkpoint is None:
        raise GatesError(
            f"{run_folder.training} was started from another checkpoint and stopped before its "
            "first own one: give that --ckpt_path again, with --overwrite"
        )
    recorded, wanted = dict(record.settings), dict(piece.settings)
    if objects is None:  # before the data are there
        for settings in (recorded, wanted):
            settings.pop("data.digest", None)
    lengthened = bool(recorded.pop(LENGTHENED, False))
    for name in GROWING:
        if _grows(recorded.get(name), wanted.get(name)):
            recorded[name], lengthened = wanted.get(name), True
    same = Piece(piece.method, piece.seed, piece.keys, wanted)
    if said := gap(record._replace(settings=recorded, fingerprint=""), same):
        _refuse(run_folder, said)
    if objects is not None and sorted(objects) != sorted(record.objects):
        said = differences(
            {"training objects": len(record.objects)}, {"training objects": len(objects)}
        )
        _refuse(run_folder, said or f"{len(objects)} training objects, but others")
    if not lengthened:
        return piece
    return Piece(piece.method, piece.seed, piece.keys, {**piece.settings, LENGTHENED: True})


def _refuse(run_folder: RunFolder, said: str) -> None:
    raise GatesError(
        f"{run_folder.training} was trained with other settings ({said}): resume it with those, "
        "or add --name NEW for another run, or --overwrite to start again"
    )


def _grows(old: Any, new: Any) -> bool:
    """Return whether a limit is larger than before; None and -1 mean no limit."""
    if old in (None, -1):
        return False
    if new in (None, -1):
        return True
    return type(old) is type(new) and bool(new > old)
