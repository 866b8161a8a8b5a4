from collections import Counter

import albumentations as A
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from endoscopy.data.frame_cache import FrameReader
from endoscopy.data.images import Pipeline, train_pipeline
from endoscopy.data.readers.real_colon import read_real_colon
from endoscopy.data.samples import (
    BatchDataset,
    BatchOrder,
    FrameLoader,
    LesionDataset,
    ObjectBalancedSampler,
    WeightedFrameSampler,
    collate,
)
from endoscopy.data.streams import STREAMS, InputForm, normalize

SIZE = 32


@pytest.fixture(scope="module")
def colon(real_colon, tmp_path_factory):
    root = real_colon.official(tmp_path_factory.mktemp("data") / "colon", targets=True)
    lesions = real_colon.lesion_rows()
    lesions[2]["size [mm]"] = "15mm-"
    real_colon.write_csv(root / "lesion_info.csv", lesions)
    return read_real_colon(root)[0]


FORM = InputForm(("rgb_mask",), SIZE)


def frames(colon, recipe=None, **changes):
    reader = FrameReader(colon, SIZE, masks=True, depths=True)
    return LesionDataset(reader, train_pipeline(SIZE, recipe) if recipe else None, **changes)


def test_a_batch_holds_what_the_table_says(colon, real_colon):
    data = frames(colon)
    rows = [0, 15, 30, 43]
    batch = collate([data[row] for row in rows], InputForm(tuple(STREAMS), SIZE))
    assert {n: s.shape[1] for n, s in batch["streams"].items()} == STREAMS
    assert all(s.dtype == torch.float32 for s in batch["streams"].values())
    assert batch["size_mm"].tolist() == colon.frames["gt"][rows].tolist() == [6, 2.5, 15, 4]
    assert batch["censored"].tolist() == [False, False, True, False]
    assert batch["object"].tolist() == [0, 1, 2, 3]
    assert batch["object"].dtype == batch["frame"].dtype == torch.int64
    assert batch["frame"].tolist() == rows
    box = colon.frames.loc[15, ["bbox_xmin", "bbox_xmax", "bbox_ymin", "bbox_ymax"]].tolist()
    expected = [
        np.log((box[1] - box[0]) / 64),
        np.log((box[3] - box[2]) / 48),
        (box[0] + box[1]) / 128,
        (box[2] + box[3]) / 96,
    ]
    assert batch["geometry"][1].tolist() == pytest.approx(expected, abs=1e-6)
    image = torch.from_numpy(data.reader.read(15).image).permute(2, 0, 1)[None]
    torch.testing.assert_close(batch["streams"]["rgb"][1:2], normalize(image))
    depth = batch["streams"]["depth"] * 30
    assert {round(float(v), 4) for v in depth.unique()} == {5.0, 10.0}
    assert torch.equal(batch["streams"]["rgb_mask"][:, 3:] == 1, depth < 7)


def test_a_sample_depends_on_seed_epoch_and_row_alone(colon):
    first, other = frames(colon, "published", seed=1), frames(colon, "published", seed=1)
    expected = first.sample(9, epoch=2)
    for row in (3, 4):
        other.sample(row, epoch=1)
    np.testing.assert_array_equal(other.sample(9, epoch=2).frame.image, expected.frame.image)
    assert other.sample(9, epoch=2).frame.box == expected.frame.box
    third = frames(colon, "published", seed=2)
    for image in (other.sample(9, 3).frame.image, third.sample(9, 2).frame.image):
        assert not np.array_equal(image, expected.frame.image)


def test_a_polyp_is_never_moved_out_of_the_frame(colon):
    """The label would stay and nothing would be left to learn it from."""
    reader = FrameReader(colon, SIZE)
    left, _, right, _ = reader.box(3)
    for x in (31, round(SIZE - left - (right - left) / 4)):  # nothing or a quarter would be left
        away = A.Affine(translate_px={"x": x, "y": 0}, scale=1.0, shear=0.0, p=1.0)
        sample = LesionDataset(reader, Pipeline([away])).sample(3)
        np.testing.assert_array_equal(sample.frame.image, reader.read(3).image)
    near = A.Affine(translate_px={"x": 1, "y": 0}, scale=1.0, shear=0.0, p=1.0)
    moved = LesionDataset(reader, Pipeline([near])).sample(3).frame
    assert moved.box[0] == pytest.approx(reader.box(3)[0] + 1, abs=1e-3)


def test_mixed_pixels_and_masks_join_in_a_batch(colon):
    """A frame that was given back unmoved is uint8 among floats, and one may lack its mask."""
    plain = frames(colon)[3]
    as_float = plain.frame._replace(image=plain.frame.image.astype(np.float32) / 255, mask=None)
    batch = collate([plain, plain._replace(frame=as_float)], FORM)["streams"]["rgb_mask"]
    torch.testing.assert_close(batch[0, :3], batch[1, :3])
    assert batch[1, 3].any()


def test_a_missing_depth_is_named(colon, refused):
    data = LesionDataset(FrameReader(colon, SIZE))
    refused(
        "row 5 of the frame table has no depth",
        collate,
        [data[5]],
        FORM._replace(streams=("depth",)),
    )
    collate([data[5]], FORM)


def loader(colon, workers=0, n=5, size=4, even=False, **ranks):
    sampler = ObjectBalancedSampler(colon.object_codes, n, seed=3, **ranks)
    batches = BatchDataset(frames(colon, "dihedral", seed=3), InputForm(("rgb", "loc"), SIZE))
    return FrameLoader.over(batches, BatchOrder(sampler, size, even=even), workers)


def same(first, second):
    assert first["frame"].tolist() == second["frame"].tolist()
    for name, stream in first["streams"].items():
        assert torch.equal(stream, second["streams"][name])


def test_a_loader_goes_on_from_any_batch(colon):
    whole = loader(colon)
    whole.sampler.set_epoch(2)
    expected = list(whole)
    assert len(whole) == len(expected) == 5
    assert [len(batch["frame"]) for batch in expected] == [4, 4, 4, 4, 4]
    for stop in range(5):
        first = loader(colon)
        first.sampler.set_epoch(2)
        running = iter(first)
        for _ in range(stop):
            next(running)
        resumed = loader(colon)
        resumed.load_state_dict(first.state_dict())
        resumed.sampler.set_epoch(2)
        rest = list(resumed)
        assert len(rest) == 5 - stop
        for found, wanted in zip(rest, expected[stop:], strict=True):
            same(found, wanted)
        resumed.sampler.set_epoch(3)
        assert len(list(resumed)) == 5  # the next epoch is whole again
    finished = loader(colon)
    finished.load_state_dict({"position": 5})
    assert len(list(finished)) == 5


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # where one core is left
def test_workers_change_nothing(colon):
    alone, helped = loader(colon), loader(colon, workers=2)
    for epoch, position in ((0, 0), (1, 0), (1, 3)):
        for one in (alone, helped):
            one.sampler.set_epoch(epoch)
            one.load_state_dict({"position": position})
        for found, expected in zip(helped, alone, strict=True):
            same(found, expected)
            assert helped.state_dict() == alone.state_dict()


def test_batches_of_ranks_join_to_the_batch_of_one(colon):
    whole = [batch["frame"].tolist() for batch in loader(colon, size=4)]
    ranks = [
        [b["frame"].tolist() for b in loader(colon, size=2, num_replicas=2, rank=rank, even=False)]
        for rank in range(2)
    ]
    for batch, first, second in zip(whole, *ranks, strict=True):
        assert [first[0], second[0], first[1], second[1]] == batch


@pytest.mark.parametrize("rows", [5, 8, 9, 17])
def test_every_rank_has_equally_many_evaluation_batches(rows):
    orders = []
    for rank in range(2):
        sampler = ObjectBalancedSampler(np.zeros(rows), 99, frozen=True, num_replicas=2, rank=rank)
        orders.append(BatchOrder(sampler, 4, even=True))
    batches = [list(order) for order in orders]
    assert len(batches[0]) == len(batches[1]) == len(orders[0])
    found = sorted(row for mine in batches for _, batch in mine for row in batch)
    assert found == list(range(rows))
    assert max(len(batch) for mine in batches for _, batch in mine) <= 4


def test_a_reader_scales_boxes_and_leaves_the_table_alone(make_table):
    table = make_table({"a": 5})
    assert FrameReader(table, 32).box(0) == pytest.approx((5, 10 / 3, 15, 50 / 3))
    assert table.frames.loc[0, ["bbox_xmin", "bbox_ymax"]].tolist() == [10, 25]


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
    assert [drawn[i % ranks][i // ranks] for i in range(len(order))] == order


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
    drawn = list(ObjectBalancedSampler(objects, 2, rows=np.array([3, 4, 25])))
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
    expected = np.array([(1 - 0.9) / (1 - 0.9**n) for n in (8, 3, 1)]) * [8, 3, 1]
    np.testing.assert_allclose(mass(sampler(0.9), CLASSES), expected / expected.sum())


def test_weighted_draws_have_the_frequencies_of_their_weights():
    sampler = WeightedFrameSampler(OBJECTS, CLASSES, 30_000, seed=5)
    drawn = np.array(list(sampler))
    np.testing.assert_allclose(np.bincount(CLASSES[drawn]) / len(drawn), 1 / 3, atol=0.015)
    sampler.set_epoch(1)
    assert drawn.tolist() != list(sampler)


def test_weighted_shards_join_to_the_whole():
    whole = list(WeightedFrameSampler(OBJECTS, CLASSES, 31, seed=2))
    shards = [
        list(WeightedFrameSampler(OBJECTS, CLASSES, 31, seed=2, num_replicas=3, rank=rank))
        for rank in range(3)
    ]
    assert [shards[i % 3][i // 3] for i in range(31)] == whole


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (
            lambda _: ObjectBalancedSampler([1, 2], frames_per_object=0),
            "frames_per_object must be at least 1, got 0",
        ),
        (
            lambda _: ObjectBalancedSampler([1, 2], num_replicas=2, rank=2),
            "rank must lie between 0 and 1, got 2",
        ),
        (
            lambda _: ObjectBalancedSampler([1, 2], num_replicas=3),
            "2 rows cannot be shared by 3 ranks",
        ),
        (lambda _: ObjectBalancedSampler([1, 2], rows=[]), "no rows to draw from"),
        (
            lambda _: WeightedFrameSampler([1], [1], 1, balance="object"),
            "balance must be class or effective",
        ),
        (
            lambda _: WeightedFrameSampler([1], [1], 1, balance="effective", beta=1.0),
            "beta must be at least 0 and below 1",
        ),
        (lambda _: BatchOrder(ObjectBalancedSampler([1]), 0), "batch_size must be at least 1, got"),
        (lambda colon: FrameReader(colon, 0), "size must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused(colon, refused, words):
    with pytest.raises(ValueError, match=words):
        refused(colon)
