import albumentations as A
import numpy as np
import pytest
import torch

from core_gates.errors import GatesError
from endoscopy.data.frame_cache import FrameReader
from endoscopy.data.readers.real_colon import read_real_colon
from endoscopy.data.samples import (
    BatchDataset,
    BatchOrder,
    FrameLoader,
    LesionDataset,
    ObjectBalancedSampler,
    collate,
)
from endoscopy.data.streams import STREAMS, InputForm, normalize
from endoscopy.data.transforms import Pipeline, train_pipeline

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
    mask = batch["streams"]["rgb_mask"][:, 3:]
    assert torch.equal(mask == 1, depth < 7)


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
    away = A.Affine(translate_px={"x": 31, "y": 0}, scale=1.0, shear=0.0, p=1.0)
    reader = FrameReader(colon, SIZE)
    sample = LesionDataset(reader, Pipeline([away])).sample(3)
    np.testing.assert_array_equal(sample.frame.image, reader.read(3).image)
    near = A.Affine(translate_px={"x": 1, "y": 0}, scale=1.0, shear=0.0, p=1.0)
    moved = LesionDataset(reader, Pipeline([near])).sample(3).frame
    assert moved.box[0] == pytest.approx(reader.box(3)[0] + 1, abs=1e-3)


def test_mixed_pixels_and_masks_join_in_a_batch(colon):
    """A frame that was given back unmoved is uint8 among floats, and one may lack its mask."""
    data = frames(colon)
    plain = data[3]
    as_float = plain.frame._replace(image=plain.frame.image.astype(np.float32) / 255, mask=None)
    batch = collate([plain, plain._replace(frame=as_float)], FORM)["streams"]["rgb_mask"]
    torch.testing.assert_close(batch[0, :3], batch[1, :3])
    assert batch[1, 3].any()


def test_a_missing_depth_is_named(colon):
    data = LesionDataset(FrameReader(colon, SIZE))
    with pytest.raises(GatesError, match="row 5 of the frame table has no depth"):
        collate([data[5]], FORM._replace(streams=("depth",)))
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
    for epoch in (0, 1):
        alone.sampler.set_epoch(epoch)
        helped.sampler.set_epoch(epoch)
        for found, expected in zip(helped, alone, strict=True):
            same(found, expected)
            assert helped.state_dict() == alone.state_dict()
    helped.load_state_dict({"position": 3})
    alone.load_state_dict({"position": 3})
    for found, expected in zip(helped, alone, strict=True):
        same(found, expected)


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


def test_wrong_numbers_are_refused(colon):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        BatchOrder(ObjectBalancedSampler([1]), 0)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        FrameReader(colon, 0)


def test_a_reader_scales_boxes_and_leaves_the_table_alone(make_table):
    table = make_table({"a": 5})
    assert FrameReader(table, 32).box(0) == pytest.approx((5, 10 / 3, 15, 50 / 3))
    assert table.frames.loc[0, ["bbox_xmin", "bbox_ymax"]].tolist() == [10, 25]
