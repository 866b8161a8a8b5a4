import csv
from importlib.resources import files

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from core_gates.errors import GatesError
from endoscopy.data.frame_cache import FrameStore
from endoscopy.data.frame_table import FrameTable
from endoscopy.data.object_splits import (
    Folds,
    Split,
    audit5,
    check_leakage,
    make_folds,
    official_hag6,
    read_folds,
    split_by_counts,
)
from endoscopy.data.readers.tabular import read_frame_table
from endoscopy.data.sizing_datamodule import PolypSizingDataModule
from endoscopy.metrics.classification import TRUTH
from endoscopy.renderer.scene import RendererConfig

COUNTS = {  # objects of each fold: diminutive, small, large (figures of arXiv 2407.04400)
    0: (29, 5, 5), 1: (30, 6, 3), 2: (30, 6, 3), 3: (30, 5, 4), 4: (29, 6, 3), 5: (29, 4, 5),
}  # fmt: skip
FRAMES = {
    0: (47006, 9521, 6287), 1: (49684, 11962, 24241), 2: (44602, 6080, 1080),
    3: (54653, 903, 6597), 4: (49188, 1313, 1188), 5: (51776, 4671, 1776),
}  # fmt: skip


def shared_patients(folds, table):
    """The patients whose objects are in more than one fold."""
    fold = table.objects["unique_id"].map(folds.assignment)
    counts = fold.groupby(table.objects["patient"]).nunique()
    return sorted(counts.index[counts > 1])


def official(path, *, frames=False, counts=COUNTS):
    """Write a split file that has the published counts, one row per object or per frame."""
    rows, number = [], 0
    for fold, classes in counts.items():
        for group, objects, total in zip(
            ("Dim", "Small", "Large"), classes, FRAMES[fold], strict=True
        ):
            for k in range(objects):
                number += 1
                repeats = (total // objects + (k < total % objects)) if frames else 1
                rows += [(f"{number:03d}-001_1", group, fold)] * repeats
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([("unique_id", "gt_group", "kfold_id"), *rows])
    return path


def test_a_golden_split_is_made_exactly(golden, make_table):
    expected = pd.read_csv(golden / "kfold_objects_s91.csv", dtype={"unique_id": str})
    shuffled = expected.sample(frac=1, random_state=3)
    table = make_table(dict(zip(shuffled["unique_id"], shuffled["gt"], strict=True)), frames=2)
    folds = make_folds(table, 6, level="object", seed=1)
    assert dict(folds.assignment) == dict(
        zip(expected["unique_id"], expected["kfold_id"], strict=True)
    )
    assert not folds.official
    assert "official" not in folds.name
    assert dict(make_folds(table, 6, level="object", seed=2).assignment) != dict(folds.assignment)


def test_the_official_split_is_verified_by_objects(tmp_path):
    folds = official_hag6(official(tmp_path / "a.csv"))
    assert folds.official
    assert len(folds.assignment) == 232
    assert folds.notes[0] == "verified: 232 objects in the 18 published counts of fold and class"
    assert folds.notes[1].startswith("not verified: frames")


def test_the_official_split_is_verified_by_frames(tmp_path):
    folds = official_hag6(official(tmp_path / "a.csv", frames=True))
    assert "372528 frames agree with the figure within 100" in folds.notes[1]


@pytest.mark.parametrize("fold", range(6))
def test_a_moved_object_is_not_the_official_split(fold, tmp_path, refused):
    counts = dict(COUNTS)
    counts[fold] = (counts[fold][0] - 1, counts[fold][1] + 1, counts[fold][2])
    path = official(tmp_path / "a.csv", counts=counts)
    refused(f"not the official split: fold {fold} has", official_hag6, path)
    mine = read_folds(path)
    assert not mine.official
    assert mine.num_folds == 6


def test_too_few_frames_are_not_the_official_split(tmp_path, refused):
    path = official(tmp_path / "a.csv", frames=True)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:1], *lines[1501:]]))
    refused("diminutive frames, expected about 47006", official_hag6, path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("unique_id,kfold_id\na,0\n", "lacks the columns gt_group"),
        ("unique_id,gt_group,kfold_id\na,Dim,\n", "kfold_id '' is no fold; correct row 0"),
        ("unique_id,gt_group,kfold_id\na,Dim,0\nb,Dim,1.5\n", "kfold_id '1.5' is no fold"),
        ("unique_id,gt_group,kfold_id\na,Dim,-1\n", "kfold_id '-1' is no fold"),
        ("unique_id,gt_group,kfold_id\na,Dim,0\na,Small,0\n", "object a is in two size classes"),
    ],
)
def test_faulty_split_files_are_refused(text, words, tmp_path, refused):
    (tmp_path / "a.csv").write_text(text)
    refused(words, official_hag6, tmp_path / "a.csv")


@pytest.fixture
def public(make_table):
    """All SUN cases and lesions of three REAL-Colon videos, two of them in one video."""
    facts = pd.read_csv("endoscopy/data/assets/sun_objects.csv", dtype={"case": str})
    sun = make_table(dict(zip(facts["case"], facts["size_mm"], strict=True)), frames=1)
    colon = make_table({"001-001_1": 8, "001-001_2": 3, "001-003_1": 4, "009-009_1": 2}, frames=2)
    frames = pd.concat(
        [
            sun.frames.assign(database="SUN"),
            colon.frames.assign(
                database="REALC", patient=colon.frames["unique_id"].str.partition("_")[0]
            ),
        ],
        ignore_index=True,
    )
    return FrameTable(frames)


def test_the_audit_split_is_at_patient_level(public):
    folds = audit5(public)
    assert folds.level == "patient"
    assert folds.assignment["001-001_1"] == folds.assignment["001-001_2"] == 0
    assert folds.assignment["001-003_1"] == 3
    assert folds.assignment["1"] == 3  # of SUN
    assert folds.unassigned(public) == ["009-009_1"]
    for fold in range(5):
        split = folds.split(public, fold)
        of = np.array([folds.assignment.get(n, -1) for n in public.frames["unique_id"]])
        assert (set(of[split.test]), set(of[split.validation])) == ({fold}, {(fold + 1) % 5})
        assert set(of[split.train]) == set(range(5)) - {fold, (fold + 1) % 5}
        assert sum(map(len, split)) == len(public) - 2
        assert not shared_patients(folds, public)


def test_the_audit_split_says_that_counts_disagree(public):
    notes = "; ".join(audit5(public).notes)
    assert "147 polyps of at most 5 mm and 85 above" in notes
    assert "177 and 55; this table has 63 and 41" in notes
    assert "1 objects are in no fold" in notes
    assert "other side" not in notes  # its labels agree with the sizes of SUN
    wrong = FrameTable(
        public.frames.assign(gt=public.frames["gt"].where(public.frames["unique_id"] != "1", 2.0))
    )
    assert "1 SUN cases are on the other side of 5 mm" in "; ".join(audit5(wrong).notes)


def test_the_audit_split_does_not_cover_rendered_data(make_table, refused):
    refused("covers REAL-Colon and SUN, found SYNTH", audit5, make_table({"1": 4, "2": 6}))


def test_patient_folds_keep_patients_whole_and_classes_even(make_table):
    rng = np.random.default_rng(0)
    sizes = {f"{k:03d}-001_{n}": float(rng.uniform(2, 15)) for k in range(60) for n in (1, 2)}
    table = make_table(sizes, frames=1, patients={name: name.partition("_")[0] for name in sizes})
    folds = make_folds(table, 5, "patient", seed=4)
    assert shared_patients(folds, table) == []
    assert shared_patients(make_folds(table, 5, "object"), table) != []
    largest = table.frames.groupby("patient")["gt"].max()
    fold = {name.partition("_")[0]: number for name, number in folds.assignment.items()}
    counts = np.zeros((5, 3))
    for patient, mm in largest.items():
        counts[fold[patient], TRUTH.classes(mm)] += 1
    assert counts.sum(1).tolist() == [12] * 5
    assert np.ptp(counts, axis=0).max() <= 1


def test_scarce_classes_are_noted_and_impossible_folds_refused(make_table, refused):
    table = make_table({f"{k}": 3 if k < 9 else 12 for k in range(10)}, frames=1)
    assert "only 1 patients are large, so some folds have none" in make_folds(table, 3).notes
    refused("10 patients cannot make 11 folds", make_folds, table, 11)
    few = make_table({f"{k}": [3, 7, 12][k % 3] for k in range(6)}, frames=1)
    refused("cannot be stratified into 4 folds", make_folds, few, 4)


def test_leaks_are_refused(make_table, refuses, refused):
    table = make_table({"a": 3, "b": 4, "c": 8, "d": 9}, frames=2, patients={"a": "p", "b": "p"})
    parts = {
        name: np.array(rows)
        for name, rows in {"train": [0, 1], "validation": [4, 5], "test": [6, 7]}.items()
    }
    check_leakage(table, Split(**parts))
    refuses(
        GatesError,
        (
            "object a is in the train and the test part",
            lambda: check_leakage(table, Split(**parts | {"test": np.array([1, 6])})),
        ),
        (
            "patient p is in the train and the calibration part",
            lambda: check_leakage(table, Split(**parts, calibration=np.array([2]))),
        ),
    )
    check_leakage(table, Split(**parts, calibration=np.array([2])), level="object")
    refused(
        "the validation part of the split is empty",
        check_leakage,
        table,
        Split(**parts | {"validation": np.array([], int)}),
    )
    same = FrameTable(table.frames.assign(frame_path="one.jpg"))
    refused(r"frame one\.jpg is in the train and", check_leakage, same, Split(**parts))


def test_object_folds_that_divide_a_patient_are_refused_at_patient_level(make_table, refused):
    table = make_table({"a": 3, "b": 4, "c": 8}, patients={"a": "p", "b": "p", "c": "q"})
    assignment = {"a": 0, "b": 1, "c": 2}
    objects = Folds("mine", 3, assignment, "object")
    assert (len(objects.split(table, 0).test), shared_patients(objects, table)) == (3, ["p"])
    for words, folds, fold in (
        ("patient p is in the validation and the test", Folds("mine", 3, assignment, "patient"), 0),
        ("choose one of 0 to 2", objects, 3),
        ("assigns none of the 3 objects", Folds("mine", 3, {"z": 0}, "object"), 0),
    ):
        refused(words, folds.split, table, fold)


@settings(max_examples=25)
@given(st.integers(0, 5), st.integers(1, 20), st.integers(1, 8), st.integers(0, 6))
def test_parts_have_the_counts_asked_and_nest(make_table, seed, train, other, calibration):
    table = make_table({f"{k}": 3 for k in range(45)}, frames=2)
    split = split_by_counts(table, train, other, other, calibration, seed=seed)
    objects = [set(table.object_codes[rows]) for rows in split]
    assert [len(found) for found in objects] == [train, other, other, calibration]
    assert len(set.union(*objects)) == train + 2 * other + calibration
    assert [len(rows) for rows in split] == [2 * len(found) for found in objects]
    larger = split_by_counts(table, train + 3, other, other, calibration, seed=seed)
    np.testing.assert_array_equal(larger.test, split.test)
    assert objects[0] < set(table.object_codes[larger.train])


def test_random_parts_keep_patients_whole(make_table, refused):
    names = [f"{k:02d}_{n}" for k in range(20) for n in range(2)]
    table = make_table(dict.fromkeys(names, 3), patients={n: n[:2] for n in names})
    check_leakage(table, split_by_counts(table, 20, 6, 8, 4, seed=1), "patient")
    for words, counts in (
        ("the test part lacks 1 objects, since patients are kept", (20, 6, 7, 4)),
        ("40 objects cannot give 50 for training", (50, 6, 8)),
        ("the validation part of the split is empty", (20, 0, 8)),
    ):
        refused(words, split_by_counts, table, *counts)


def test_a_table_without_patients_keeps_lesions_of_a_video_together(tmp_path, make_table):
    ids = [f"{video:03d}-001_{lesion}" for video in range(1, 21) for lesion in (1, 2)]
    sizes = {name: 3.0 + 5 * (number % 3) for number, name in enumerate([*ids, "7"])}
    frames = make_table(sizes, frames=1, database="REALC").frames
    frames.loc[frames["unique_id"] == "7", "database"] = "SUN"
    path = tmp_path / "frames.csv"
    frames.drop(columns="patient").to_csv(path, index=False)
    table, _ = read_frame_table(path, check_images=False)
    assert table.patients[:4].tolist() == ["001-001", "001-001", "002-001", "002-001"]
    assert table.patients[-1] == "7"
    folds = make_folds(table, 5, level="patient").assignment
    assert all(folds[one] == folds[other] for one, other in zip(ids[::2], ids[1::2], strict=True))
    frames.assign(patient="").to_csv(path, index=False)
    again, _ = read_frame_table(path, check_images=False)
    assert again.patients.tolist() == table.patients.tolist()


@pytest.mark.fault("endoscopy B7")
def test_a_configuration_is_the_experiment_of_the_paper(tmp_path):
    found = yaml.safe_load((files("apps.endoscopy") / "configs" / "hag6.yaml").read_text())
    arguments = found["data"] | {"split_file": str(official(tmp_path / "a.csv"))}
    data = PolypSizingDataModule(**arguments)
    assert set(data.sources) == {"sun", "real_colon"}
    assert (data.split_kind, data.streams) == ("hag6", ("crop",))
    assert found["model"]["model"]["init_args"]["streams"] == ["crop"]
    assert found["evaluate"]["folds"] == list(range(official_hag6(data.split_file).num_folds))


SIZES = {f"{case}_{i}": 3.0 * i + 1 for case in range(9) for i in range(3)}


@pytest.fixture
def table(make_table):
    return make_table(SIZES, frames=1, patients={name: name.partition("_")[0] for name in SIZES})


def split_file(folder):
    """Every object in one of three folds."""
    lines = "".join(f"{n},{i % 3}\n" for i, n in enumerate(SIZES))
    (folder / "folds.csv").write_text("unique_id,kfold_id\n" + lines)
    return folder / "folds.csv"


def data(split="counts", **options):
    return PolypSizingDataModule(synthetic="nowhere", split=split, **options)


def parted(table):
    made = data()
    made.frame_table, made.parts = table, split_by_counts(table, 15, 6, 6)
    return made


@pytest.mark.fault("faults 2")
@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (lambda t, _: make_folds(t, 3, level="patients"), "level is 'patients'; choose one of obj"),
        (lambda _, f: read_folds(split_file(f), "patients"), "level is 'patients'"),
        (lambda *_: Folds("mine", 3, {}, "Patient"), "level is 'Patient'"),
        (lambda t, _: check_leakage(t, parted(t).parts, "patients"), "level is 'patients'"),
        (lambda *_: data(split="audit"), "split is 'audit'; choose one of "),
        (lambda *_: data(level="patients"), "level is 'patients'; choose one of "),
        (lambda *_: data(sampler="objects"), "sampler is 'objects'; choose one of "),
        (lambda *_: data(augmentation="dihedrals"), "augmentation is 'dihedrals'; choose one of "),
        (lambda *_: data(cache_form="jpg"), "cache_form is 'jpg'; choose one of "),
        (lambda t, _: parted(t).rows("tests"), "part is 'tests'; choose one of train, validation"),
        (lambda _, f: FrameStore(f, 1, 8, "jpg"), "form is 'jpg'; choose one of raw, jpeg"),
        (lambda *_: RendererConfig(exposure="fix"), "exposure is 'fix'; choose one of "),
        (lambda *_: RendererConfig(frequencies="fix"), "frequencies is 'fix'; choose one of "),
        (lambda *_: RendererConfig(brand="fix"), "brand is 'fix'; choose one of "),
        (lambda *_: RendererConfig(depth="fix"), "depth is 'fix'; choose one of "),
    ],
)
def test_a_slip_in_a_level_or_name_is_refused(table, tmp_path, refused, words):
    """In a level it would switch off the protection of patients."""
    with pytest.raises(ValueError, match=words):
        refused(table, tmp_path)
