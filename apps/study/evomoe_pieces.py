"""What ``gates study evomoe`` trains, tries and scores: decoders of bytes with equal FLOPs."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from core_gates import GateMonitor
from core_gates.moe.layer import MoELayer
from core_gates.routing.collect import collect_routing
from harness.experiment import Job, Piece, Store
from harness.runs.callbacks import load_weights
from language.corpus import Document, Split
from language.counts import ByteCounts
from language.data import LanguageDataModule
from language.decoder import Decoder
from language.scoring import bits_per_byte, count_bits, scored_part
from studies.evomoe.budget_training import COLUMNS, SECONDS, BudgetModule
from studies.evomoe.methods import METHODS, VOCAB, Sizes, decoder_of, plan_of
from studies.evomoe.spawning import APPENDED, leak

BITS, LEAK = "bits", "leak"
COUNTS = {"order 1": 1, "order 5": 5}
LETTERS = 2000  # of a test document that are scored
WINDOWS = 32  # that losses on the way, routings and leaks are measured on
CLIP = 1.0
KINDS = ("letters", "digits", "spaces", "line ends", "ASCII marks", "others")


class Texts(NamedTuple):
    """Where documents are, which decides nothing but by their content.

    Attributes:
        corpus: Files, folders, or ``python``.
        cache: Folder of their shards.
    """

    corpus: tuple[str, ...]
    cache: str

    def read(self, settings: Mapping[str, Any], seed: int = 0) -> LanguageDataModule:
        """Return windows of the sizes of a piece, in the order of a seed."""
        data = LanguageDataModule(
            self.corpus, "bytes", settings["context"], settings["batch"], self.cache, seed
        )
        data.prepare_data()
        data.setup("fit")
        return data


def sizes_of(settings: Mapping[str, Any]) -> Sizes:
    """Return the sizes that the settings of a piece name."""
    sizes = {field.name: settings[field.name] for field in fields(Sizes)}
    return Sizes(**{**sizes, "temperatures": tuple(sizes["temperatures"])})


def windows(data: LanguageDataModule, split: Split, length: int, count: int = WINDOWS) -> Tensor:
    """Return windows (N, length) of a split, evenly spread."""
    tokens = data.shards.tokens(split)
    starts = np.linspace(0, len(tokens) - length, count).astype(np.int64)
    return torch.from_numpy(tokens[starts[:, None] + np.arange(length)].astype(np.int64))


def trained(piece: Piece, job: Job, texts: Texts) -> BudgetModule:
    """Train one decoder until its budget is spent."""
    sizes = sizes_of(piece.settings)
    data = texts.read(piece.settings, piece.seed or 0)
    tokens = np.asarray(data.shards.tokens("train"))
    L.seed_everything(piece.seed, verbose=False)
    model = decoder_of(piece.method, sizes, np.bincount(tokens, minlength=VOCAB).tolist())
    held_out = windows(data, "validation", sizes.context + 1)
    module = BudgetModule(
        model, METHODS[piece.method], piece["learning_rate"], plan_of(sizes).budget, held_out,
        piece.seed or 0,
    )  # fmt: skip
    job.fit(module, data, ticks="steps", max_epochs=-1, limit_val_batches=0, gradient_clip_val=CLIP)
    assert job.last is not None
    seconds = load_weights(job.last)[SECONDS][1:]  # also of a training killed after its last step
    job.note(objects=data.training_objects(), cpu={"seconds": seconds})
    return module


def train(piece: Piece, job: Job, texts: Texts) -> dict[str, Tensor]:
    """Train one decoder; weights, FLOPs and curve are the result."""
    return dict(trained(piece, job, texts).state_dict())


def trial(piece: Piece, job: Job, texts: Texts) -> dict[str, float]:
    """Return the held-out bits at the end of a training."""
    return {"score": float(trained(piece, job, texts).curve[-1, COLUMNS.index("held-out bits")])}


def decoder_from(piece: Piece, state: Mapping[str, Tensor]) -> Decoder:
    """Return a trained decoder in evaluation."""
    model = decoder_of(piece.method, sizes_of(piece.settings))
    weights = {n.removeprefix("model."): w for n, w in state.items() if n.startswith("model.")}
    model.load_state_dict(weights)
    return model.eval()


def beginnings(data: LanguageDataModule) -> tuple[list[Document], np.ndarray]:
    """Return the beginnings of test documents, and the first byte of each that is scored."""
    shown = [Document(document.name, document.text[:LETTERS]) for document in data.held_out("test")]
    return scored_part(data.shards.tokenizer, shown, data.context)


def score(
    piece: Piece, job: Job, texts: Texts, networks: Store[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Return bits and bytes (N, 2) of test documents, and what appended tokens change."""
    del job
    data = texts.read(piece.settings)
    state = networks.load(piece, tested=data.shards.part("test").objects)
    model = decoder_from(piece, state)
    bits = bits_per_byte(model, data.shards.tokenizer, beginnings(data)[0])
    appended = windows(data, "test", data.context + APPENDED, 8)
    return {BITS: torch.from_numpy(bits), LEAK: torch.tensor(leak(model, appended))}


def count(piece: Piece, job: Job, texts: Texts) -> dict[str, Tensor]:
    """Return the same bits and bytes (N, 2) of counts of bytes after one or more."""
    del job
    data = texts.read(piece.settings)
    counts = ByteCounts.fit(data.held_out("train"), order=COUNTS[piece.method])
    return {BITS: torch.from_numpy(count_bits(counts, *beginnings(data))[counts.order])}


class Routed(NamedTuple):
    """What the gates of a decoder do with windows of the test.

    Attributes:
        active: Experts of a token.
        load_cv: Of the experts.
        kinds: Tokens of each kind that each expert of the first such layer computes (E, 6).
    """

    active: float
    load_cv: float
    kinds: np.ndarray


def layers_of(model: Decoder) -> list[MoELayer]:
    """Return the layers with experts."""
    return [block.mlp for block in model.blocks if isinstance(block.mlp, MoELayer)]


@torch.no_grad()
def routed(model: Decoder, tokens: Tensor) -> Routed:
    """Summarize the routing of tokens (N, T): active experts, balance, what each expert reads."""
    layers = layers_of(model)
    with GateMonitor(nn.ModuleList(layers)) as monitor, collect_routing(layers[0]) as routings:
        model(tokens)
    figures = list(monitor.compute().values())
    used = next(iter(routings.values()))[0].chosen(dropped=False).flatten(0, 1)
    kinds = nn.functional.one_hot(KIND_OF[tokens.flatten()], len(KINDS)).to(used)
    active, load_cv = (
        float(np.mean([figures_of_gate[n] for figures_of_gate in figures]))
        for n in ("active", "load_cv")
    )
    return Routed(active, load_cv, (used.T @ kinds).numpy())


def _kind(token: int) -> int:
    """Return the kind of a byte, or of the end of a document."""
    letter = chr(token)
    tests = (letter.isalpha(), letter.isdigit(), letter in " \t", letter in "\r\n", token > 32)
    return next((i for i, fits in enumerate(tests) if fits and token < 127), len(KINDS) - 1)


KIND_OF = torch.tensor([_kind(token) for token in range(VOCAB)])
