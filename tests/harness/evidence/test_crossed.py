"""Resamples of samples that are pairs: both kinds of clusters are drawn."""

import numpy as np
import pytest

from harness.evidence import Resamples, moments

FIRST = np.repeat(np.arange(16), 3)
SECOND = np.arange(48) % 24
"""48 pairs: each of 16 is in three, each of 24 in two."""


def interval(draws, values):
    return draws.intervals(moments(values))["value"]


def world(random, first=1.0, second=1.0, own=0.3):
    """Return values of the pairs, whose expectation is 0."""
    return (
        first * random.normal(size=16)[FIRST]
        + second * random.normal(size=24)[SECOND]
        + own * random.normal(size=48)
    )


def test_a_pair_is_drawn_as_often_as_both_of_its_clusters():
    rows, columns = np.repeat(np.arange(6), 5), np.tile(np.arange(5), 6)
    draws = Resamples.crossed(rows, columns, resamples=300)
    weights = np.concatenate(list(draws._weights())).reshape(300, 6, 5)
    assert np.allclose(weights.sum((1, 2)), 30)
    margins = weights.sum(2, keepdims=True) * weights.sum(1, keepdims=True) / 30
    assert np.allclose(weights, margins)  # of rank one: a product
    assert np.isclose(weights.sum(2) / 5, (weights.sum(2) / 5).round()).all()
    assert weights.sum(2).std() > 1
    assert weights.sum(1).std() > 1


def test_one_kind_is_a_plain_draw_of_clusters():
    values = world(np.random.default_rng(0))
    one, plain = Resamples.crossed(FIRST), Resamples.clusters(FIRST)
    assert interval(one, values) == pytest.approx(interval(plain, values))


def test_a_whole_table_has_the_deviation_of_theory():
    random = np.random.default_rng(1)
    rows, columns = np.repeat(np.arange(40), 50), np.tile(np.arange(50), 40)
    a, b = random.normal(size=40), 2 * random.normal(size=50)
    found = interval(Resamples.crossed(rows, columns, resamples=4000), a[rows] + b[columns])
    deviation = np.sqrt(a.var() / 40 + b.var() / 50)
    assert found.high - found.low == pytest.approx(2 * 1.96 * deviation, rel=0.06)
    assert found.units == 40


def test_a_cluster_that_is_drawn_is_drawn_in_both_places():
    """A whole table of a[i] + a[j] has twice the mean of a, and so twice its interval."""
    a = np.random.default_rng(3).normal(size=30)
    pairs = np.stack(np.divmod(np.arange(900), 30), 1)
    values = a[pairs].sum(1)
    found, two = (interval(Resamples.crossed(*ids), values) for ids in ((pairs,), pairs.T))
    single = interval(Resamples.clusters(range(30)), a)
    assert (found.low, found.high) == pytest.approx((2 * single.low, 2 * single.high))
    assert found.units == 30
    narrow = (two.high - two.low) / (found.high - found.low)
    assert narrow == pytest.approx(0.5**0.5, rel=0.06)  # as two kinds: too narrow


def test_kinds_belong_to_the_same_samples(refuses):
    refuses(
        ValueError,
        ("one id each a sample", lambda: Resamples.crossed(FIRST, SECOND[:-1])),
        ("one id each a sample", lambda: Resamples.crossed()),
    )


def test_a_resample_without_a_sample_is_drawn_again():
    pairs = ("a", "b", "c"), (1, 2, 3), ("x", "y", "z")  # three kinds: most products are empty
    found = interval(Resamples.crossed(*pairs, resamples=200), np.array([1.0, 2.0, 4.0]))
    assert 1 <= found.low < found.high <= 4
