"""The command line of an application: typed classes in, one-line errors out."""

import shlex
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from core_gates.errors import GatesError
from harness.command.configfile import CHECKPOINT, ConfigFile, chain, decisive_settings, start_of
from harness.command.parser import (
    COMMON_OPTIONS,
    GatesParser,
    TrainerHelp,
    constructing,
    describe,
    let_lists_be_plain,
    let_switches_stand_alone,
    one_line,
)
from harness.command.trainer import FolderClaim, GatesRunTrainer, resumed
from harness.experiment import Arrays, Piece, Run
from harness.files.piece import read_record
from harness.runs.callbacks import (
    RunCheckpoint,
    load_checkpoint,
    load_weights,
    progress_bar,
    seen,
    starting_from,
)
from harness.runs.folder import RunFolder
from harness.runs.loops import ResumableCSVLogger
from harness.runs.terminal import held_warnings, quiet_lightning

LIGHTNING_VERBS = {
    "fit": "Train the network, resumable at any step.",
    "validate": "Compute the validation scores of a network.",
    "test": "Compute the test scores of a network.",
    "predict": "Compute the predictions of a network.",
}
NAMED = ("best", "last", "hpc")  # checkpoints that Lightning finds itself
START = "Checkpoint of a training run to start from."
LARGEST_SEED = 2**32 - 1  # of numpy
OWN_OPTIONS = ("config", "resume", "overwrite", "shipped", "ckpt_path")


class TrainerParser(GatesParser, LightningArgumentParser):
    """The parser of verbs that have a Trainer."""


class GatesRunCLI(LightningCLI):
    """LightningCLI with run folders, resuming, packaged configurations and one-line errors.

    An application is a subclass, a Trainer with its verbs, and ``main``::

        class DigitsCLI(GatesRunCLI):
            app = "digits"
            verbs = ("prepare", "fit", "evaluate", "report")

        def main(arguments: Sequence[str]) -> None:
            DigitsCLI(Classifier, Digits, DigitsTrainer, arguments)

    plus its line in ``apps.main.APPS``. Every verb other than ``fit validate test predict`` is a
    method of the Trainer class, see `harness.command.trainer.GatesRunTrainer`. Arguments
    that two classes share are linked in ``add_arguments_to_parser`` (call ``super()`` first)::

        parser.link_arguments("data.channels", "model.channels", apply_on="instantiate")

    A configuration may hold one section for each verb (see
    `harness.command.configfile.select_verb`). Verbs of ``trains`` are training runs by
    `Trainer.fit`; an application with several picks their classes in ``main``. What a
    training run makes enters the results of the run, see `training` and `keep`.

    Args:
        model_class: The LightningModule, or a base class when ``subclass_mode_model=True``.
        datamodule_class: The LightningDataModule.
        trainer_class: Trainer with the verbs as methods.
        arguments: Command line, verb first.
        kwargs: Passed on to ``LightningCLI``.

    Raises:
        GatesError: The configuration or a value is wrong, or the run folder is taken.
    """

    app: ClassVar[str] = ""
    verbs: ClassVar[tuple[str, ...]] = (*LIGHTNING_VERBS, "report")
    other_verbs: ClassVar[tuple[str, ...]] = ()  # of harness.command.verbs, with their own sections
    trains: ClassVar[frozenset[str]] = frozenset({"fit"})  # verbs that claim a run folder
    package: ClassVar[str | None] = None  # with shipped results
    neutral: ClassVar[tuple[str, ...]] = ()  # options that decide no result

    def __init__(
        self,
        model_class: Callable[..., LightningModule],
        datamodule_class: Callable[..., LightningDataModule] | None = None,
        trainer_class: type[GatesRunTrainer] = GatesRunTrainer,
        arguments: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        quiet_lightning()
        self.arguments = list(arguments)
        self.verb = self.arguments[0] if self.arguments else ""
        self.command = shlex.join(["gates", self.app, *map(str, self.arguments)])
        verb = "fit" if self.verb in self.trains else self.verb  # what Lightning calls it
        self.arguments[:1] = [verb] if self.arguments else []
        # Building the parser of a verb costs half a second, so only the wanted one is built.
        self._wanted = (verb,) if self.verb in self.verbs else self.verbs
        kwargs.setdefault("parser_class", TrainerParser)
        kwargs.setdefault("seed_everything_default", 0)
        kwargs.setdefault("auto_configure_optimizers", False)
        sections = (*self.verbs, *self.other_verbs)
        kwargs["trainer_defaults"] = {"log_every_n_steps": 10, **kwargs.get("trainer_defaults", {})}
        parsers: dict[str, dict[str, Any]] = {
            v: {
                "app": self.app,
                "verb": self.verb if v == verb else v,
                "verbs": sections,
                "prog": f"gates {self.app} {self.verb if v == verb else v}",
            }
            for v in self._wanted
        }
        for v in LIGHTNING_VERBS.keys() & parsers.keys():
            parsers[v]["description"] = LIGHTNING_VERBS[v]
        with held_warnings(), ExitStack() as self._held:
            super().__init__(
                model_class,
                datamodule_class,
                save_config_callback=None,
                trainer_class=trainer_class,
                parser_kwargs={"prog": f"gates {self.app}", **parsers},
                args=self.arguments,
                **kwargs,
            )

    def __getstate__(self) -> dict[str, Any]:
        """What other ranks get that are spawned; the run folder stays held by this process."""
        return {name: value for name, value in vars(self).items() if name != "_held"}

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Verbs and the arguments that are not options, being filled in by the command line."""
        filled = {"model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders"}
        return {verb: filled | {"weights_only"} for verb in self._wanted}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Create a parser with our lookup of configurations and our help."""
        parser = self.parser_class(**kwargs)
        if kwargs.get("verb"):
            parser.add_argument(
                "--help.trainer",
                action=TrainerHelp,
                help="Show the options of the Trainer, such as --trainer.max_epochs, and exit.",
            )
        parser.add_argument(
            "-c",
            "--config",
            action=ConfigFile,
            help="Configuration: a path, or the name of a packaged one.",
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that every application has; an application calls ``super()`` first."""
        parser.add_argument(
            "--name", type=str | None, help="Name of the run; that of the configuration if null."
        )
        parser.add_argument("--root", type=str, default="runs", help="Folder of all runs.")
        parser.add_argument(
            "--resume", action="store_true", help="Continue a training run that was stopped."
        )
        parser.add_argument(
            "--overwrite",
            action="store_true",
            help="Start a training run again; replace results that have other settings, and scores "
            "of more methods or seeds.",
        )
        parser.add_argument(
            "--shipped",
            type=bool,
            default=True,
            help="Use results that ship with the package where their settings agree.",
        )
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; a resumed run without ``--config`` takes up its own stored configuration."""
        words = list(args) if isinstance(args, list) else []
        if stored := self._stored_config(words):
            words[1:1] = ["--config", str(stored)]
        for verb in self._wanted:
            let_switches_stand_alone(self._parser(verb))
            start = {"ckpt_path": START} if verb in LIGHTNING_VERBS else {}
            describe(self._parser(verb), {**COMMON_OPTIONS, **start, **self._unused(verb)})
        self.config = parser.parse_args(let_lists_be_plain(self._parser(self._wanted[0]), words))
        seed = self.config[self.config.subcommand].get("seed_everything")
        if isinstance(seed, bool) or (seed is not None and not 0 <= seed <= LARGEST_SEED):
            raise GatesError(
                f"--seed_everything {str(seed).lower()} is no seed: give a number from 0 to "
                f"{LARGEST_SEED:,}"
            )

    def _unused(self, verb: str) -> dict[str, str]:
        """Hide options of training runs in the help of other verbs, where they change nothing."""
        if verb in LIGHTNING_VERBS or self.verb in self.trains:
            return {}
        kept = {f"checkpoint.{name}" for name in CHECKPOINT}  # part of the settings of results
        names = {action.dest for action in self._parser(verb)._actions} - kept
        return {n: SUPPRESS for n in names if n == "resume" or n.startswith("checkpoint.")}

    def _stored_config(self, words: list[str]) -> Path | None:
        if "--resume" not in words or any(w.split("=")[0] in ("-c", "--config") for w in words):
            return None
        given = {"--root": "runs", "--name": "default"}
        for option in given:
            for index, word in enumerate(words):
                if word == option and index + 1 < len(words):
                    given[option] = words[index + 1]
                elif word.startswith(f"{option}="):
                    given[option] = word.partition("=")[2]
        verb = self.verb if self.verb in self.trains else "fit"
        config = RunFolder(self.app, given["--name"], given["--root"], verb=verb).config
        return config if config.is_file() else None

    def _parse_ckpt_path(self) -> None:
        """Refuse a ``--ckpt_path`` that is missing or no checkpoint, then let Lightning read it."""
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path and path not in NAMED:
            if self.config.subcommand in LIGHTNING_VERBS:
                load_checkpoint(Path(path), "give checkpoints/last.ckpt or best.ckpt of a run")
            else:
                load_weights(Path(path))
        super()._parse_ckpt_path()

    def before_instantiate_classes(self) -> None:
        """Refuse a run folder that is taken before anything expensive is built.

        No other process can train in it from here to the end of the training.
        """
        options = self.config[self.subcommand]
        self.config_path = getattr(self._parser(self.subcommand), "config_path", None)
        stem = self.config_path.stem if self.config_path else "default"
        options["name"] = options.get("name") or stem
        self.run_folder = RunFolder(
            self.app,
            options["name"],
            options["root"],
            resume=options["resume"],
            overwrite=options["overwrite"],
            verb=self.verb if self.subcommand in self.trains else "fit",
        )
        if self.subcommand in self.trains:
            self._refuse_no_length()
        first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
        if self.subcommand in self.trains and options["resume"] and options.get("ckpt_path"):
            raise GatesError(
                "--resume continues from the checkpoint of the run and --ckpt_path starts from "
                "another one: give one of them"
            )
        if self.subcommand in self.trains and first:
            if not options["trainer"].get("fast_dev_run"):  # which writes nothing
                self._held.enter_context(self.run_folder.alone())
            self.run_folder.check()
            if start := options.get("ckpt_path"):
                self.run_folder.refuse_deleting(Path(start))
            resumed(self.run_folder, self.training(self._run()))
            if options["resume"] and (last := self.run_folder.last_checkpoint):
                load_checkpoint(last, "start again with --overwrite, or from an older copy of it")
            elif options["resume"]:
                print(f"{self.run_folder.training} has no checkpoint: training starts at step 0")

    def _refuse_no_length(self) -> None:
        trainer = self.config[self.subcommand]["trainer"]
        for name in ("max_epochs", "max_steps", "limit_train_batches"):
            if trainer.get(name) == 0:
                raise GatesError(f"--trainer.{name} 0 trains nothing: give a larger one")

    def _portable_config(self) -> str:
        """The configuration as YAML, without the options that belong to one call only."""
        options = self.config[self.subcommand].clone()
        for name in OWN_OPTIONS:
            options.pop(name, None)
        options["trainer"]["callbacks"] = _with_names(options["trainer"].get("callbacks"))
        try:
            return str(
                self._parser(self.subcommand).dump(options, skip_none=False, skip_validation=True)
            )
        except yaml.representer.RepresenterError as error:
            raise GatesError(
                f"an argument of a class is no plain value, so that config.yaml cannot hold it: "
                f"{error.args[-1]!r}; give it as a number, a word or null"
            ) from error

    def _dump_config(self) -> None:
        """Note what classes are built with, as Lightning does, but without a second validation."""
        if not hasattr(self, "config_dump"):
            text = self.parser.dump(
                self.config, skip_link_targets=False, skip_none=False, skip_validation=True
            )
            self.config_dump = yaml.safe_load(text)[self.config.subcommand]

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; whatever a constructor raises becomes one line.

        Raises:
            GatesError: A constructor refused a value or failed.
        """
        with constructing():
            try:
                super().instantiate_classes()
            except (ValueError, MisconfigurationException) as error:
                if not (text := one_line(str(error), ())):
                    raise
                raise GatesError(text) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the claim of the run folder, the log and the progress; tell the Trainer its run."""
        options = self._get(self.config_init, "trainer")
        kwargs.setdefault("logger", False)  # those of a training run come with the claim
        kwargs.setdefault("default_root_dir", str(self.run_folder.training))
        callbacks = list(options.get("callbacks") or [])
        if self.subcommand in self.trains:
            loggers = self._loggers(options.get("logger"))
            self.claim = FolderClaim(
                self.run_folder, self._portable_config(), loggers, self._described, self._origin()
            )
            callbacks.insert(0, self.claim)
        if options.get("enable_progress_bar") is not False:
            callbacks.append(progress_bar())
        trainer = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        assert isinstance(trainer, GatesRunTrainer)
        trainer.run_folder, trainer.config_path = self.run_folder, self.config_path
        trainer.run_options = self._run_options()
        return trainer

    def settings(self) -> dict[str, Any]:
        """Return all that decides a result, by name: of model, data and training."""
        options = yaml.safe_load(self._portable_config())
        start = start_of(self.config[self.subcommand].get("ckpt_path"))
        if self.run_folder.resume and (record := read_record(self.run_folder.training)):
            start = record.settings.get("start")
        return {**decisive_settings(options, self.neutral), "start": start}

    def training(self, run: Run) -> Piece:
        """Return the piece that a training run makes, as ``evaluate`` would name it."""
        return run.piece(self.verb, run.settings.get("seed"))

    def keep(self, run: Run, piece: Piece, objects: Sequence[str], path: Path) -> Path:
        """Keep what was trained where other verbs find it, and return where.

        Args:
            run: The run.
            piece: What was trained.
            objects: Short hashes of what it was trained on.
            path: Its checkpoint, the best or else the last one.
        """
        weights = load_weights(path)["state_dict"]
        return run.store("weights", Arrays()).keep(piece, weights, objects=objects)

    def after_fit(self) -> None:
        """Keep what was trained.

        Raises:
            GatesError: Nothing was.
        """
        if not self.trainer.is_global_zero or not self.trainer.state.finished:
            return
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            print("a trial run: nothing was kept, and the run folder is as before")
        elif self.claim.piece is not None:
            self._refuse_no_step()
            path = self.run_folder.best_checkpoint or self.run_folder.last_checkpoint
            kept = path and self.keep(self._run(), self.claim.piece, self.claim.objects, path)
            self.run_folder.forget_replaced()
            print(kept or f"no network was kept: {self.run_folder.checkpoints} is empty")

    def _refuse_no_step(self) -> None:
        if self.trainer.global_step == 0:
            self.run_folder.give_back()
            raise GatesError(
                "nothing was trained, so there is no network: the training ended before its first "
                "step; check the limits of --trainer"
            )
        start = self.config[self.subcommand].get("ckpt_path")
        if start and self.trainer.global_step == int(load_weights(Path(start))["global_step"]):
            self.run_folder.give_back()
            raise GatesError(
                f"nothing was trained: {start} has {self.trainer.current_epoch} epochs and "
                f"{self.trainer.global_step} steps already; give a larger --trainer.max_epochs"
            )

    def _run(self) -> Run:
        return Run.of(self.run_folder, config_path=self.config_path, **self._run_options())

    def _run_options(self) -> dict[str, Any]:
        return {
            "settings": self.settings(),
            "package": self.package,
            "shipped": self.config[self.subcommand]["shipped"],
            "extended": [p.stem for p in chain(self.config_path)[1:]] if self.config_path else [],
            "command": self.command,
        }

    def _origin(self) -> dict[str, Any]:
        config = self.config_path.stem if self.config_path else "default"
        return {"package": self.package or "", "configuration": config, "command": self.command}

    def _described(self) -> tuple[Piece, Sequence[str]]:
        """Return what is trained, now that its data are there, and on which objects."""
        data, run = self.datamodule, self._run()
        digest = getattr(data, "digest", None)
        if digest is not None:
            run.settings["data.digest"] = [item.sha256 for item in digest()] or None
        objects: Sequence[str] = getattr(data, "training_objects", list)()
        return self.training(run), sorted({*objects, *self._seen_before()})

    def _seen_before(self) -> set[str]:
        """Return what the checkpoint was trained on that the training once started from."""
        if given := self.config[self.subcommand].get("ckpt_path"):
            return seen(load_weights(Path(given)))
        record = read_record(self.run_folder.training) if self.run_folder.resume else None
        return set(record.objects) if record and record.settings.get("start") else set()

    def _loggers(self, given: Any) -> list[Logger]:
        if given is False:
            return []
        path = self.run_folder.training
        log = ResumableCSVLogger(path)
        if given in (None, True):
            return [log, TensorBoardLogger(path, name="", version="tensorboard")]
        return [log, *(given if isinstance(given, list) else [given])]

    def _run_subcommand(self, subcommand: str) -> None:
        """Run a verb; a checkpoint of another network becomes one line.

        Raises:
            GatesError: The checkpoint that is started from is of another network.
        """
        given = self.config[subcommand].get("ckpt_path")
        last = self.run_folder.last_checkpoint if self.run_folder.resume else None
        start = given if given and given not in NAMED else last
        advice = "give the settings of the model that it is of, or another checkpoint"
        with starting_from(start, advice):
            super()._run_subcommand(subcommand)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "fit":
            kwargs["weights_only"] = True
            last = self.run_folder.last_checkpoint
            if self.run_folder.resume and last and not kwargs.get("ckpt_path"):
                kwargs["ckpt_path"] = str(last)
        return kwargs


def _with_names(given: Any) -> Any:
    """Return arguments of callbacks with devices, which some have by default, by their names."""
    if isinstance(given, Namespace):
        return Namespace(**{name: _with_names(value) for name, value in vars(given).items()})
    if isinstance(given, list):
        return [_with_names(value) for value in given]
    return str(given) if isinstance(given, torch.device) else given
