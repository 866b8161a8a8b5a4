"""Options of few values: a slip is refused, never taken for one of them."""

import pytest

from endoscopy.data.frame_cache import FrameReader, FrameStore
from endoscopy.data.object_splits import (
    Folds,
    check_leakage,
    make_folds,
    read_folds,
    split_by_counts,
)
from endoscopy.data.sizing_datamodule import PolypSizingDataModule
from endoscopy.renderer.scene import RendererConfig

SIZES = {f"{case}_{i}": 3.0 * i + 1 for case in range(9) for i in range(3)}


@pytest.fixture
def table(make_table):
    patients = {name: name.partition("_")[0] for name in SIZES}
    return make_table(SIZES, frames=1, patients=patients)


@pytest.mark.fault("faults 2")
def test_a_slip_in_the_level_does_not_switch_off_the_protection_of_patients(table, tmp_path):
    with pytest.raises(ValueError, match=r"level is 'patients'; choose one of object, patient"):
        make_folds(table, 3, level="patients")
    folds = tmp_path / "folds.csv"
    folds.write_text(
        "unique_id,kfold_id\n" + "".join(f"{n},{i % 3}\n" for i, n in enumerate(SIZES))
    )
    with pytest.raises(ValueError, match="level is 'patients'"):
        read_folds(folds, "patients")
    with pytest.raises(ValueError, match="level is 'Patient'"):
        Folds("mine", 3, {}, "Patient")
    split = split_by_counts(table, 15, 6, 6)
    with pytest.raises(ValueError, match="level is 'patients'"):
        check_leakage(table, split, "patients")


@pytest.mark.fault("faults 2")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("split", "audit"),
        ("level", "patients"),
        ("sampler", "objects"),
        ("augmentation", "dihedrals"),
        ("cache_form", "jpg"),
    ],
)
def test_the_data_refuse_an_unknown_value(name, value):
    with pytest.raises(ValueError, match=f"{name} is '{value}'; choose one of "):
        PolypSizingDataModule(synthetic="nowhere", **{name: value})


@pytest.mark.fault("faults 2")
def test_a_part_that_does_not_exist_is_refused(table):
    data = PolypSizingDataModule(synthetic="nowhere", split="counts")
    data.frame_table, data.parts = table, split_by_counts(table, 15, 6, 6)
    with pytest.raises(ValueError, match=r"part is 'tests'; choose one of train, validation, test"):
        data.rows("tests")


@pytest.mark.fault("faults 2")
def test_stores_and_renderers_refuse_an_unknown_value(tmp_path):
    with pytest.raises(ValueError, match=r"form is 'jpg'; choose one of raw, jpeg"):
        FrameStore(tmp_path, 1, 8, "jpg")
    for name in ("exposure", "frequencies", "brand", "depth"):
        with pytest.raises(ValueError, match=f"{name} is 'fix'; choose one of "):
            RendererConfig(**{name: "fix"})


def test_what_is_spelt_right_is_taken(table, tmp_path):
    assert make_folds(table, 3, level="patient").level == "patient"
    assert FrameStore(tmp_path, 1, 8, "jpeg").form == "jpeg"
    assert FrameReader(table, 8).size == 8
