"""Adaptive counts, compared with dictionaries: windows, sums, nothing of the future, weights."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from language.adaptive_counts import AdaptiveCounts
from language.counts import ByteCounts
from language.scoring import scored_part
from language.tokenizer import ByteTokenizer

TRAINING = ["abracadabra, a rose is a rose", "naïve – naïf", "bra bra"]
OTHERS = ["a rosary is a rosary is bra", "naïf cadabra naïf cadabra"]
TEXTS = ["zebra zebra zebra zebra!", "abababababababababab", "naïve naïve – rose is a naïve rose"]
ORDER, CONTEXT = 3, 10


class Pairs(ByteTokenizer):
    """Pairs of bytes, the last one possibly alone."""

    def byte_counts(self, text):
        size = len(text.encode())
        return np.array([2] * (size // 2) + [1] * (size % 2))


def documents(*texts):
    return [SimpleNamespace(name=str(n), text=text) for n, text in enumerate(texts)]


@pytest.fixture(scope="module")
def counts():
    return ByteCounts.fit(documents(*TRAINING), ORDER)


@pytest.fixture(params=[False, True], ids=["window", "whole"])
def rival(request, counts):
    return AdaptiveCounts(counts, ByteTokenizer(), CONTEXT, whole=request.param)


def witten_bell(groups, context, byte, order, lower):
    """Probability of a byte of one order, on dictionaries, with ``lower`` below order 0.

    Each of the groups is texts, and how often what is counted in them counts.
    """
    context = context[len(context) - min(order, len(context)) :]
    size, seen, kinds = len(context), Counter(), 0
    for texts, times in groups:
        found = Counter(
            data[i]
            for data in texts
            for i in range(size, len(data))
            if data[i - size : i] == context
        )
        seen.update({one: times * count for one, count in found.items()})
        kinds += times * len(found)
    below = witten_bell(groups, context[1:], byte, order - 1, lower) if context else lower
    if not seen:
        return below
    return (seen[byte] + kinds * below) / (seen.total() + kinds)


def naive(past, byte):
    """Probabilities of all models of a byte after what is read of its text."""
    both = [([text.encode() for text in TRAINING], 1), ([past], 64)]
    first = [witten_bell(both, past, byte, order, 1 / 256) for order in range(ORDER + 1)]
    own = [witten_bell([([past], 1)], past, byte, order, first[-1]) for order in range(ORDER + 1)]
    return np.array([*first, *own])


@pytest.mark.parametrize("text", [*TEXTS, *OTHERS])
def test_models_are_those_of_dictionaries(rival, text):
    data, half = text.encode(), CONTEXT // 2
    expected = []
    for place in range(half, len(data)):
        window = max(0, place // half * half - half - 1)  # from the token that a window reads first
        past = data[0 if rival.whole else window : place]
        expected.append(naive(past, data[place]))
    found = rival.models(SimpleNamespace(name="t", text=text))
    np.testing.assert_allclose(found, np.stack(expected, 1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), Pairs()])
@pytest.mark.parametrize("context", [1, 2, 7, 10, 500])
def test_the_scored_bytes_are_those_of_the_decoder(counts, rival, tokenizer, context):
    held = documents("a" * 1200, "é" * 300, *TEXTS)
    found, starts = scored_part(tokenizer, held, context)
    rival = AdaptiveCounts(counts, tokenizer, context, whole=rival.whole)
    values = rival.bits(found)
    assert values.shape == (len(found), 2)
    sizes = [len(one.text.encode()) for one in found] - starts
    assert values[:, 1].tolist() == sizes.tolist()
    expected = -np.log2(rival.models(found[0]).mean(0)).sum()  # equal weights
    assert values[0, 0] == pytest.approx(expected)


def test_weights_are_the_best_for_other_documents(rival):
    others = documents(*OTHERS)
    before = rival.bits(others)[:, 0].sum()
    rival.fit(others)
    assert rival.weights.sum() == pytest.approx(1, abs=1e-12)
    best = rival.bits(others)[:, 0].sum()
    assert best < 0.95 * before
    kept = rival.weights
    for number in range(len(kept)):  # EM is almost at its maximum: no other weights are much better
        rival.weights = 0.98 * kept + 0.02 * np.eye(len(kept))[number]
        assert rival.bits(others)[:, 0].sum() > best - 0.05


def test_weights_are_fitted_to_every_kth_byte(rival, monkeypatch):
    monkeypatch.setattr("language.adaptive_counts.FITTED", 15)
    others = documents(*OTHERS)
    rows = np.concatenate([rival.models(one)[:, ::3] for one in others], 1)
    rival.fit(others)
    monkeypatch.setattr("language.adaptive_counts.FITTED", 10**9)
    whole = AdaptiveCounts(rival.counts, rival.tokenizer, CONTEXT, whole=rival.whole).fit(others)
    assert not np.allclose(whole.weights, rival.weights)
    expected = np.full(len(rows), 1 / len(rows))
    for _ in range(30):
        shares = expected[:, None] * rows
        expected = (shares / shares.sum(0)).mean(1)
    np.testing.assert_allclose(rival.weights, expected, atol=1e-12)
