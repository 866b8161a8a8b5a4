import polars as pl
import pytest
from polars.testing import assert_frame_equal

from core_gates.errors import GatesError
from recsys.data.datamodule import TableDataModule, data_module
from video_multitask.sources.simulated import SimulatedFeed, SimulatedStream
from video_multitask.stream.loader import columns_of
from video_multitask.stream.parquet_stream import ParquetStream

SIZES = {"rows": 3000, "users": 60, "videos": 80, "days": 5, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream") / "feed"
    SimulatedStream(**SIZES, row_group=256).write(folder)
    return folder


def stream_of(folder, **options):
    return data_module(SimulatedStream(str(folder), **SIZES, row_group=256, **options), 128)


def test_shards_hold_the_feed(folder):
    tables = SimulatedFeed(**SIZES, validation_days=1, test_days=1).read()
    stream = stream_of(folder)
    assert isinstance(stream, ParquetStream)
    assert stream.schema == tables.schema
    wanted = columns_of(stream.schema)
    for part in ("train", "validation", "test"):
        rows = pl.concat(stream.parts[part].parts(wanted))
        assert_frame_equal(rows, tables.part(part).select(wanted), check_dtypes=False)
    assert stream.shards.rows == 3000
    assert {"play_time_ms", "is_rand"}.isdisjoint(stream.shards.columns)


def test_the_data_module_is_chosen_by_the_source(folder):
    feed = SimulatedFeed(**SIZES, validation_days=1, test_days=1)
    module = data_module(feed, 64, 512, "given", 7)
    assert type(module) is TableDataModule
    assert (module.batch_size, module.eval_batch_size, module.order, module.seed) == (
        64, 512, "given", 7,
    )  # fmt: skip
    source = SimulatedStream(str(folder), **SIZES, window=300, workers=1)
    stream = data_module(source, 64, order="given", seed=7)
    assert (stream.batch_size, stream.order, stream.seed) == (64, "time", 7)
    assert (stream.window, stream.workers) == (300, 1)
    assert data_module(source, order="shuffled").order == "shuffled"
    with pytest.raises(ValueError, match="order is 'random'; choose one of"):
        data_module(source, order="random")


def test_missing_shards_are_written_before_the_training(tmp_path, folder):
    stream = stream_of(tmp_path / "new")
    with pytest.raises(GatesError, match=r"has no manifest.json"):
        _ = stream.parts
    stream.prepare_data()
    assert stream.shards.files == stream_of(folder).shards.files
    before = (tmp_path / "new" / "manifest.json").stat().st_mtime_ns
    stream.prepare_data()
    assert (tmp_path / "new" / "manifest.json").stat().st_mtime_ns == before


def test_another_log_is_refused(tmp_path, folder, refuses):
    other = data_module(SimulatedStream(str(folder), **SIZES | {"seed": 4}))
    refuses(
        GatesError,
        (r'holds another log.*"seed": 3', lambda: other.prepare_data()),
        ("holds another log", lambda: other.transform),
    )
    (tmp_path / "notes.txt").touch()
    refuses(
        GatesError,
        ("exists and holds no shards", lambda: SimulatedStream(**SIZES).write(tmp_path)),
        (
            r"no folder of shards: name one by --data\.source",
            lambda: data_module(SimulatedStream(**SIZES)).transform,
        ),
    )
    with pytest.raises(ValueError, match="leave none of 5 to train on"):
        SimulatedStream(**SIZES, validation_days=4)
