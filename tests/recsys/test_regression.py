"""A number that is predicted, and the labels that are thresholds of it."""

import numpy as np
import polars as pl
import pytest
import torch
from scipy.stats import norm
from torch.testing import assert_close

from recsys import MultiTaskModule, TableDataModule, TableScorer
from recsys.experiments import regression_rows
from recsys.model_folder import load_model, save_model
from recsys.regression import log_odds
from recsys.schema import Dense, FeatureSchema, Sparse, Task, Threshold
from recsys.transform import FeatureTransform
from recsys.transform.targets import read_targets
from video_multitask.feed import LABELS, RULES
from video_multitask.sources.simulated import SimulatedFeed

WATCHED = (
    Task("seconds", kind="regression", scale="length", mask="seen"),
    Task("long", threshold={"of": "seconds", "factor": 1.0, "most": 18.0}),
    Task("like"),
    Task("short", threshold=Threshold("seconds", most=3.0, below=True)),
)
SIZES = {"dim": 4, "hidden_dims": [8], "tower_dims": [4]}


def schema(**options):
    given = {"sparse": (Sparse("v", side="item"),), "dense": (Dense("length", side="item"),)}
    return FeatureSchema(WATCHED, **{**given, **options})


def rows():
    return pl.DataFrame(
        {
            "seconds": [20, 9, 2, None, 0], "length": [30.0, 9.0, 60.0, 20.0, None],
            "seen": [1, 1, 1, 1, 1], "like": [0, 1, 0, 1, 0], "v": [1, 2, 1, 2, 3],
        }
    )  # fmt: skip


def test_a_schema_parts_regressions_from_tasks():
    found = schema()
    assert found.task_names == ("long", "like", "short")
    assert [one.name for one in found.heads] == ["seconds", "like"]
    assert found.labels == ("like", "seconds", "seen")
    assert FeatureSchema.from_dict(found.to_dict()) == found


def test_log_odds_are_those_of_the_normal_distribution_up_to_one_in_a_million():
    z = np.linspace(-4.75, 4.75, 501)
    expected = norm.logcdf(z) - norm.logcdf(-z)
    for dtype, rtol in ((torch.float64, 3e-7), (torch.float32, 2e-6)):
        found = log_odds(torch.from_numpy(z).to(dtype)).double().numpy()
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol)
    far = log_odds(torch.tensor([-100.0, 100.0])).sigmoid()
    np.testing.assert_allclose(far, [1e-6, 1 - 1e-6], rtol=1e-3)


@pytest.mark.parametrize(
    ("tasks", "line"),
    [
        (WATCHED[1:], "'long' is a threshold of 'seconds', no regression of the schema; known are"),
        ((Task("a"), Task("b", kind="regression", scale="v")), "scale 'v' of 'b' is no dense feat"),
        ((WATCHED[0],), "the schema has no task"),
    ],
)
def test_thresholds_and_scales_of_nothing_are_refused(tasks, line, refuses):
    refuses(
        ValueError,
        (line, lambda: FeatureSchema(tasks, sparse=(Sparse("v"),), dense=(Dense("length"),))),
        ("needs a positive factor or most", lambda: Threshold("seconds")),
        ("a regression has a scale, a binary task none", lambda: Task("a", scale="length")),
    )


def test_labels_and_logarithms_are_derived():
    found = read_targets(rows(), schema())
    assert found.labels.T.tolist() == [[1, 1, 0, 0, 0], [0, 1, 0, 1, 0], [0, 0, 1, 0, 0]]
    assert found.mask[:, 0].tolist() == found.mask[:, 2].tolist() == [True] * 3 + [False] * 2
    expected = [np.log(20 / 30), 0.0, np.log(2 / 60), np.nan, np.nan]
    np.testing.assert_allclose(found.numbers[:, 0], expected, rtol=1e-6)


def test_watch_labels_are_thresholds_of_the_play_time():
    tables = SimulatedFeed(rows=4000, users=60, videos=90, days=5, play_time=True).read()
    found = read_targets(tables.train, tables.schema)
    columns = tables.train.select(LABELS[name] for name in tables.schema.task_names).to_numpy()
    np.testing.assert_array_equal(found.labels, columns)
    assert found.mask.all()
    assert [task.name for task in tables.schema.heads] == ["play_time", *list(LABELS)[5:]]


@pytest.fixture(scope="module", params=["SharedBottom", "HoME", "MMoE", "Linear"])
def trained(request):
    """A network that has seen some steps, with its data."""
    torch.manual_seed(0)
    feed = SimulatedFeed(rows=3000, users=40, videos=60, days=5, play_time=True, products=True)
    data = TableDataModule(feed, batch_size=256)
    module = MultiTaskModule(request.param, {} if request.param == "Linear" else SIZES,
                             learning_rate=0.02, intercepts="validation")  # fmt: skip
    module.build(data.transform)
    optimizer = module.configure_optimizers()
    batch, first = data.batch("train"), []
    for _ in range(30):
        v = module.ranker.inputs(batch.sparse, batch.dense, batch.sequences)
        found = module._regression_losses(module.ranker.outputs(v), batch)["loss_play_time"]
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        first.append(float(found.detach()))
    assert first[-1] < first[0] - 0.05
    return module, data


def test_probabilities_are_those_of_the_normal_distribution(trained):
    module, data = trained
    ranker, rows = module.served(intercepts=False), data.batch("test")
    weights = [0.0 if task.threshold else task.weight for task in ranker.schema.tasks]
    assert module.loss.weights.tolist() == weights  # thresholds are not trained by themselves
    mean = ranker.outputs(ranker.inputs(*rows[:3]))[:, 0].detach().double().numpy()
    sigma = float(ranker.heads.spread.detach().exp())
    duration = data.table("test")["duration_ms"].to_numpy().astype(float)
    found = ranker(*rows[:3]).detach().double().sigmoid().numpy()
    for task, (rule, one) in enumerate(RULES.items()):
        factor, most = one.ends
        expected = norm.cdf((mean - np.log(np.minimum(factor * duration, most) / duration)) / sigma)
        expected = 1 - expected if one.below else expected
        assert found[:, task] == pytest.approx(expected, abs=2e-5), rule
    assert 0.3 < sigma < 1.5 * float(data.batch("train").numbers[:, 0].std())


def test_a_network_with_the_head_is_kept_served_and_measured(trained, tmp_path):
    module, data = trained
    ranker = module.served(data.batch("validation"))
    model = load_model(save_model(tmp_path / "m", ranker, data.transform))
    scorer, table = TableScorer(model.ranker, model.transform), data.table("test")[:40]
    batch = data.batch("test").take(slice(0, 40))
    expected = ranker(*batch[:3]).sigmoid().detach()
    labelless = table.drop("play_time_ms", *LABELS.values())
    assert_close(
        torch.from_numpy(scorer.score(labelless).probabilities), expected, atol=1e-6, rtol=0
    )
    one = batch.take(slice(0, 1))
    logits = ranker.score_candidates(one, batch.replace(sparse=batch.sparse, numbers=None))
    assert_close(logits[0], ranker(*one[:3])[0])
    found = {row.metric: row.value for row in regression_rows("x", ranker, data.batch("test"))}
    assert found.keys() == {"xauc", "gxauc", "mae"}
    assert 0.5 < found["xauc"] < 0.95
    seconds = data.table("test")["play_time_ms"].to_numpy()
    assert found["mae"] < 1.3 * np.abs(seconds - np.median(seconds)).mean()


def test_a_network_without_regressions_is_as_before():
    plain = FeatureSchema((Task("like"),), dense=(Dense("length"),))
    transform = FeatureTransform(plain).fit(rows())
    module = MultiTaskModule("SharedBottom", SIZES)
    assert module.build(transform).heads is None
    assert not any("heads" in name for name in module.ranker.state_dict())
