import numpy as np
import polars as pl
import pytest

from core_gates.errors import GatesError
from recsys.diagnosis.diagnose import permutation_importance
from recsys.metrics import user_resamples


def world(n=3000):
    rng = np.random.default_rng(0)
    table = pl.DataFrame(
        {
            "strong": rng.normal(size=n),
            "weak": rng.normal(size=n),
            "noise": rng.normal(size=n),
            "hidden": rng.normal(size=n),
        }
    )
    labels = rng.random((n, 2)) < score(table)
    return table, labels, rng.integers(0, 150, n)


def score(table):
    strong, weak = table["strong"].to_numpy(), table["weak"].to_numpy()
    logits = np.stack((2 * strong + 0.5 * weak, 0.5 * weak), 1)
    return 1 / (1 + np.exp(-logits))


def test_fields_are_ordered_by_what_the_model_needs():
    table, labels, users = world()
    found = permutation_importance(
        score, table, ["noise", "weak", "strong"], ["a", "b"], labels, users,
        draws=user_resamples(users, resamples=200),
    )  # fmt: skip
    assert [one.field for one in found] == ["strong", "weak", "noise"]
    strong, weak, noise = found
    assert strong.total.low > weak.total.high > weak.total.low > 0
    assert noise.total[:3] == (0, 0, 0)
    assert strong.tasks["b"].value == 0
    assert weak.tasks["b"].low > 0
    total = sum(gap.value for gap in weak.tasks.values())
    assert weak.total.value == pytest.approx(total)
    assert strong.total.units == 150


def test_groups_are_permuted_together():
    table, labels, users = world(1000)
    same = table.with_columns(copy=pl.col("strong"))
    both = score(same)

    def of_either(t):
        return score(t.with_columns(strong=(pl.col("strong") + pl.col("copy")) / 2))

    options = {"draws": user_resamples(users, resamples=50), "repeats": 2}
    np.testing.assert_allclose(of_either(same), both)
    alone = permutation_importance(
        of_either, same, ["strong"], ["a", "b"], labels, users, **options
    )[0]
    grouped = permutation_importance(
        of_either, same, {"pair": ["strong", "copy"]}, ["a", "b"], labels, users, **options
    )[0]
    single = permutation_importance(score, table, ["strong"], ["a", "b"], labels, users, **options)[
        0
    ]
    assert grouped.field == "pair"
    assert grouped.total == pytest.approx(single.total)
    assert alone.total.value < 0.7 * grouped.total.value


def test_masked_rows_do_not_count():
    table, labels, users = world(500)
    labels = labels.astype(float)
    mask = np.ones(labels.shape, dtype=bool)
    mask[:, 1] = False
    labels[:, 1] = np.nan
    found = permutation_importance(
        score, table, ["weak"], ["a", "b"], labels, users, mask=mask, repeats=1,
        draws=user_resamples(users, resamples=20),
    )  # fmt: skip
    assert list(found[0].tasks) == ["a"]


def test_faults():
    table, labels, users = world(50)
    with pytest.raises(GatesError, match="the table lacks x; its columns are strong, weak"):
        permutation_importance(score, table, ["x"], ["a", "b"], labels, users)
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        permutation_importance(score, table, ["weak"], ["a", "b"], labels, users, repeats=0)
