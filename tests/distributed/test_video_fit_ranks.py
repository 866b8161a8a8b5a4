"""A whole `fit` of HoME on two processes against one: loaders, masks, norms, tables, metrics."""

import numpy as np
import polars as pl
import pytest
import torch
from torch.distributed import all_gather_object, is_initialized

from harness.runs.loops import ExactTrainer
from recsys.data.datamodule import TableDataModule
from recsys.data.tables import RankingTables
from recsys.embedding.row_wise_adagrad import RowWiseAdagrad
from recsys.metrics import auc, gauc
from recsys.ranker_module import JoinedOptimizer, MultiTaskModule
from recsys.schema import Dense, FeatureSchema, Sparse, Task
from tests.distributed.lightning_fits import fit, validation_scores

STEPS, BATCH = 3, 48
OPTIONS = {"dim": 6, "hidden_dims": [8], "rank": [2, 2], "tower_dims": [4]}
SCHEMA = FeatureSchema(
    tasks=(Task("view", category="watch"), Task("full", category="watch", mask="known"),
           Task("like", category="inter", weight=0.5)),
    sparse=(Sparse("user", side="user"), Sparse("item", dim=3, side="item"), Sparse("hour")),
    dense=(Dense("length"),),
    dim=4,
    user="user",
)  # fmt: skip
WAYS = [(None, "64-true"), ("sharded", "64-true"), ("sharded", "32-true")]


def rows(number, seed):
    draw = np.random.default_rng(seed)
    user, item = draw.integers(0, 30, number), draw.integers(0, 50, number)
    score = (user % 3 - 1 + 0.5 * (item % 2))[:, None] + np.array([0.0, -0.5, -1.0])
    labels = 1 / (1 + np.exp(-score)) > draw.random((number, 3))
    return pl.DataFrame(
        {
            "user": user, "item": item, "hour": draw.integers(0, 24, number),
            "length": draw.gamma(2.0, 10.0, number), "known": draw.random(number) < 0.7,
            "view": labels[:, 0], "full": labels[:, 1], "like": labels[:, 2],
        }
    )  # fmt: skip


class Plain(MultiTaskModule):
    """With SGD in place of Adam, which divides by the roots of tiny numbers in float32."""

    def configure_optimizers(self):
        sgd = torch.optim.SGD(self.ranker.dense_parameters(), 0.05)
        return JoinedOptimizer([sgd, RowWiseAdagrad(self.ranker.tables(), 0.05)])


def of_all_ranks(values):
    """The rows of both processes, or of the one there is."""
    if not is_initialized():
        return values
    found = [None, None]
    all_gather_object(found, values)
    return torch.cat(found)


def train(how, precision, folder):
    """Return the state after five steps, what validation says, and how many rows were seen."""
    torch.manual_seed(0)
    tables = RankingTables("log", SCHEMA, rows(STEPS * BATCH + 20, 1), rows(400, 2), rows(9, 3))
    data = TableDataModule(tables, BATCH, 64, seed=3)
    kind = Plain if precision == "32-true" else MultiTaskModule
    options = {"learning_rate": 0.01, "embedding_learning_rate": 0.05, "embedding_l2": 1e-3}
    module = kind("HoME", OPTIONS, tables=how, **options)
    trainer = fit(module, data, folder, trainer=ExactTrainer, precision=precision)
    assert trainer.global_step == STEPS
    ignored = module._ddp_params_and_buffers_to_ignore
    assert len(ignored) == (2 if is_initialized() else 0)  # tables of two widths
    module.eval()
    with torch.no_grad():
        found = [(module(b.to("cpu")), b) for b in doubled(data.val_dataloader(), precision)]
    logits, labels = (torch.cat(c) for c in ([f for f, _ in found], [b.labels for _, b in found]))
    logits, labels, users = map(
        of_all_ranks, (logits, labels, torch.cat([b.user for _, b in found]))
    )
    single = precision == "32-true"
    if single:  # rows whose logits differ by rounding count as ties
        logits = logits.double().round(decimals=4)
    pairs = [(logits[:, t], labels[:, t]) for t in range(3)]
    optimizer = trainer.optimizers[0].state_dict()["optimizers"][1]["state"]
    return {
        "state": {name: t.clone() for name, t in module.ranker.state_dict().items()},
        "sums": [state["sum"] for state in optimizer.values()],
        "scores": validation_scores(trainer, "val/loss" if single else "val/"),
        "auc": [auc(*pair).value for pair in pairs],
        "gauc": [list(gauc(*pair, users)[:4]) for pair in pairs],
    }


def doubled(batches, precision):
    for batch in batches:
        yield batch.replace(dense=batch.dense.double()) if precision == "64-true" else batch


def train_all(parallel, folder):
    return {f"{how} {precision}": train(how, precision, folder) for how, precision in WAYS}


@pytest.mark.costly("three training runs on two ranks")
def test_a_fit_on_two_ranks_equals_that_on_one(two_ranks, tmp_path):
    found = two_ranks(train_all, str(tmp_path), tolerance=1e-6, timeout=600)
    for name, result in found.items():
        assert {"val/loss", "val/loss_full"} <= result["scores"].keys()
        assert ("val/auc_view" in result["scores"]) == name.endswith("64-true")
        assert all(0.3 < weighted < 0.9 for weighted, *_ in result["gauc"]), name
        assert len(result["sums"]) == 2
        assert all(float(sums.max()) > 0 for sums in result["sums"])
    first = found["None 64-true"]["state"]
    assert all(torch.equal(first[n], t) for n, t in found["sharded 64-true"]["state"].items())
    assert any(
        (first[n] - t).abs().max() > 1e-3 for n, t in found["sharded 32-true"]["state"].items()
    )
