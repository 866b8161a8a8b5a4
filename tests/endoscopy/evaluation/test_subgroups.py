import numpy as np
import pandas as pd
import pytest

from core_gates.errors import GatesError
from endoscopy.evaluation.conformal import abstention_table
from endoscopy.evaluation.size_scores import subgroup_table


def test_a_weak_subgroup_shows(noisy_objects):
    good = noisy_objects(90, 0.05).assign(shape="sessile", distance_mm=np.linspace(9, 20, 90))
    weak = noisy_objects(60, 0.5, seed=1).assign(shape="flat", distance_mm=np.linspace(20, 30, 60))
    rare = noisy_objects(5, 0.1, seed=2).assign(shape="Ip", distance_mm=np.nan)
    objects = pd.concat([good, weak, rare], ignore_index=True)
    objects["unique_id"] = [f"o{i}" for i in range(155)]
    table = subgroup_table(objects, resamples=300)
    assert table["column"].unique().tolist() == ["all", "shape", "distance_mm"]
    by = table.set_index(["column", "group"])
    assert by.loc[("shape", "flat"), "mape_low"] > by.loc[("shape", "sessile"), "mape_high"]
    assert by.loc[("shape", "Ip"), "objects"] == 5
    assert np.isnan(by.loc[("shape", "Ip"), "mape"])
    distances = by.loc["distance_mm"]
    assert distances["objects"].sum() == 155
    assert next(iter(distances.index)).startswith("≤")
    assert distances["mape"].iloc[0] < 0.1 < distances["mape"].iloc[2]
    assert by.loc[("all", "all"), "objects"] == 155
    with pytest.raises(GatesError, match="none of the columns brand"):
        subgroup_table(objects, by=["brand"])


def test_abstention_by_reason(noisy_objects):
    frames = noisy_objects(40, 0.05)
    frames = frames.loc[frames.index.repeat(2)].reset_index(drop=True)
    frames["reasons"] = ""
    frames.loc[:19, "reasons"] = "blurred"  # both frames of 10 objects
    frames.loc[0, "reasons"] = "blurred; too near"
    frames.loc[20, "reasons"] = "too near"  # one frame of another
    frames.loc[:19, "predicted_mm"] *= 2
    table = abstention_table(frames).set_index("reason")
    assert list(table.index) == ["any", "blurred", "too near", "accepted"]
    assert table["frames"].tolist() == [21, 20, 2, 59]
    assert table["objects"].tolist() == [10, 10, 1, 30]
    assert table.loc["any", "frame_rate"] == 21 / 80
    assert table.loc["accepted", "object_rate"] == 0.75
    assert table.loc["accepted", "mape"] < 0.1 < table.loc["any", "mape"]
    none = abstention_table(frames.assign(reasons=""))
    assert none["objects"].tolist() == [0, 40]
