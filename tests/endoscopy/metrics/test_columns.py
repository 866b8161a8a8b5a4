"""Columns with gaps: who depends on whom, and which sizes are lower bounds."""

import numpy as np
import pandas as pd
import pytest

from core_gates.errors import GatesError
from endoscopy.data.frame_table import FrameTable, concatenate
from endoscopy.evaluation.size_scores import score_intervals, size_scores
from endoscopy.metrics import patients_of, object_table, patient_table


def objects(patients, error=1.0):
    count = len(patients)
    gt = np.linspace(2, 20, count)
    return pd.DataFrame(
        {
            "unique_id": [f"o{i}" for i in range(count)],
            "gt": gt,
            "predicted_mm": gt + error * np.linspace(-1, 1, count),
            "patient": patients,
        }
    )


@pytest.mark.fault("faults 1")
@pytest.mark.parametrize("unknown", ["", None, float("nan"), "  "])
def test_a_polyp_without_a_patient_is_its_own_patient(unknown):
    table = objects(["p1", "p1", unknown, unknown, unknown])
    clusters = patients_of(table)
    assert clusters[0] == clusters[1]
    assert len(set(clusters)) == 4
    patients = patient_table(table)
    assert len(patients) == 4
    assert patients["num_objects"].tolist() == [2, 1, 1, 1]
    assert patients["gt"].tolist() == table["gt"].tolist()[1:]


@pytest.mark.fault("faults 1")
def test_an_own_patient_is_not_another_patient_of_that_name():
    table = objects(["o1", ""])
    assert len(set(patients_of(table))) == 2
    assert len(patient_table(table)) == 2


@pytest.mark.fault("faults 1")
def test_intervals_of_objects_without_patients_are_those_of_independent_objects():
    bare = objects([""] * 50)
    own = objects([f"p{i}" for i in range(50)])
    found, expected = (score_intervals(t, only=["mae_mm"], resamples=200) for t in (bare, own))
    assert found["mae_mm"].units == 50
    assert found["mae_mm"].low == pytest.approx(expected["mae_mm"].low, rel=0.2)
    assert np.isfinite(found["mae_mm"].low)


@pytest.mark.fault("faults 3")
def test_a_size_is_exact_where_nothing_says_that_it_is_a_lower_bound(make_table):
    plain = make_table({"a": 4.0, "b": 12.0})
    flagged = make_table({"c": 15.0, "d": 6.0}, censored=[True] * 3 + [False] * 3)
    joined = concatenate([plain, flagged])
    assert joined.censored.tolist() == [False] * 6 + [True] * 3 + [False] * 3
    frames = joined.frames.assign(predicted_mm=joined.frames["gt"] + 1.0)
    table = object_table(frames)
    assert table["censored"].tolist() == [False, False, True, False]
    weights = np.array([[1.0, 1.0, 0.0, 1.0]])
    assert size_scores(table)(weights)["mae_mm"][0] == pytest.approx(1.0)
    raw = table.assign(censored=[None, np.nan, True, False])
    assert size_scores(raw)(np.array([[1.0, 0, 0, 0]]))["mae_mm"][0] == pytest.approx(1.0)


@pytest.mark.fault("faults 3")
@pytest.mark.parametrize(
    ("written", "meant"),
    [("False", False), ("true", True), ("0", False), ("1.0", True), ("", False), (0.0, False)],
)
def test_flags_written_as_text_mean_what_they_say(written, meant, make_table):
    table = make_table({"a": 4.0}, censored=[written] * 3)
    assert table.censored.tolist() == [meant] * 3
    frames = table.frames.assign(predicted_mm=5.0)
    assert object_table(frames)["censored"].tolist() == [meant]


@pytest.mark.fault("faults 3")
def test_a_flag_that_says_neither_is_refused(make_table):
    table = make_table({"a": 4.0}, censored=["perhaps"] * 3)
    with pytest.raises(GatesError, match=r"censored is 'perhaps' in row 0: write true or false"):
        _ = FrameTable(table.frames).censored
