"""The verbs of ``gates language`` that read a corpus: prepare, fit, evaluate, report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser

from apps.language.byte_scores import DECODER, PLACES, WEIGHTS, ModelFolder, Study, module_of
from apps.language.gate_study import GateStudy
from apps.main import APPS
from core_gates.errors import GatesError
from harness.command import GatesRunCLI, GatesRunTrainer
from harness.command.parser import constructing
from harness.experiment import Piece, Run, read_scores
from harness.report.page import Page
from harness.runs.callbacks import load_weights
from harness.runs.terminal import working
from language.corpus import SPLITS, read_corpus
from language.data import LanguageDataModule
from language.module import LanguageModule
from language.tokenizer import load_tokenizer


class LanguageTrainer(GatesRunTrainer):
    """The verbs of ``gates language``; ``fit`` is Lightning's own."""

    def prepare(self, model: LanguageModule, datamodule: LanguageDataModule) -> None:
        """Read the corpus, turn it into tokens, and write a memory map for each of its parts.

        Args:
            model: Filled in by the command line.
            datamodule: Filled in by the command line.
        """
        del model
        if datamodule.cache_folder is None:
            raise GatesError(
                "data.cache_folder is null, where memory maps would be kept: give "
                "--data.cache_folder FOLDER"
            )
        with working("preparing the corpus"):
            corpus = read_corpus(datamodule.corpus)
            datamodule.prepare_data()
            shards = datamodule.shards
        print(f"{'':10}{'documents':>12}{'bytes':>14}{'tokens':>14}")
        for split in SPLITS:
            part = shards.part(split)
            print(f"{split:10}{len(part.documents):12,}{part.bytes:14,}{part.tokens:14,}")
        skipped = {"duplicates": corpus.duplicates, **corpus.skipped}
        print(f"left out: {', '.join(f'{number:,} {kind}' for kind, number in skipped.items())}")
        print(f"sha256 {shards.digest}")
        print(shards.folder)

    def evaluate(
        self,
        model: LanguageModule,
        datamodule: LanguageDataModule,
        seeds: tuple[int, ...] = (0,),
        most_bits: float | None = None,
        train: bool = False,
        gates: tuple[str, ...] = (),
        study: Literal["bytes", "blocks", "adapters", "offload", "scbench"] = "bytes",
    ) -> None:
        """Run the study that the configuration names; these are the options of ``bytes``.

        It scores counts of bytes, PPMd and the decoder in bits per byte of held-out documents.
        With ``gates``, decoders are compared that differ in the gate of their attention alone.

        Args:
            model: Filled in by the command line.
            datamodule: Filled in by the command line.
            seeds: Seeds of the decoder.
            most_bits: The most bits per byte that the decoder may need; no bar if null.
            train: Train the decoder where it is missing, as ``fit`` does, instead of naming the
                command.
            gates: Gates of attention that are compared with the first, which is ``none`` or a place
                from G1 to G5, and ``elementwise`` or ``headwise``; none if empty.
            study: ``bytes``, this one; ``blocks`` of attention that gates choose (configuration
                ``seer_smollm2``); ``adapters`` (``sora``); ``offload`` of experts to a disk
                (``offload``); or ``scbench``, policies of the KV cache (``scbench``).
                ``--study NAME --help`` lists the options of each.
        """
        del model, study
        if not seeds or min(seeds) < 0:
            raise GatesError(f"--seeds is {list(seeds)}, expected one or more from 0")
        datamodule.prepare_data()
        datamodule.setup("test")
        run = self.run(seeds=seeds)
        if gates:
            GateStudy(run, datamodule, seeds, gates).finish(train=train)
        else:
            Study(run, datamodule, seeds).finish(most_bits, train=train)

    def add_to_report(
        self, page: Page, model: LanguageModule, datamodule: LanguageDataModule
    ) -> None:
        """Add the documents of which the decoder knows more, and less, than counts.

        Args:
            page: The report.
            model: Filled in by the command line.
            datamodule: Filled in by the command line.
        """
        del model
        run = self.run()
        datamodule.prepare_data()
        datamodule.setup("test")
        seeds = read_scores(run.scores, "language").seeds
        Study(run, datamodule, seeds).add_documents(page)

    def report_options(self) -> dict[str, Any]:
        """Return the options of a report that name the units its intervals are drawn from."""
        return {"units": "documents"}


class SkippedFiles(Callback):
    """Print how many files of a corpus are no text, where ``fit`` has packed it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print a line once the data are ready."""
        del pl_module, stage
        number = getattr(trainer, "datamodule").skipped.get("binary", 0)  # noqa: B009
        if number and trainer.is_global_zero:
            print(f"left out, as they are not text in UTF-8: {number:,} files")


class LanguageCLI(GatesRunCLI):
    """The command line of ``gates language``."""

    app = "language"
    verbs = ("prepare", "fit", "evaluate", "report")
    other_verbs = tuple(sorted(APPS["language"].verbs.keys() - set(verbs)))
    package = "language"
    neutral = (
        *(f"data.{name}" for name in PLACES),
        "model.model.init_args.checkpointing",
    )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let the order of the data follow the seed."""
        super().add_arguments_to_parser(parser)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def after_instantiate_classes(self) -> None:
        """Refuse a model without an embedding for every token, or that cannot be built again.

        Raises:
            GatesError: The tokenizer has more tokens than the model, or a constructor fails.
        """
        tokens = load_tokenizer(self.datamodule.tokenizer).vocab_size
        vocab_size = self.model.model.vocab_size
        if tokens > vocab_size:
            raise GatesError(
                f"vocab_size is {vocab_size}, but the tokenizer has {tokens} tokens: set "
                f"model.model.init_args.vocab_size to {tokens} or more"
            )
        if self.subcommand in self.trains:
            with constructing(), torch.random.fork_rng(devices=[]):
                module_of(self.settings())  # as `keep` does when the model is trained
        super().after_instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Let the Trainer print what of the corpus is left out."""
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.append(SkippedFiles())  # type: ignore[attr-defined]
        return trainer

    def training(self, run: Run) -> Piece:
        """Return the piece that ``fit`` makes, as ``evaluate`` names it."""
        return run.piece(DECODER, run.settings["seed"])

    def keep(self, run: Run, piece: Piece, objects: Sequence[str], path: Path) -> Path:
        """Keep the network as a folder that transformers opens, if it is of a family of theirs.

        Args:
            run: The run.
            piece: What was trained.
            objects: Short hashes of what it was trained on.
            path: Its checkpoint.
        """
        module = module_of(piece.settings)
        module.load_state_dict(load_weights(path)["state_dict"])
        trained = module.model, self.datamodule.shards.tokenizer
        return run.store(WEIGHTS, ModelFolder()).keep(piece, trained, objects=objects)


def run_training_verb(arguments: Sequence[str]) -> None:
    """Run one of these verbs, or refuse another."""
    defaults: dict[str, Any] = {"enable_model_summary": False}
    LanguageCLI(
        LanguageModule, LanguageDataModule, LanguageTrainer, arguments, trainer_defaults=defaults
    )
