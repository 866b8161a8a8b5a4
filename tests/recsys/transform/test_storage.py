import datetime
import json

import polars as pl
import pytest

from core_gates.errors import GatesError
from recsys.schema import FeatureSchema, Sparse, Task
from recsys.transform import FeatureTransform


@pytest.fixture
def folder(schema, table, tmp_path):
    return FeatureTransform(schema).fit(table).save(tmp_path / "transform")


def test_saved_and_loaded(schema, table, folder):
    made, loaded = FeatureTransform(schema).fit(table), FeatureTransform.load(folder)
    assert loaded.schema == schema
    assert loaded.fitted == made.fitted
    assert loaded.sizes == made.sizes
    one, other = made.encode(table), loaded.encode(table)
    assert (one.sparse == other.sparse).all()
    assert (one.dense == other.dense).all()
    assert (one.sequences[0] == other.sequences[0]).all()
    grown = loaded.grow(table)
    assert grown.fitted.rows == 12


def test_equal_transforms_make_equal_files(schema, table, folder, tmp_path):
    other = FeatureTransform.load(folder).save(tmp_path / "other")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["transform.json", "vocabulary_000.parquet", "vocabulary_001.parquet"]
    for name in names:
        assert (folder / name).read_bytes() == (other / name).read_bytes()


def test_saving_again_replaces_the_folder(schema, table, folder):
    small = FeatureSchema(tasks=(Task("bought"),), sparse=(Sparse("shop"),))
    FeatureTransform(small).fit(table).save(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "transform.json",
        "vocabulary_000.parquet",
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["transform"]


def test_dates_of_the_training_rows_are_kept(tmp_path):
    schema = FeatureSchema(tasks=(Task("y"),), sparse=(Sparse("c"),), time="at")
    days = [datetime.date(2022, 4, 9), datetime.date(2022, 4, 8)]
    made = FeatureTransform(schema).fit(pl.DataFrame({"c": [1, 2], "at": days}))
    assert tuple(made.fitted) == (2, "2022-04-08", "2022-04-09")
    loaded = FeatureTransform.load(made.save(tmp_path / "t"))
    later = pl.DataFrame({"c": [3], "at": [datetime.date(2022, 4, 10)]})
    assert tuple(loaded.grow(later).fitted) == (3, "2022-04-08", "2022-04-10")
    with pytest.raises(GatesError, match="the time column holds 5 after '2022-04-08'"):
        loaded.grow(pl.DataFrame({"c": [3], "at": [5]}))


def _text(change):
    def apply(folder):
        path = folder / "transform.json"
        path.write_text(change(path.read_text()))

    return apply


def _json(change):
    def edit(text):
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return _text(edit)


FAULTS = {
    "no folder": (lambda f: [p.unlink() for p in f.iterdir()], "No such file"),
    "cut off": (_text(lambda text: text[:100]), "holds no transform"),
    "a list": (_text(lambda text: "[1, 2]"), "holds no transform"),
    "another program's": (_text(lambda text: '{"model": 3}'), "holds no transform of features"),
    "a later version's": (_json(lambda c: c.update(format=99)), "its format is 99"),
    "no table": (_json(lambda c: c["tables"].pop("book")), "lacks the table 'book'"),
    "another vocabulary": (
        lambda f: (f / "vocabulary_000.parquet").replace(f / "vocabulary_001.parquet"),
        "vocabulary_000.parquet is no vocabulary",
    ),
    "a longer vocabulary": (
        _json(lambda c: c["tables"]["book"].update(rows=9)),
        "vocabulary_001.parquet has 4 rows, not 9",
    ),
    "an unknown setting": (_json(lambda c: c["schema"].update(shape=2)), "not known"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_foreign_folders_are_refused(case, folder):
    change, words = FAULTS[case]
    change(folder)
    with pytest.raises(GatesError, match=words) as caught:
        FeatureTransform.load(folder)
    assert "\n" not in str(caught.value)
