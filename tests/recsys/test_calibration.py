import runpy
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from recsys.inputs import Batch
from recsys.ranker import Ranker
from recsys.validation import calibrate, intercepts_of

TOY = runpy.run_path(str(Path(__file__).parents[1] / "fixtures" / "toy_ranker.py"))


def ranker(**further):
    torch.manual_seed(0)

    def net(input_dim, tasks):
        return TOY["ToyNet"](input_dim, tasks, hidden=5)

    return Ranker(TOY["schema"](), TOY["SIZES"], 4, net, **further).eval()


def rows(count=500, tasks=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, tasks, generator=draw, dtype=torch.float64)
    labels = (torch.rand(count, tasks, generator=draw) < 0.2).double()
    mask = torch.rand(count, tasks, generator=draw) < 0.7
    return logits, labels, mask, torch.rand(count, generator=draw) + 0.5


def test_mean_predictions_are_the_rates():
    logits, labels, mask, weight = rows()
    shift = intercepts_of(logits, labels, mask, weight)
    counted = mask * weight.unsqueeze(1)
    predicted = (counted * (logits + shift).sigmoid()).sum(0)
    assert_close(predicted, (counted * labels).sum(0), rtol=1e-9, atol=0)
    assert shift.abs().min() > 0.1  # what was given is not calibrated


def test_constant_logits_have_a_closed_form():
    _, labels, mask, weight = rows()
    shift = intercepts_of(torch.full_like(labels, 2.0), labels, mask, weight)
    counted = mask * weight.unsqueeze(1)
    rate = (counted * labels).sum(0) / counted.sum(0)
    assert_close(shift, rate.logit() - 2.0)


def test_tasks_with_one_class_or_without_rows_stay():
    logits, labels, mask, weight = rows()
    labels[:, 0], labels[:, 1], mask[:, 2] = 0, 1, False
    assert_close(intercepts_of(logits, labels, mask, weight), torch.zeros(3, dtype=torch.float64))


def test_a_ranker_keeps_its_order_and_gets_its_rates():
    made, (sparse, dense, sequences) = ranker(calibrated=True), TOY["rows"](64)
    labels = (torch.rand(64, len(made.schema.tasks)) < 0.3).float()
    ones = torch.ones(64)
    batch = Batch(sparse, dense, sequences, labels, labels >= 0, ones, torch.arange(64))
    with torch.no_grad():
        before = made(sparse, dense, sequences)
        calibrate(made, batch)
        after = made(sparse, dense, sequences)
    assert_close(after - before, made.intercepts.expand_as(after), rtol=1e-4, atol=1e-5)
    assert_close(after.sigmoid().mean(0), labels.mean(0), rtol=1e-4, atol=1e-5)
    calibrate(made, batch)  # twice is once
    assert_close(made(sparse, dense, sequences), after)
    assert "intercepts" in made.state_dict()


def test_refuses_a_ranker_without_intercepts(rows_of):
    with pytest.raises(ValueError, match="calibrated=True"):
        calibrate(ranker(), rows_of(torch.zeros(2, 2)))


def test_only_rankers_that_ask_have_intercepts():
    assert "intercepts" not in ranker().state_dict()
