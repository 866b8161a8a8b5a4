import numpy as np
import pandas as pd
import pytest

from core_gates.errors import GatesError
from endoscopy.data.frame_table import FrameTable, concatenate
from endoscopy.evaluation.size_scores import size_scores
from endoscopy.metrics import object_table, patient_table, patients_of


def frames(**columns):
    table = {
        "unique_id": ["b", "b", "b", "a", "a"],
        "patient": ["p", "p", "p", "p", "p"],
        "frame_id": [1, 2, 3, 1, 2],
        "gt": [4.0, 4.0, 4.0, 12.0, 12.0],
        "predicted_mm": [3.0, 5.0, 10.0, 11.0, 14.0],
    }
    return pd.DataFrame(table | columns)


def test_median_and_mean_over_frames():
    median = object_table(frames())
    assert median["unique_id"].tolist() == ["b", "a"]
    assert (median["predicted_mm"].tolist(), median["gt"].tolist()) == ([5.0, 12.5], [4.0, 12.0])
    assert median["num_frames"].tolist() == [3, 2]
    assert not median["abstained"].any()
    assert object_table(frames(), "mean")["predicted_mm"].tolist() == [6.0, 12.5]


def test_best_k_takes_the_sharpest_frames(refused):
    sharp = frames(sharpness=[0.1, 0.9, 0.8, 0.3, 0.7])
    assert object_table(sharp, "best_k", k=1)["predicted_mm"].tolist() == [5.0, 14.0]
    assert object_table(sharp, "best_k", k=2)["predicted_mm"].tolist() == [7.5, 12.5]
    refused("lack sharpness", object_table, frames(), "best_k")


def test_frames_that_abstain_do_not_count_unless_all_do():
    table = object_table(frames(reasons=["", "too near", "", "blurred", "blurred"]))
    assert (table["predicted_mm"].tolist(), table["num_frames"].tolist()) == ([6.5, 12.5], [2, 2])
    assert table["abstained"].tolist() == [False, True]
    assert table["reasons"].tolist() == ["", "blurred"]


def test_probabilities_and_other_columns():
    table = object_table(
        frames(
            p_diminutive=[0.2, 0.4, 0.9, 0.0, 0.1],
            shape=["flat", "flat", "sessile", None, None],
            distance_mm=[10.0, 12.0, 30.0, 8.0, 9.0],
            censored=[False, False, False, True, True],
        )
    )
    assert table["p_diminutive"].tolist() == pytest.approx([0.5, 0.05])
    assert table["shape"].iloc[0] == "flat"
    assert table["shape"].isna().iloc[1]
    assert table["distance_mm"].tolist() == [12.0, 8.5]
    assert (table["censored"].tolist(), table["patient"].tolist()) == ([False, True], ["p", "p"])


def test_a_patient_is_as_bad_as_the_worst_lesion():
    objects = object_table(frames(patient=["p", "p", "p", "q", "q"]))
    assert patient_table(objects)["gt"].tolist() == [4.0, 12.0]
    both = patient_table(object_table(frames()))
    assert both[["patient", "gt", "predicted_mm", "num_objects"]].to_numpy().tolist() == [
        ["p", 12.0, 12.5, 2]
    ]
    censored = frames(gt=[15.0] * 5, censored=[True] * 3 + [False] * 2)
    assert patient_table(object_table(censored))["censored"].tolist() == [True]


def test_clusters_are_patients_where_known():
    table = pd.DataFrame({"unique_id": ["a", "b", "c"], "patient": ["p", "p", None]})
    first, second, third = patients_of(table)
    assert first == second != third
    assert len(set(patients_of(table[["unique_id"]]))) == 3
    same_name = pd.DataFrame({"unique_id": ["a", "b"], "patient": ["b", None]})
    assert len(set(patients_of(same_name))) == 2


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (frames().drop(columns="gt"), "lack gt"),
        (frames().iloc[:0], "empty"),
        (frames(predicted_mm=[1.0, 2.0, np.nan, 3.0, np.inf]), "2 of 5 predictions"),
        (frames(gt=[4.0, 5.0, 4.0, 12.0, 12.0]), "object b has 2 true sizes"),
    ],
)
def test_faulty_tables_are_refused_in_one_line(table, message, refused):
    refused(message, object_table, table)


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
    assert (clusters[0], len(set(clusters))) == (clusters[1], 4)
    patients = patient_table(table)
    assert (len(patients), patients["num_objects"].tolist()) == (4, [2, 1, 1, 1])
    assert patients["gt"].tolist() == table["gt"].tolist()[1:]


@pytest.mark.fault("faults 3")
def test_a_size_is_exact_where_nothing_says_that_it_is_a_lower_bound(make_table):
    plain = make_table({"a": 4.0, "b": 12.0})
    flagged = make_table({"c": 15.0, "d": 6.0}, censored=[True] * 3 + [False] * 3)
    joined = concatenate([plain, flagged])
    assert joined.censored.tolist() == [False] * 6 + [True] * 3 + [False] * 3
    table = object_table(joined.frames.assign(predicted_mm=joined.frames["gt"] + 1.0))
    assert table["censored"].tolist() == [False, False, True, False]
    assert size_scores(table)(np.array([[1.0, 1.0, 0.0, 1.0]]))["mae_mm"][0] == pytest.approx(1.0)
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
    assert object_table(table.frames.assign(predicted_mm=5.0))["censored"].tolist() == [meant]


@pytest.mark.fault("faults 3")
def test_a_flag_that_says_neither_is_refused(make_table):
    table = make_table({"a": 4.0}, censored=["perhaps"] * 3)
    with pytest.raises(GatesError, match=r"censored is 'perhaps' in row 0: write true or false"):
        _ = FrameTable(table.frames).censored
