import polars as pl
import pytest
from polars.testing import assert_frame_equal

from core_gates.errors import GatesError
from recsys.data.datamodule import TableDataModule
from video_multitask.feed import add_labels
from video_multitask.history import UserHistory, add_history
from video_multitask.kuairand.folder import KuaiRand
from video_multitask.kuairand.prepare import prepare
from video_multitask.simulator.log import export_kuairand
from video_multitask.sources.kuairand import KuaiRandStream, KuaiRandTables
from video_multitask.stream.parquet_stream import load_stored, store

KEYS = ["time_ms", "user_id", "video_id"]
PAST = {"history": 4, "means": ("is_click", "long_view")}


@pytest.fixture(scope="module")
def prepared(release, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "shards"
    history = UserHistory(4, ("video_id",), PAST["means"])
    return prepare(KuaiRand(release), folder, history=history, row_group=512)


def read(path, split="standard", **options):
    return KuaiRandTables(str(path), split, **options).read()


@pytest.mark.parametrize(
    ("split", "days", "random"),
    [
        ("standard", ((20220408, 20220419), (20220420, 20220421), (20220422, 20220508)), (0, 0)),
        ("unbiased", ((20220408, 20220419), (20220420, 20220421), (20220422, 20220508)), (0, 1)),
        ("random_in", ((20220422, 20220428), (20220429, 20220501), (20220502, 20220508)), (1, 1)),
    ],
)
def test_parts_are_those_of_the_public_splits(feed, release, split, days, random):
    tables = read(release, split)
    shown = (random[0], random[0], random[1])
    for part, (first, last), chosen in zip(tables[2:5], days, shown, strict=True):
        rows = feed.log.filter(pl.col("date").is_between(first, last), pl.col("is_rand") == chosen)
        assert len(part) == len(rows) > 0
        assert_frame_equal(part.select(KEYS).sort(KEYS), rows.select(KEYS).sort(KEYS))
    assert f"KuaiRand-simulated, split {split}" in tables.notes[0]
    assert [t.category for t in tables.schema.tasks] == ["watch"] * 3 + ["inter"] * 6 + ["neg"]


def test_rows_have_labels_sides_and_context(feed, release):
    test = read(release).test
    joined = test.join(feed.log.select(*KEYS, watched="complete", hm="hourmin"), on=KEYS)
    assert len(joined) == len(test)
    assert joined["complete"].equals(joined["watched"].cast(joined["complete"].dtype))
    assert (joined["hour"] == joined["hm"] // 100).all()
    users = feed.users.select(pl.col("user_id").cast(pl.Int32), right="fans_user_num")
    assert (test.join(users, on="user_id", maintain_order="left")["right"]
            == test["fans_user_num"]).all()  # fmt: skip
    tags = feed.videos.select(pl.col("video_id").cast(pl.Int32), right="tag")
    first = test.join(tags, on="video_id", maintain_order="left")["right"].str.split(",").list[0]
    assert first.equals(test["first_tag"], null_equal=True)
    assert "user_active_degree_range" not in test.columns
    assert "play_time_ms" not in test.columns


def test_the_past_is_that_of_all_logs_before_the_row(feed, release):
    log = add_labels(feed.log.sort("time_ms", maintain_order=True))
    expected = add_history(log, 4, ("video_id",), PAST["means"])
    for split in ("standard", "unbiased"):
        tables = read(release, split, **PAST, encoder="target_attention")
        names = [*KEYS, "past_video_id", "past_mean_is_click", "past_mean_long_view", "past_count"]
        for part in (tables.train, tables.test):
            want = expected.join(part.select(KEYS), on=KEYS, how="semi").select(names)
            assert_frame_equal(part.select(names).sort(KEYS), want.sort(KEYS), check_dtypes=False)
        schema = tables.schema
        assert [(s.name, s.of, s.max_length, s.encoder) for s in schema.sequences] == [
            ("past_video_id", "video_id", 4, "target_attention")
        ]
        assert {"past_mean_is_click", "past_count"} <= {d.name for d in schema.dense}


def test_prepared_shards_give_the_same_rows(release, prepared):
    for split in ("standard", "unbiased"):
        raw, shards = (read(p, split, **PAST) for p in (release, prepared.folder))
        assert raw.schema == shards.schema
        for one, other in zip(raw[2:5], shards[2:5], strict=True):
            columns = sorted(set(other.columns) - {"past_video_id"})
            assert_frame_equal(
                one.select(columns).sort(KEYS), other.select(columns).sort(KEYS), check_dtypes=False
            )
    with pytest.raises(GatesError, match="lack the columns past_mean_is_like: prepare them again"):
        read(prepared.folder, means=("is_like",))


def test_counts_must_be_those_published(feed, tmp_path):
    folder = export_kuairand(feed, tmp_path / "pure", "pure")
    wrong = "expected 1,436,609 as published; get KuaiRand-pure again"
    with pytest.raises(GatesError, match=wrong):
        read(folder, strict=True)
    with pytest.warns(UserWarning, match="as published") as found:
        read(folder)
    assert len(found) == 2  # standard and random logs


def test_options_choose_tasks_and_ids(release, refuses):
    tables = read(release, tasks=("long_view", "hate"), ids=False, dim=3)
    assert tables.schema.task_names == ("long_view", "hate")
    assert not {"user_id", "video_id", "author_id"} & {s.name for s in tables.schema.sparse}
    assert tables.schema.dim == 3
    refuses(
        ValueError,
        ("task is 'likes'; choose one of", lambda: KuaiRandTables(str(release), tasks=("likes",))),
        ("split is 'random'; choose one of", lambda: KuaiRandTables(str(release), "random")),
    )


def test_a_stream_has_the_rows_of_the_tables(release, prepared):
    tables = read(release, "standard", **PAST)
    source = KuaiRandStream(str(prepared.folder), "standard", **PAST, scored=1.0)
    stream = source.stream(64, "given", 3, None)
    inside = TableDataModule(tables, 64)
    assert (stream.schema, stream.transform.sizes) == (inside.schema, inside.transform.sizes)
    for part in ("validation", "test"):
        rows = stream.table(part).sort(KEYS)
        assert_frame_equal(rows.select(KEYS), tables.part(part).select(KEYS).sort(KEYS))
        one, other = stream.batch(part), inside.batch(part)
        assert len(one) == len(other)
        assert (one.labels.sum(0) == other.labels.sum(0)).all()
        assert (one.mask.sum(0) == other.mask.sum(0)).all()
        assert one.sparse.sum() == other.sparse.sum()
    batches = list(stream.train_dataloader())
    assert {len(batch) for batch in batches} == {64}
    assert 0 <= len(tables.train) - 64 * len(batches) < 64


def test_some_users_are_scored_whole(prepared):
    stream = KuaiRandStream(str(prepared.folder), scored=0.3).stream(64, "shuffled", 0, None)
    rows = stream.table("test")
    every = KuaiRandStream(str(prepared.folder), scored=1.0).stream(64, "given", 0, None)
    whole = every.table("test")
    users = set(rows["user_id"])
    assert 0.15 < len(users) / whole["user_id"].n_unique() < 0.45
    assert len(rows) == whole["user_id"].is_in(list(users)).sum()
    assert set(stream.table("validation")["user_id"]) - users != users
    assert sum(map(len, stream.evaluation_loader("test"))) == len(rows) == len(stream.batch("test"))
    assert len(stream.table("train")) == stream.parts["train"].rows


def test_what_training_days_teach_is_kept_for_other_networks(prepared):
    first = KuaiRandStream(str(prepared.folder), dim=4).stream(64, "given", 0, None)
    train = first.parts["train"]
    assert load_stored(train, first.schema) is None
    assert store(train, first.transform).parent.name.startswith(".")
    other = KuaiRandStream(str(prepared.folder), dim=7, tasks=("long_view",), ids=True).stream(
        64, "given", 0, None
    )
    found = load_stored(train, other.schema)
    assert (found.schema, found.sizes) == (other.schema, first.transform.sizes)
    assert found.fitted == first.transform.fitted
    without = KuaiRandStream(str(prepared.folder), ids=False).stream(64, "given", 0, None)
    assert load_stored(train, without.schema) is None
    days = KuaiRandStream(str(prepared.folder), "random_in").stream(64, "given", 0, None)
    assert load_stored(days.parts["train"], days.schema) is None


def test_nothing_is_read_before_it_is_needed():
    stream = KuaiRandStream("does/not/exist").stream(64, "given", 0, None)
    with pytest.raises(GatesError, match=r"does/not/exist has no manifest.json"):
        _ = stream.transform
    with pytest.raises(ValueError, match=r"scored is 0.0; give a fraction"):
        KuaiRandStream("x", scored=0.0).stream(64, "given", 0, None)
