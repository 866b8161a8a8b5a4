import numpy as np
import pandas as pd
import pytest

from core_gates.errors import GatesError
from endoscopy.data.readers.hyperkvasir import read_hyperkvasir


@pytest.fixture(scope="module")
def table():
    return pd.DataFrame(
        {
            "file-name": [f"{k:05d}.jpg" for k in range(10_662)],
            "class-name": [f"class-{k % 23:02d}" for k in range(10_662)],
            "split2": [k // 23 % 2 for k in range(10_662)],
            "split5": [k // 23 % 5 for k in range(10_662)],
        }
    )


@pytest.fixture(scope="module")
def images(table, tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for name in set(table["class-name"]):
        (root / name).mkdir()
    for name, label in zip(table["file-name"], table["class-name"], strict=True):
        (root / label / name).touch()
    return root


def test_a_fold_holds_its_images_and_labels(table, images, tmp_path):
    table.sample(frac=1, random_state=0).to_csv(tmp_path / "a.csv", index=False)
    found, report = read_hyperkvasir(tmp_path / "a.csv", images, fold=3)
    assert report.findings == {}
    expected = table.set_index("file-name")
    assert {p.name for p in found.test} == set(table.loc[table["split5"] == 3, "file-name"])
    assert {p.name for p in found.train} == set(table.loc[table["split5"] != 3, "file-name"])
    for paths, labels in ((found.train, found.train_labels), (found.test, found.test_labels)):
        names = [found.classes[label] for label in labels]
        assert names == [path.parent.name for path in paths]
        assert names == expected.loc[[path.name for path in paths], "class-name"].tolist()
    two, _ = read_hyperkvasir(tmp_path / "a.csv", images, fold=1, folds=2)
    assert len(two.test) == (table["split2"] == 1).sum()


def test_other_lists_and_absent_images_are_refused(table, images, tmp_path):
    path = tmp_path / "a.csv"
    table[1:].to_csv(path, index=False)
    with pytest.raises(GatesError, match="lists 10661 images of 23 classes in 10661 rows, expect"):
        read_hyperkvasir(path, images, 0)
    table.assign(**{"file-name": ["00000.jpg", *table["file-name"][:-1]]}).to_csv(path)
    with pytest.raises(GatesError, match="lists 10661 images of 23 classes in 10662 rows"):
        read_hyperkvasir(path, images, 0)
    table.drop(columns="split5").to_csv(path)
    with pytest.raises(GatesError, match="lacks the columns split5"):
        read_hyperkvasir(path, images, 0)
    table.to_csv(path)
    with pytest.raises(GatesError, match="fold 5: choose one of 0 to 4"):
        read_hyperkvasir(path, images, 5)
    with pytest.raises(GatesError, match="10662 of 10662 files cannot be read"):
        read_hyperkvasir(path, tmp_path, 0)


def test_an_absent_image_is_counted(table, images, tmp_path):
    table.to_csv(tmp_path / "a.csv")
    absent = next((images / "class-04").iterdir())
    absent.rename(absent.with_suffix(".gone"))
    found, report = read_hyperkvasir(tmp_path / "a.csv", images, 0)
    assert report.count("image is absent") == 1
    assert len(found.train) + len(found.test) == report.found - 1 == 10_661
    absent.with_suffix(".gone").rename(absent)


def test_the_published_list_is_accepted(shared, tmp_path):
    splits = shared / "hyperkvasir_official_splits.parquet"
    names = pd.read_parquet(splits)["file-name"]
    for name in names:
        (tmp_path / name).touch()
    found, report = read_hyperkvasir(splits, tmp_path, 4)
    assert report.findings == {}
    assert len(found.test) == 2174
    assert np.bincount(found.test_labels, minlength=23).min() > 0
