"""Data and networks from settings: what a worker needs to begin in another process."""

import polars as pl
import pytest
import torch

from core_gates.errors import GatesError
from recsys.experiments import building
from recsys.experiments.building import data_of, module_of, source_of

SOURCE = {
    "data.source.class_path": "recsys.data.readers.own_table.OwnTable",
    "data.source.init_args.labels": ["y"],
    "data.source.init_args.split": "row",
}


@pytest.fixture
def settings(tmp_path):
    rows = {"c": [n % 7 for n in range(200)], "y": [n % 3 == 0 for n in range(200)]}
    pl.DataFrame(rows).write_csv(tmp_path / "t.csv")
    return {**SOURCE, "data.source.init_args.path": str(tmp_path / "t.csv")}


def test_a_source_has_its_arguments(settings):
    found = source_of({**settings, "data.batch_size": 8, "model.net": "HoME"})
    assert found.labels == ["y"]
    assert found.split == "row"
    assert len(found.read().train) > 100


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"class_path": "recsys.data.readers.own_table.OwnTabel"}, "has no attribute 'OwnTabel'"),
        ({"class_path": "recsys.data.reader.OwnTable"}, "No module named 'recsys.data.reader'"),
        ({"class_path": "OwnTable"}, "class_path is OwnTable, expected a class with its package"),
        ({"init_args.path_": "x"}, "unexpected keyword argument 'path_'"),
        ({"init_args.split": "tme"}, "split is 'tme'.*time, user, row"),
        ({"init_args.labels": []}, "name the labels"),
    ],
)
def test_a_wrong_class_or_argument_is_one_line(settings, change, words):
    wrong = {**settings, **{f"data.source.{name}": value for name, value in change.items()}}
    with pytest.raises(GatesError, match=words) as caught:
        source_of(wrong)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("data.source")


def test_no_source_is_one_line():
    with pytest.raises(GatesError, match=r"data\.source\.class_path is missing"):
        source_of({"data.batch_size": 8})


def test_tables_are_read_once_in_a_process(settings, monkeypatch):
    reads = []

    def counted(given):
        reads.append(given)
        return source_of(given)

    monkeypatch.setattr(building, "source_of", counted)
    building._read.cache_clear()
    one = data_of({**settings, "data.batch_size": 16})
    two = data_of({**settings, "data.batch_size": 32, "model.net": "MMoE"}, seed=3)
    assert one.tables is two.tables
    assert len(reads) == 1
    other = data_of({**settings, "data.source.init_args.test": 0.2})
    assert other.tables is not one.tables
    assert len(reads) == 2
    assert (one.batch_size, two.batch_size) == (16, 32)
    assert (one.seed, two.seed) == (0, 3)


def test_the_seed_of_a_piece_orders_its_rows(settings):
    """Not that of the configuration, which every piece shares."""
    given = {**settings, "data.seed": 5, "data.batch_size": 16}
    batches = [next(iter(data_of(given, seed).train_dataloader())) for seed in (0, 0, 1)]
    assert torch.equal(batches[0].sparse, batches[1].sparse)
    assert not torch.equal(batches[0].sparse, batches[2].sparse)


@pytest.mark.parametrize(
    "options",
    [
        {"model.options": {"dim": 4, "tower_dims": [3]}},
        {"model.options.dim": 4, "model.options.tower_dims": [3]},
    ],
)
def test_options_of_a_network_may_be_nested_or_dotted(settings, options):
    module = module_of({"model.net": "MMoE", "model.learning_rate": 0.5, **options, **settings})
    assert module.options == {"dim": 4, "tower_dims": [3]}
    assert module.learning_rate == 0.5
    ranker = module.build(data_of(settings).transform)
    assert ranker.spec.name == "MMoE"
    assert {"dim": 4}.items() <= ranker.spec.options.items()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"model.nett": "MMoE"}, "model: .*unexpected keyword argument 'nett'"),
        ({"data.batchsize": 3}, "data: .*unexpected keyword argument 'batchsize'"),
        ({"data.batch_size": 0}, "data: batch_size must be at least 1"),
    ],
)
def test_unknown_settings_are_one_line(settings, wrong, words):
    given = {**settings, **wrong}
    with pytest.raises(GatesError, match=words) as caught:
        module_of(given) if "model" in words else data_of(given)
    assert "\n" not in str(caught.value)
