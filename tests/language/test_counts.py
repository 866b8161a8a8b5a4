"""Witten-Bell probabilities of bytes, compared with dictionaries and closed forms."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_gates.errors import GatesError
from language.counts import ByteCounts

TEXTS = ["abracadabra", "a rose is a rose is a rose", "ab", "", "naïve – naïf", "bra"]


def documents(*texts):
    return [SimpleNamespace(name=str(n), text=text) for n, text in enumerate(texts)]


def naive_bits(texts, text, order):
    """The definition, on dictionaries: bits of each byte at one order."""
    seen, after = Counter(), {}
    for data in map(str.encode, texts):
        for length in range(order + 1):
            for i in range(length, len(data)):
                seen[data[i - length : i], data[i]] += 1
                after.setdefault(data[i - length : i], set()).add(data[i])

    def probability(context, byte):
        lower = probability(context[1:], byte) if context else 1 / 256
        kinds = after.get(context, set())
        total = sum(seen[context, one] for one in kinds)
        if not total:
            return lower
        return (seen[context, byte] + len(kinds) * lower) / (total + len(kinds))

    data = text.encode()
    found = [probability(data[max(0, i - order) : i], data[i]) for i in range(len(data))]
    return -np.log2(found)


@pytest.mark.parametrize("text", [*TEXTS, "a rosary: ï", "zzzz", "bra bra"])
def test_bits_are_those_of_dictionaries(text):
    bits = ByteCounts.fit(documents(*TEXTS), 5).bits(text)
    assert bits.shape == (6, len(text.encode()))
    for order, row in enumerate(bits):
        np.testing.assert_allclose(row, naive_bits(TEXTS, text, order), rtol=0, atol=1e-12)


@given(st.lists(st.text("ab\x00ÿ", max_size=12), min_size=1, max_size=4), st.text("abcÿ"))
def test_bits_are_those_of_dictionaries_for_any_text(texts, text):
    bits = ByteCounts.fit(documents(*texts, "abcd"), 3).bits(text)
    for order, row in enumerate(bits):
        expected = naive_bits([*texts, "abcd"], text, order)
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-12)


def test_orders_up_to_seven_and_bytes_of_any_value():
    texts = ["\x00\x00\x00\x00\x00\x00\x00\x00\x01", "\U0010ffff\U0010fffe\x00\x7f" * 3]
    bits = ByteCounts.fit(documents(*texts), 7).bits(texts[1])
    for order in (0, 6, 7):
        np.testing.assert_allclose(bits[order], naive_bits(texts, texts[1], order), atol=1e-12)


def test_what_cannot_be_counted_is_refused(refuses):
    refuses(
        GatesError,
        ("0 documents has 0 bytes, expected more than the 5", lambda: ByteCounts.fit([])),
        ("2 documents has 3 bytes", lambda: ByteCounts.fit(documents("abc", ""), 3)),
    )
    refuses(
        ValueError,
        ("order must not be negative, got -1", lambda: ByteCounts.fit(documents("a"), -1)),
        ("order must be at most 7, got 8", lambda: ByteCounts.fit(documents("a"), 8)),
    )
