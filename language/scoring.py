"""Bits per byte of held-out documents, of a decoder and of rivals that need no training."""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from mmap import mmap
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from core_gates.errors import GatesError, check_at_least
from core_gates.numerics import accumulation_dtype
from language.corpus import Document
from language.counts import ByteCounts
from language.decoder import Decoder
from language.tokenizer import Tokenizer, faithful_tokens

PPMD_ORDER = 64  # the largest of the library, and the best for the validation documents
UNSCORED = -100


class _Window(NamedTuple):
    """Tokens (T + 1,) of a window, of which T are read and T are predicted, and its document."""

    document: int
    tokens: np.ndarray


def scored_part(
    tokenizer: Tokenizer, documents: Sequence[Document], context: int
) -> tuple[list[Document], np.ndarray]:
    """Return which documents are scored, and the first byte of each that is; all after it are, too.

    Those of no more than half a context are left out.

    Args:
        tokenizer: That of the decoder.
        documents: Held-out documents.
        context: Tokens of a window.

    Returns:
        N documents, and numbers of bytes (N,).

    Raises:
        GatesError: No document is left, or the tokenizer loses text of one.
    """
    half, scored, starts = context // 2, list[Document](), list[int]()
    for document in documents:
        sizes = tokenizer.byte_counts(document.text)
        if len(sizes) > half:
            faithful_tokens(tokenizer, document.name, document.text)
            scored.append(document)
            starts.append(sizes[:half].sum())
    if not scored:
        raise GatesError(
            f"none of {len(documents)} documents has more than {half} tokens, half of the context,"
            " so that nothing is scored; use longer documents or a smaller context"
        )
    return scored, np.array(starts)


def bits_per_byte(
    model: Decoder,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    *,
    context: int | None = None,
    batch_size: int = 16,
) -> np.ndarray:
    """Return how many bits a decoder needs for the scored bytes of documents.

    Windows overlap by half of the context, and the second half of each is scored: every token but
    those of the first half window is scored once, knowing half a context at least. A document
    begins after the end token, as in training. The bits per byte of all documents, with an interval
    over documents, are::

        documents, starts = scored_part(tokenizer, documents, model.context)
        found = bits_per_byte(model, tokenizer, documents)
        draws = Resamples.clusters([document.name for document in documents])
        draws.intervals(moments(found, ratio, name="bits per byte"))

    The model is in evaluation mode afterwards.

    Args:
        model: The decoder.
        tokenizer: The one that it was trained with.
        documents: Held-out documents, each longer than half a context.
        context: Tokens of a window; those of the model by default.
        batch_size: Windows computed at once.

    Returns:
        Bits and bytes (N, 2) of each document.

    Raises:
        GatesError: The tokenizer has tokens that the model lacks, a document is too short, or bits
            are not finite.
        ValueError: The context or the batch is below 1.
    """
    context = model.context if context is None else context
    check_at_least(1, context=context, batch_size=batch_size)
    if tokenizer.vocab_size > model.vocab_size:
        raise GatesError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.vocab_size};"
            " use the tokenizer that it was trained with"
        )
    half = context // 2
    sizes = [_scored_bytes(tokenizer, document, half) for document in documents]
    model.eval()
    bits = np.zeros(len(documents))
    every = _windows(tokenizer, documents, context)
    while windows := [*islice(every, batch_size)]:
        costs = _nats(model, [window.tokens for window in windows], half) / np.log(2)
        np.add.at(bits, [window.document for window in windows], costs)
    for document, value in zip(documents, bits, strict=True):
        if not np.isfinite(value):
            raise GatesError(
                f"the model needs {value} bits for {document.name}, expected a finite number: its"
                " weights are not those of a successful training run; use another checkpoint"
            )
    return np.stack([bits, sizes], 1)


def _scored_bytes(tokenizer: Tokenizer, document: Document, half: int) -> int:
    """Return the bytes of a document after the first half window.

    Raises:
        GatesError: There is none.
    """
    counts = tokenizer.byte_counts(document.text)
    if len(counts) <= half:
        raise GatesError(
            f"{document.name} has {len(counts)} tokens, expected more than {half}, half of the"
            " context, so that something is scored; leave it out, or use a smaller context"
        )
    return int(counts[half:].sum())


def _windows(
    tokenizer: Tokenizer, documents: Iterable[Document], context: int
) -> Iterator[_Window]:
    half = context // 2
    for number, document in enumerate(documents):
        tokens = np.concatenate([[tokenizer.end], tokenizer.encode(document.text)])
        for start in range(0, len(tokens) - 1 - half, context - half):
            yield _Window(number, tokens[start : start + context + 1])


def _nats(model: Decoder, windows: Sequence[np.ndarray], half: int) -> np.ndarray:
    """Return the cross-entropy of each window, summed over its tokens after the first half."""
    device = next(model.parameters()).device
    lengths = np.array([len(window) - 1 for window in windows])
    tokens = np.zeros((len(windows), lengths.max() + 1), np.int64)
    for row, window in zip(tokens, windows, strict=True):
        row[: len(window)] = window
    padding = np.arange(lengths.max()) >= lengths[:, None]
    targets = np.where(padding, UNSCORED, tokens[:, 1:])[:, half:]
    mask = torch.from_numpy(padding).to(device) if padding.any() else None
    with torch.inference_mode():
        logits = model(torch.from_numpy(tokens[:, :-1]).to(device), padding_mask=mask)[:, half:]
        nats = F.cross_entropy(
            logits.transpose(1, 2).to(accumulation_dtype(logits)),
            torch.from_numpy(targets).to(device),
            ignore_index=UNSCORED,
            reduction="none",
        )
        return nats.cpu().double().sum(1).numpy()


def count_bits(
    counts: ByteCounts, documents: Iterable[Document], starts: Iterable[int]
) -> np.ndarray:
    """Return how many bits counts need for the same bytes, knowing all of a document before them.

    Args:
        counts: Counts of the training documents.
        documents: Held-out documents.
        starts: First scored byte of each, from `scored_part`.

    Returns:
        Bits and bytes (order + 1, N, 2), for contexts of up to 0, 1, ... bytes.
    """
    counted = []
    for document, start in zip(documents, starts, strict=True):
        bits = counts.bits(document.text)[:, start:]
        counted.append(np.stack([bits.sum(1), np.full(len(bits), bits.shape[1])], 1))
    return np.stack(counted, 1)


def ppmd_bits(
    training: Iterable[Document], documents: Sequence[Document], starts: Iterable[int]
) -> np.ndarray:
    """Return PPMd's bits and the bytes (N, 2) of each document after its start.

    PPMd (Shkarin, 2002; variant H) predicts by contexts of up to 64 bytes, counted while it codes.
    It has coded the training documents before, and each document starts from there: in a fork of
    this process, which is the only way to copy its state. It begins again where its memory is full,
    after some 15 MB of text. Bits are those of whole bytes.

    Args:
        training: Training documents.
        documents: Held-out documents.
        starts: First scored byte of each, from `scored_part`.

    Returns:
        Bits and bytes (N, 2).

    Raises:
        GatesError: A fork was killed.
        MissingExtraError: The package ``pyppmd`` is not installed.
    """
    from pyppmd import Ppmd7Encoder

    coder = Ppmd7Encoder(PPMD_ORDER, 2**30)  # bytes, of which 8 MB of text take half
    coder.encode("".join(document.text for document in training).encode())
    shared = np.frombuffer(mmap(-1, 16 * len(documents))).reshape(-1, 2)
    for document, start, row in zip(documents, starts, shared, strict=True):
        data = document.text.encode()
        if (child := os.fork()) == 0:
            try:
                coder.encode(data[:start])
                row[:] = 8 * len(coder.encode(data[start:])), len(data) - start
            finally:
                os._exit(0)
        if os.waitpid(child, 0)[1] or not row[1]:
            raise GatesError(
                f"PPMd was killed while it coded {document.name}: it needs up to 2 GiB of memory, "
                "end other programs first"
            )
    return shared.copy()


def ratio(means: np.ndarray) -> np.ndarray:
    """Return the ratio (...,) of two means (..., 2): bits per byte, as a transform of moments."""
    return means[..., 0] / means[..., 1]
