import numpy as np
import pytest

from core_gates.errors import GatesError
from recsys.metrics import auc, expected_calibration_error, gauc, task_table


def test_one_row_per_task():
    rng = np.random.default_rng(0)
    users, probs = rng.integers(0, 30, 900), rng.random((900, 3))
    labels = (rng.random((900, 3)) < probs).astype(float)
    labels[:, 2] = 0
    mask = np.ones((900, 3), dtype=bool)
    mask[:600, 1] = False
    labels[:600, 1] = np.nan
    table = task_table(["click", "share", "never"], labels, probs, users, mask=mask)
    click, share, never = table.to_dicts()
    assert (click["rows"], share["rows"], never["rows"]) == (900, 300, 900)
    assert (click["few"], share["few"]) == (False, True)
    assert click["auc"] == auc(probs[:, 0], labels[:, 0]).value
    late = slice(600, None)
    expected = gauc(probs[late, 1], labels[late, 1], users[late])
    assert (share["gauc"], share["gauc_mean"], share["users"]) == expected[:3]
    expected = expected_calibration_error(probs[late, 1], labels[late, 1])
    assert share["ece"] == expected.value
    assert share["positives"] == labels[late, 1].sum()
    assert never["auc"] is never["pcoc"] is never["ne"] is None
    assert never["note"] == "no positive row"
    assert never["log_loss"] > 0


def test_shapes_must_agree():
    with pytest.raises(GatesError, match=r"must be \(2, 1\): rows and tasks"):
        task_table(["a"], np.zeros((2, 2)), np.zeros((2, 2)), [1, 2])
