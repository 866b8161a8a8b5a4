from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from endoscopy.data.samples import ObjectBalancedSampler, WeightedFrameSampler

counts = st.lists(st.integers(1, 9), min_size=1, max_size=7)


@pytest.fixture
def vectors(golden):
    return np.load(golden / "samplers_s61.npz", allow_pickle=False)


def test_properties_of_the_reference(vectors):
    """The reference drops objects with one frame; ours keeps them, the rest is as there."""
    objects, n = vectors["object_ids"], int(vectors["n_per_object"])
    sampler = ObjectBalancedSampler(objects, n, seed=3)
    length = len(sampler)
    drawn = list(sampler)
    assert length == len(drawn) == len(set(drawn))
    found, reference = Counter(objects[drawn]), Counter(objects[vectors["indices"]])
    available = Counter(objects)
    assert found == {name: min(n, count) for name, count in available.items()}
    alone = {name for name, count in available.items() if count == 1}
    assert len(alone) == 2
    assert {name: count for name, count in found.items() if name not in alone} == reference
    assert length == int(vectors["len_after"]) + len(alone)  # exact, where the reference says 45


def test_frozen_rows_are_those_of_the_reference(vectors):
    objects = vectors["object_ids"]
    sampler = ObjectBalancedSampler(objects, int(vectors["n_per_object"]), frozen=True)
    alone = [row for row in range(len(objects)) if (objects == objects[row]).sum() == 1]
    drawn = [row for row in sampler if row not in alone]
    assert drawn == vectors["indices_frozen"].tolist()
    sampler.set_epoch(5)
    assert [row for row in sampler if row not in alone] == drawn


def test_classes_are_drawn_as_objects_are(vectors):
    classes, n = vectors["cifar_targets"], int(vectors["cifar_n"])
    drawn = list(ObjectBalancedSampler(classes, n))
    expected = {label: min(n, count) for label, count in Counter(classes).items()}
    assert Counter(classes[drawn]) == expected
    assert Counter(classes[vectors["cifar_indices"]]) == expected
    assert len(drawn) == len(vectors["cifar_indices"])


@given(counts, st.integers(1, 6), st.integers(1, 4), st.integers(0, 3), st.booleans())
def test_shards_are_disjoint_and_complete(sizes, n, ranks, epoch, frozen):
    objects = np.repeat(np.arange(len(sizes)), sizes)
    if sum(min(n, size) for size in sizes) < ranks:
        return
    whole = ObjectBalancedSampler(objects, n, seed=7, frozen=frozen)
    whole.set_epoch(epoch)
    order = list(whole)
    assert len(order) == len(set(order)) == len(whole)
    shards = [
        ObjectBalancedSampler(objects, n, seed=7, frozen=frozen, num_replicas=ranks, rank=rank)
        for rank in range(ranks)
    ]
    drawn = []
    for shard in shards:
        shard.set_epoch(epoch)
        mine = list(shard)
        assert len(mine) == len(shard)
        drawn.append(mine)
    lengths = [len(mine) for mine in drawn]
    assert max(lengths) - min(lengths) <= 1
    interleaved = [drawn[i % ranks][i // ranks] for i in range(len(order))]
    assert interleaved == order


@given(counts, st.integers(1, 4))
def test_even_shards_leave_out_less_than_one_row_a_rank(sizes, ranks):
    objects = np.repeat(np.arange(len(sizes)), sizes)
    if len(objects) < ranks:
        return
    shards = [
        list(ObjectBalancedSampler(objects, 99, num_replicas=ranks, rank=rank, even=True))
        for rank in range(ranks)
    ]
    assert len({len(shard) for shard in shards}) == 1
    rows = [row for shard in shards for row in shard]
    assert len(rows) == len(set(rows)) == len(objects) - len(objects) % ranks


def test_order_depends_on_seed_and_epoch_alone():
    objects = np.repeat(np.arange(5), 20)

    def draw(seed, epoch):
        sampler = ObjectBalancedSampler(objects, 4, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert draw(1, 2) == draw(1, 2)
    orders = {tuple(draw(seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert any(order != tuple(sorted(order)) for order in orders)


def test_all_frames_of_an_object_have_their_turn():
    sampler = ObjectBalancedSampler(np.repeat([0, 1], [30, 5]), 3, seed=0)
    times = Counter(row for epoch in range(400) for row in sampler.draw(epoch))
    assert set(times) == set(range(35))
    few, many = [times[row] for row in range(30)], [times[row] for row in range(30, 35)]
    assert np.mean(few) == pytest.approx(40, abs=1e-9)
    assert np.mean(many) == pytest.approx(240, abs=1e-9)
    assert np.std(few) < 12  # binomial: 6


def test_drawable_rows_are_what_the_epochs_draw():
    sampler = ObjectBalancedSampler(np.repeat(np.arange(4), 50), 5, seed=1, num_replicas=2, rank=1)
    rows = sampler.drawable(3)
    expected = {row for epoch in range(3) for row in sampler.draw(epoch)}
    assert rows.tolist() == sorted(expected)
    assert 20 < len(rows) <= 60


def test_rows_restrict_what_is_drawn():
    objects = np.repeat(np.arange(4), 10)
    rows = np.array([3, 4, 25])
    drawn = list(ObjectBalancedSampler(objects, 2, rows=rows))
    assert sorted(drawn) == [3, 4, 25]


OBJECTS = np.repeat(np.arange(12), np.arange(1, 13))
CLASSES = np.where(OBJECTS < 8, 0, np.where(OBJECTS < 11, 1, 2))


def mass(sampler, by):
    return np.bincount(by[sampler.rows], sampler.probabilities)


def test_class_balance_follows_the_closed_form():
    sampler = WeightedFrameSampler(OBJECTS, CLASSES, 100)
    np.testing.assert_allclose(mass(sampler, CLASSES), 1 / 3)
    np.testing.assert_allclose(mass(sampler, OBJECTS), [1 / 24] * 8 + [1 / 9] * 3 + [1 / 3])
    per_frame = 1 / (3 * 8 * 5)  # 1 / (classes * objects in the class * frames of the object)
    assert sampler.probabilities[OBJECTS == 4] == pytest.approx([per_frame] * 5)


def test_effective_number_lies_between_objects_and_classes():
    def sampler(beta):
        return WeightedFrameSampler(OBJECTS, CLASSES, 10, balance="effective", beta=beta)

    np.testing.assert_allclose(mass(sampler(0.0), OBJECTS), 1 / 12)
    np.testing.assert_allclose(mass(sampler(1 - 1e-9), CLASSES), 1 / 3, rtol=1e-6)
    weights = np.array([(1 - 0.9) / (1 - 0.9**n) for n in (8, 3, 1)])
    expected = weights * [8, 3, 1]
    np.testing.assert_allclose(mass(sampler(0.9), CLASSES), expected / expected.sum())


def test_weighted_draws_have_the_frequencies_of_their_weights():
    sampler = WeightedFrameSampler(OBJECTS, CLASSES, 30_000, seed=5)
    drawn = np.array(list(sampler))
    share = np.bincount(CLASSES[drawn]) / len(drawn)
    np.testing.assert_allclose(share, 1 / 3, atol=0.015)
    sampler.set_epoch(1)
    assert drawn.tolist() != list(sampler)


def test_weighted_shards_join_to_the_whole():
    whole = list(WeightedFrameSampler(OBJECTS, CLASSES, 31, seed=2))
    shards = [
        list(WeightedFrameSampler(OBJECTS, CLASSES, 31, seed=2, num_replicas=3, rank=rank))
        for rank in range(3)
    ]
    assert [shards[i % 3][i // 3] for i in range(31)] == whole


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="frames_per_object must be at least 1, got 0"):
        ObjectBalancedSampler([1, 2], 0)
    with pytest.raises(ValueError, match="rank must lie between 0 and 1, got 2"):
        ObjectBalancedSampler([1, 2], num_replicas=2, rank=2)
    with pytest.raises(ValueError, match="2 rows cannot be shared by 3 ranks"):
        ObjectBalancedSampler([1, 2], num_replicas=3)
    with pytest.raises(ValueError, match="no rows to draw from"):
        ObjectBalancedSampler([1, 2], rows=[])
    with pytest.raises(ValueError, match="balance must be class or effective"):
        WeightedFrameSampler([1], [1], 1, balance="object")
    with pytest.raises(ValueError, match="beta must be at least 0 and below 1"):
        WeightedFrameSampler([1], [1], 1, balance="effective", beta=1.0)
