"""Bits per byte of held-out documents, of counts, PPMd and decoders: scored and compared."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor, nn

from core_gates.errors import GatesError
from core_gates.moe.layer import MoELayer
from core_gates.monitor.hooks import GateMonitor
from harness.command.configfile import packaged_configs
from harness.evidence import Bar, Resamples, Row, compare, moments
from harness.experiment import Arrays, Job, Piece, Run, Store
from harness.files import write_text
from harness.files.piece import Setting
from harness.report.page import Page
from language.adaptive_counts import ADDED, AdaptiveCounts
from language.corpus import Document, Split
from language.counts import LARGEST_ORDER, ORDER, ByteCounts
from language.data import LanguageDataModule
from language.decoder import Decoder
from language.hf.model_folder import read_model, write_model
from language.module import LanguageModule
from language.scoring import (
    PPMD_ORDER,
    bits_per_byte,
    count_bits,
    ppmd_bits,
    ratio,
    scored_part,
)
from language.tokenizer import Tokenizer

DECODER, COUNTS, ADAPTIVE, PPMD = "decoder", "counts", "adaptive_counts", "PPMd"
ORDERS = tuple(f"order {order}" for order in range(ORDER + 1))
REFERENCE = ORDERS[-1]
SAME_WINDOW, WHOLE_FILE = "adaptive counts, same window", "adaptive counts, whole file"
TOLD_MORE = (WHOLE_FILE, PPMD)
SEQBOAT = "seqboat"
WEIGHTS, BASELINES, SCORES = "weights", "baselines", "scores"
TASK: Split = "test"
METRIC = "bits per byte"
SHOWN = 5  # documents at either end of the table of the report
KEPT = ("--root", "--data.", "--model.", "--trainer.")  # options that a training takes over
PLACES = ("corpus", "tokenizer", "cache_folder")
"""Options of the data that decide by content alone, which the digest of the data covers."""

NOTE = (
    "All are scored on the same bytes: of every document that is longer, those after the first "
    "half context. Counts of order 5 know the 5 bytes before; adaptive counts, same window, those "
    "before in the window, as the decoder does; adaptive counts, whole file, and PPMd all of the "
    "document before. All have read the training documents first."
)
WEIGHED = (
    "{count} documents of unequal sizes n count as {effective:.1f} of equal size, "
    "(sum n)^2 / sum n^2."
)
MEANS = "Each document weighed the same, the means are {}."

CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
# A small decoder, trained by Gatesuite

{weights:,} weights in {blocks} blocks of {dim} features, {kinds}; {context} tokens of context,
{tokens} in the vocabulary. `AutoModelForCausalLM.from_pretrained` opens this folder, as does

    gates language generate --weights FOLDER --prompt TEXT

`record.json` next to it holds the command that trains it again, all settings, and the hash of each
training document. It continues text that is like these documents. It follows no instructions, what
it writes may be wrong or stand in a training document word for word, and it has been checked for
nothing but bits per byte.
"""

Places = Mapping[str, Any]
"""Values of these options, by name."""


class ModelFolder:
    """A decoder as a folder that transformers opens; its tensors alone if it is of no family."""

    def save(self, folder: Path, result: Any) -> None:
        """Write a decoder and its tokenizer."""
        try:
            write_model(folder, *result)
            write_text(folder / "README.md", card(*result))
        except GatesError as error:
            print(f"only tensors are kept: {error}")
            Arrays().save(folder, result[0].state_dict())

    def load(self, folder: Path) -> Any:
        """Return the state of the decoder, tensors by name.

        Raises:
            GatesError: The folder is damaged.
        """
        if (folder / Arrays.FILE).is_file():
            return Arrays().load(folder)
        return read_model(folder)[0].state_dict()


def card(model: Decoder, tokenizer: Tokenizer) -> str:
    """Return the model card of a decoder, in Markdown."""
    mixtures = sum(isinstance(block.mlp, MoELayer) for block in model.blocks)
    return CARD.format(
        weights=sum(weight.numel() for weight in model.parameters()),
        blocks=len(model.blocks),
        dim=model.dim,
        kinds=f"{mixtures} with experts" if mixtures else "all dense",
        context=model.context,
        tokens=f"{tokenizer.vocab_size:,} tokens",
    )


def module_of(settings: Mapping[str, Any]) -> LanguageModule:
    """Return the module that settings describe, with weights drawn now.

    Args:
        settings: With names that begin by ``model.``.
    """
    nested = Namespace()
    for name in settings:
        if name.startswith("model."):
            nested[name] = settings[name]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(LanguageModule, "model", fail_untyped=False)  # as the command line
    instances = parser.instantiate_classes(parser.parse_object(nested.as_dict()))
    module: LanguageModule = instances.model
    return module


def data_of(settings: Mapping[str, Any], places: Places) -> LanguageDataModule:
    """Return the data that settings describe, read.

    Args:
        settings: With names that begin by ``data.``, and the seed of the order.
        places: Where the corpus and the tokenizer are.
    """
    data_settings = {
        name.removeprefix("data."): value
        for name, value in settings.items()
        if name.startswith("data.") and name != "data.digest"
    }
    data = LanguageDataModule(**data_settings, **places, seed=settings.get("seed") or 0)
    data.prepare_data()
    data.setup("fit")
    return data


def train_decoder(piece: Piece, job: Job, places: Places) -> tuple[Decoder, Tokenizer]:
    """Train one decoder as ``fit`` does."""
    L.seed_everything(piece.seed, verbose=False)
    data, module = data_of(piece.settings, places), module_of(piece.settings)
    trainer_settings = {
        n.removeprefix("trainer."): v for n, v in piece.settings.items() if n.startswith("trainer.")
    } | {name: piece.get(f"checkpoint.{name}") for name in ("monitor", "mode")}
    job.note(objects=data.training_objects())
    job.fit(module, data, ticks="steps", **trainer_settings)
    return module.model, data.shards.tokenizer


def scored(data: LanguageDataModule) -> tuple[list[Document], np.ndarray]:
    """Return the documents that all methods are scored on, and the first scored byte of each."""
    return scored_part(data.shards.tokenizer, data.held_out(TASK), data.context)


def score_rival(piece: Piece, job: Job, places: Places) -> dict[str, Tensor]:
    """Return bits and bytes (N, 2) of every scored document, of rivals by name."""
    del job
    data = data_of(piece.settings, places)
    documents, starts = scored(data)
    if piece.method == PPMD:
        return {PPMD: torch.from_numpy(ppmd_bits(data.held_out("train"), documents, starts))}
    order = LARGEST_ORDER if piece.method == ADAPTIVE else ORDER
    counts = ByteCounts.fit(data.held_out("train"), order)
    if piece.method == COUNTS:
        bits = count_bits(counts, documents, starts)
        return dict(zip(ORDERS, torch.from_numpy(bits), strict=True))
    bits_of, others = {}, data.held_out("validation")
    for name in (SAME_WINDOW, WHOLE_FILE):
        rival = AdaptiveCounts(
            counts, data.shards.tokenizer, data.context, whole=name == WHOLE_FILE
        )
        bits_of[name] = torch.from_numpy(rival.fit(others).bits(documents))
    return bits_of


def score_decoder(
    piece: Piece, job: Job, places: Places, weights: Store[Any], folder: Path
) -> dict[str, Tensor]:
    """Return bits and bytes (N, 2) of every scored document, of a trained decoder.

    What its gates of experts do meanwhile is kept in the folder of the run.
    """
    from harness.report.sections import save_gates  # matplotlib takes a second

    data = data_of(piece.settings, places)
    model = module_of(piece.settings).model
    model.load_state_dict(weights.load(piece, tested=data.shards.part(TASK).objects))
    tokenizer = data.shards.tokenizer
    layers = {f"block {n}": block.mlp for n, block in enumerate(model.blocks, 1)}
    mixtures = {name: mlp for name, mlp in layers.items() if isinstance(mlp, MoELayer)}
    bits = []
    with GateMonitor(nn.ModuleDict(mixtures)) as monitor:
        for document in scored(data)[0]:
            bits.append(bits_per_byte(model, tokenizer, [document], context=data.context))
            job.tick()
    if mixtures:
        save_gates(monitor, folder)
    return {DECODER: torch.from_numpy(np.concatenate(bits))}


def rival_pieces(digest: Setting, context: int) -> list[Piece]:
    """Return the rivals that no gradient trains, of a corpus and the windows of a decoder."""
    of_method: dict[str, Setting] = {
        COUNTS: {},
        ADAPTIVE: {"order": LARGEST_ORDER, "added": ADDED},
        PPMD: {"order": PPMD_ORDER},
    }
    return [
        Piece(method, settings={"data.digest": digest, "data.context": context, **own})
        for method, own in of_method.items()
        if method != PPMD or find_spec("pyppmd")
    ]


def bits_of(run: Run, rivals: Sequence[Piece], trained: Sequence[Piece]) -> dict[str, list[Any]]:
    """Return bits and bytes (N, 2) of what has been scored, by method, an array per seed."""
    found: dict[str, list[Any]] = {}
    for kind, pieces in ((BASELINES, rivals), (SCORES, trained)):
        store = run.store(kind, Arrays())
        for piece in pieces:
            if store.find(piece) is not None:
                for method, bits in store.load(piece).items():
                    found.setdefault(method, []).append(bits.numpy())
    methods = (*ORDERS, SAME_WINDOW, WHOLE_FILE, PPMD, DECODER, SEQBOAT)  # files sort by name
    return {method: found[method] for method in methods if method in found}


class Study:
    """Counts, PPMd and the decoder of a configuration, scored on its held-out documents.

    Args:
        run: Keeps what is trained and scored; its settings get the digest of the data.
        data: The corpus, read.
        seeds: Of the decoder.
    """

    def __init__(self, run: Run, data: LanguageDataModule, seeds: Sequence[int]) -> None:
        run.settings["data.digest"] = [file.sha256 for file in data.digest()] or None
        self.run, self.data, self.seeds = run, data, seeds
        self.places = {name: getattr(data, name) for name in PLACES}
        self.weights = run.store(WEIGHTS, ModelFolder())
        self.rivals = rival_pieces(run.settings["data.digest"], data.context)
        self.decoders = [
            Piece(DECODER, seed, settings={**run.settings, "seed": seed}) for seed in seeds
        ]

    def finish(self, most_bits: float | None, *, train: bool) -> Path:
        """Make what is missing, compare, and write ``scores.json``.

        Args:
            most_bits: The most bits per byte of the decoder; None for no bar.
            train: Whether missing decoders are trained.
        """
        run, documents = self.run, scored(self.data)[0]
        for piece in self.rivals:
            run.obtain(run.store(BASELINES, Arrays()), [piece], self._work(score_rival))
        steps = max(1, run.settings.get("trainer.max_steps") or 0)
        trained = run.obtain(
            self.weights, self.decoders, self._work(train_decoder), ticks=steps, unit="steps",
            leave_out=not train,
        )  # fmt: skip
        scoring = self._work(score_decoder, weights=self.weights, folder=run.folder)
        run.obtain(run.store(SCORES, Arrays()), trained, scoring, ticks=len(documents))
        bits = self.found()
        scores = {
            method: [moments(seed_bits, ratio, name=METRIC) for seed_bits in bits_of_seeds]
            for method, bits_of_seeds in bits.items()
        }
        draws = Resamples.clusters([document.name for document in documents])
        versus = DECODER if DECODER in scores else REFERENCE
        rows = compare(scores, draws, task=TASK, reference=versus)
        rows += [
            Row(method, TASK, METRIC, math.nan, note="not measured: pip install pyppmd")
            for method in {PPMD} - scores.keys()
        ]
        missing = [piece for piece in self.decoders if piece not in trained]
        notes = [NOTE, *weighed(bits)]
        if missing:
            lacking = f"not trained: run `{self.command(missing[0])}`"
            seeds = [", ".join(str(piece.seed) for piece in some) for some in (missing, trained)]
            if trained:
                notes.append(f"seed {seeds[0]} is {lacking}; scores are of seed {seeds[1]} alone")
            else:
                rows.append(Row(DECODER, TASK, METRIC, math.nan, note=lacking))
        decoder_bits = next(
            (r.value for r in rows if r.method == DECODER and not r.versus), math.nan
        )
        bars = []
        if most_bits is not None:
            what = f"seed {seeds[0]}" if missing and trained else f"the {DECODER}"
            why = f"not measured: {what} is not trained" if missing else ""
            value = math.nan if missing else decoder_bits
            bars = [Bar(f"bits per byte of the {DECODER}", value, "<=", most_bits, note=why)]
        return run.finish(
            rows, bars, seeds=self.seeds, data=self.data.digest(), headline=headline(rows),
            notes=notes,
        )  # fmt: skip

    def found(self) -> dict[str, list[np.ndarray]]:
        """Return bits and bytes (N, 2) of what has been scored, by method, an array per seed."""
        return bits_of(self.run, self.rivals, self.decoders)

    def command(self, piece: Piece) -> str:
        """Return the command that trains a decoder as ``evaluate`` looks for it."""
        run = self.run
        config = run.config if run.config in packaged_configs("language") else run.config_path
        alone = len(self.seeds) == 1  # a run folder holds one training run of fit
        words = [f"gates language {'fit' if alone else 'evaluate'}"]
        words += [f"--config {config}"] * (run.config_path is not None)
        words += [f"--name {run.folder.name}"] * (run.folder.name != run.config)
        given = iter(shlex.split(run.command))
        for word in given:
            if word.startswith(KEPT):
                words.append(shlex.join([word] if "=" in word else [word, next(given, "")]))
        if not alone:
            return " ".join([*words, f"--train --seeds {','.join(map(str, self.seeds))}"])
        words += [f"--seed_everything {piece.seed}"] * (piece.seed != run.settings.get("seed"))
        return " ".join(words)

    def add_documents(self, page: Page) -> None:
        """Add the documents of which the decoder knows more, and less, than counts of order 5."""
        bits_of = self.found()
        if not {DECODER, REFERENCE} <= bits_of.keys():
            return
        decoder_counts, counts = (bits_of[m][0] for m in (DECODER, REFERENCE))
        names = scored(self.data)[0]
        rows = [
            [shown_name(document), int(size), bits / size, rival / size, (bits - rival) / size]
            for document, (bits, size), (rival, _) in zip(
                names, decoder_counts, counts, strict=True
            )
        ]
        rows.sort(key=lambda row: row[-1])
        shown = rows if len(rows) <= 2 * SHOWN else [*rows[:SHOWN], *rows[-SHOWN:]]
        page.section("Documents").table(
            ["document", "bytes", f"bits per byte, {DECODER}", REFERENCE, "difference"],
            shown,
            f"Where the {DECODER} gains most and least over {REFERENCE}, of {len(rows)} documents",
        )

    def _work(self, work: Any, **further: Any) -> Any:
        return partial(work, places=self.places, **further)


def weighed(found: Mapping[str, Sequence[np.ndarray]]) -> list[str]:
    """Return how many documents of equal size those scored count as, and means over documents.

    Args:
        found: Bits and bytes (N, 2), by method, an array per seed.
    """
    sizes = found[REFERENCE][0][:, 1]
    effective = sizes.sum() ** 2 / (sizes**2).sum()
    means = {
        m: np.mean([seed_bits[:, 0] / seed_bits[:, 1] for seed_bits in bits])
        for m, bits in found.items()
    }
    listed = "; ".join(f"{m} {mean:.3f}" for m, mean in means.items() if m not in ORDERS[:-1])
    return [WEIGHED.format(count=len(sizes), effective=effective), MEANS.format(listed)]


def shown_name(document: Document) -> str:
    """Return the name of a document, bytes of a path that are no UTF-8 as escapes."""
    return os.fsencode(document.name).decode(errors="backslashreplace")


def headline(rows: Collection[Row]) -> str:
    """Return a sentence on the decoder's score and the rivals that it does not beat.

    One is beaten where the whole interval of its difference from the decoder lies above 0.

    Args:
        rows: Of all methods, and the differences from the decoder.
    """
    decoder_bits = next((r.value for r in rows if r.method == DECODER and not r.versus), math.nan)
    if math.isnan(decoder_bits):
        return f"The {DECODER} is not trained."
    unbeaten = [
        f"{row.method} (told more)" if row.method in TOLD_MORE else row.method
        for row in rows
        if row.versus == DECODER and not row.low > 0
    ]
    said = (
        f"does not beat {' and '.join(unbeaten)}"
        if unbeaten
        else "beats all counts" + f" and {PPMD}" * any(r.method == PPMD and r.versus for r in rows)
    )
    return f"The {DECODER} needs {decoder_bits:.2f} bits per byte and {said}."
