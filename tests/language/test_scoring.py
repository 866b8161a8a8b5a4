"""Bits per byte: each scored byte once, closed forms, PPMd on the same bytes."""

import os
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyppmd
import pytest
import torch
from torch import nn

from core_gates.errors import GatesError
from language.decoder import Decoder
from language.scoring import bits_per_byte, ppmd_bits, scored_part
from language.tokenizer import ByteTokenizer

TEXTS = ["nine byte", "one byte more than some", "naïve – naïf " * 9, "x" * 40]
CONTEXT = 16


class Words:
    """Pairs of bytes, the last one possibly alone: tokens of several lengths."""

    vocab_size, end = 300, 299

    def __init__(self):
        self.known = []

    def encode(self, text):
        self.known += [pair for pair in dict.fromkeys(self.pairs(text)) if pair not in self.known]
        return np.array([self.known.index(pair) for pair in self.pairs(text)], int)

    def decode(self, tokens):
        return b"".join(self.known[token] for token in tokens)

    def byte_counts(self, text):
        return np.array([len(pair) for pair in self.pairs(text)], int)

    def pairs(self, text):
        data = text.encode()
        return [data[i : i + 2] for i in range(0, len(data), 2)]


class Uniform(nn.Module):
    """Gives all tokens the same probability and remembers what it read."""

    def __init__(self, vocab_size=257, context=CONTEXT):
        super().__init__()
        self.vocab_size, self.context, self.seen = vocab_size, context, []
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, tokens, *, padding_mask=None):
        self.seen.append((tokens.clone(), padding_mask))
        return self.weight.expand(*tokens.shape, self.vocab_size)


def documents(*texts):
    return [SimpleNamespace(name=f"d{n}", text=text) for n, text in enumerate(texts)]


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    model = Decoder(257, 16, 2, 2, hidden_dim=32, context=CONTEXT, dtype=torch.float64)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.4)
    return model


@pytest.mark.parametrize(("tokenizer", "width"), [(ByteTokenizer(), 1), (Words(), 2)])
@pytest.mark.parametrize("context", [1, 2, 7, 8, 16, 500])
def test_a_uniform_model_needs_the_logarithm_of_its_tokens(tokenizer, width, context):
    model = Uniform(tokenizer.vocab_size)
    lengths = np.array([260, 251, 252])
    texts = ["a" * 260 * width, "b" * 251 * width, "é" * 126 * width]
    bits, sizes = bits_per_byte(model, tokenizer, documents(*texts), context=context).T
    half = context // 2
    scored = lengths - half
    windows = [min(context, n - s) for n in lengths for s in range(0, n - half, context - half)]
    read = [one.numel() if mask is None else int((~mask).sum()) for one, mask in model.seen]
    np.testing.assert_allclose(bits, scored * np.log2(tokenizer.vocab_size), rtol=1e-14)
    assert (sizes.tolist(), sum(read)) == ((scored * width).tolist(), sum(windows))


@pytest.mark.parametrize(("context", "batch_size"), [(2, 1), (7, 3), (16, 4)])
def test_bits_are_those_of_the_windows_one_by_one(decoder, context, batch_size):
    tokenizer, half, sizes = ByteTokenizer(), context // 2, []
    decoder.train()
    hook = decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape))
    options = {"context": context, "batch_size": batch_size}
    found = bits_per_byte(decoder, tokenizer, documents(*TEXTS), **options)
    hook.remove()
    assert not decoder.training
    assert np.max(sizes, 0).tolist() == [batch_size, context]
    for text, (bits, size) in zip(TEXTS, found, strict=True):
        tokens = torch.tensor([tokenizer.end, *text.encode()])
        expected = 0.0
        for place in range(half + 1, len(tokens)):  # predicted one by one
            start = (place - 1 - half) // (context - half) * (context - half)
            logits = decoder(tokens[None, start:place])[0, -1]
            expected -= logits.log_softmax(-1)[tokens[place]].item() / np.log(2)
        assert (bits, size) == (pytest.approx(expected, abs=1e-9), len(text.encode()) - half)


def test_bytes_of_tokens_are_counted_from_the_first_scored_one():
    texts = ["", "sixteen and more", "sixteen and more!", "naïve – naïf – naïve"]
    found, starts = scored_part(Words(), documents(*texts), CONTEXT)
    assert ([one.text for one in found], starts.tolist()) == (texts[2:], [16, 16])
    sizes = bits_per_byte(Uniform(Words.vocab_size), Words(), found)[:, 1]
    assert (starts + sizes).tolist() == [len(text.encode()) for text in texts[2:]]


@pytest.mark.parametrize("change", [str.lower, str.rstrip, lambda text: text.replace("i", "")])
def test_a_tokenizer_that_loses_text_is_refused(change, refuses):
    class Changing(ByteTokenizer):
        def encode(self, text):
            return super().encode(change(text))

    kept, lost = "no such letter at all", "Naive, one letter more "
    score = partial(scored_part, Changing(), context=CONTEXT)
    assert len(score(documents(kept))[0]) == 1
    refuses(
        GatesError,
        ("loses text: d1 comes back with .* name a tok", lambda: score(documents(kept, lost))),
    )
    assert len(score(documents(kept, lost[:5]))[0]) == 1  # not scored


def whole_size(*parts):
    """Bytes of a file of PPMd that holds all parts."""
    coder = pyppmd.Ppmd7Encoder(64, 2**30)
    return len(coder.encode("".join(parts).encode()) + coder.flush(endmark=False))


@pytest.mark.fault("46 B1")
def test_ppmd_knows_the_training_text_and_the_document_before_but_no_other_one():
    words = np.random.default_rng(0).permutation([f"{n:x}" for n in range(3000)])
    known, fresh = " ".join(words[:1500]), " ".join(words[1500:])
    training = documents(known[: len(known) // 2], known[len(known) // 2 :])
    texts = [known, fresh, fresh + fresh, "naïve " * 50]
    starts = [0, 100, len(fresh), 200]
    found = ppmd_bits(training, documents(*texts), starts)
    for text, start, (bits, size) in zip(texts, starts, found, strict=True):
        data = text.encode()
        head, tail = data[:start].decode(), data[start:].decode()
        assert size == len(tail.encode())
        # the file with the document less that with what is not scored of it, to two bytes
        exact = whole_size(known, head, tail) - whole_size(known, head)
        assert abs(bits / 8 - exact) <= 2
    per_byte = found[:, 0] / found[:, 1]
    assert per_byte[[0, 2]].max() < 0.2 < 1.5 < per_byte[1]  # learned in training, or just before
    reverse = ppmd_bits(training, documents(*texts[::-1]), starts[::-1])
    assert (reverse[::-1] == found).all()


def test_a_coder_that_is_killed_is_told(monkeypatch):
    monkeypatch.setattr("os.fork", lambda: os.posix_spawn("/bin/false", ["false"], {}))
    with pytest.raises(GatesError, match="PPMd was killed while it coded d0: it needs up to"):
        ppmd_bits(documents("abc"), documents("abcd"), [0])


def test_what_cannot_be_scored_is_refused(refuses):
    broken, model, tokenizer = Uniform(), Uniform(), ByteTokenizer()
    broken.weight.data.fill_(torch.nan)
    refuses(
        GatesError,
        (
            "d1 has 8 tokens, expected more than 8, half of the context",
            lambda: bits_per_byte(model, tokenizer, documents(TEXTS[0], "exactly8")),
        ),
        (
            "none of 2 documents has more than 8 tokens, half of the context",
            lambda: scored_part(tokenizer, documents("short", "exactly8"), CONTEXT),
        ),
        ("none of 0 documents", lambda: scored_part(tokenizer, [], CONTEXT)),
        (
            "the tokenizer has 257 tokens, the model 256; use the tokenizer that it was",
            lambda: bits_per_byte(Uniform(256), tokenizer, documents(*TEXTS)),
        ),
        (
            "the model needs nan bits for d0, expected a finite number",
            lambda: bits_per_byte(broken, tokenizer, documents(*TEXTS)),
        ),
    )
    refuses(
        ValueError,
        (
            "context must be at least 1, got 0",
            lambda: bits_per_byte(model, tokenizer, documents(*TEXTS), context=0),
        ),
        (
            "batch_size must be at least 1",
            lambda: bits_per_byte(model, tokenizer, documents(*TEXTS), batch_size=0),
        ),
    )
