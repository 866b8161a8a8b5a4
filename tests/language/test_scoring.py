"""Bits per byte: each scored byte once, closed forms, xz on the same bytes."""

import lzma
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from core_gates.errors import GatesError
from language.decoder import Decoder
from language.scoring import bits_per_byte, scored_part, xz_bits
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
    assert sizes.tolist() == (scored * width).tolist()
    assert sum(read) == sum(windows)


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
        assert bits == pytest.approx(expected, abs=1e-9)
        assert size == len(text.encode()) - half


def test_bytes_of_tokens_are_counted_from_the_first_scored_one():
    texts = ["", "sixteen and more", "sixteen and more!", "naïve – naïf – naïve"]
    found, starts = scored_part(Words(), documents(*texts), CONTEXT)
    assert [one.text for one in found] == texts[2:]
    assert starts.tolist() == [16, 16]
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


def test_xz_needs_what_the_scored_bytes_add_to_those_before():
    texts = ["abc" * 2000, "naïve", "abc" * 100 + "Zebras quickly jump, vexing 9 dwarfs"]
    starts = [0, 0, 300]
    bits, sizes = xz_bits(documents(*texts), starts).T
    assert sizes.tolist() == [6000, 6, 36]
    assert bits[0] < 0.1 * 8 * 6000
    for text, size in zip(texts[:2], bits / 8, strict=False):
        xz = len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
        assert 0 < xz - size < 64  # header, checksums and index of the container
    whole, before = xz_bits(documents(texts[2], texts[2][:300]), [0, 0])[:, 0]
    assert bits[2] == whole - before < whole


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
