"""Log-loss by category of tasks."""

import numpy as np
import pytest
import torch

from recsys.experiments.category_losses import category_rows
from recsys.metrics import summed_log_loss
from recsys.metrics.resampled import user_resamples
from recsys.schema import FeatureSchema, Sparse, Task

KINDS = {"click": "watch", "like": "inter", "long": "watch"}


def schema_of(kinds):
    tasks = tuple(Task(name, category=kind) for name, kind in kinds.items())
    return FeatureSchema(tasks=tasks, sparse=(Sparse("u"),), user="u")


@pytest.fixture
def rows(rows_of):
    rng = np.random.default_rng(5)
    labels = rng.random((200, 3)) < 0.4
    mask = torch.from_numpy(rng.random((200, 3)) < 0.8)
    weight = torch.from_numpy(rng.random(200).astype(np.float32))
    return rows_of(
        labels, mask=mask, weight=weight, user=torch.from_numpy(rng.integers(0, 20, 200))
    )


def test_categories_are_summed_alone_and_compared_in_pairs(rows):
    rng = np.random.default_rng(6)
    found = {name: [rng.uniform(0.1, 0.9, (200, 3)) for _ in range(2)] for name in ("a", "b")}
    draws = user_resamples(rows.user.numpy(), resamples=50)
    made = category_rows(rows, found, schema_of(KINDS), draws, reference="a")
    values = {(row.method, row.metric, row.versus or None): row for row in made}
    assert len(made) == len(values) == 6
    for category, places in (("watch", [0, 2]), ("inter", [1])):
        metric = f"summed log_loss {category}"
        arguments = rows.user.numpy(), rows.mask[:, places].numpy(), rows.weight.numpy()
        labels = rows.labels[:, places].numpy()
        expected = {
            name: np.mean([_loss(labels, p[:, places], *arguments) for p in own])
            for name, own in found.items()
        }
        assert values["a", metric, None].value == pytest.approx(expected["a"])
        gap = values["b", metric, "a"]
        assert gap.value == pytest.approx(expected["b"] - expected["a"])
        assert gap.low < gap.value < gap.high


def _loss(labels, probs, users, mask, weights):
    score = summed_log_loss(labels, probs, users, mask=mask, weights=weights)
    return float(score(np.ones((1, len(np.unique(users)))))["log_loss"][0])


def test_one_category_has_no_rows_of_its_own(rows):
    draws = user_resamples(rows.user.numpy(), resamples=5)
    found = {"a": [np.full((200, 3), 0.5)]}
    assert category_rows(rows, found, schema_of(dict.fromkeys(KINDS, "all")), draws) == []
    masked = rows.replace(mask=rows.mask & torch.tensor([True, False, True]))
    made = category_rows(masked, found, schema_of(KINDS), draws)
    assert [row.metric for row in made] == ["summed log_loss watch"]
