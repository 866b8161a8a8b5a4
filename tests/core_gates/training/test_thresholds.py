"""Thresholds in stages: golden trajectories, what they keep, learning rates, and resuming."""

import math
import warnings
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.testing import assert_close

from core_gates.training import ThresholdSchedule, growing, threshold_for

GOLDEN = Path(__file__).parents[2] / "golden" / "moe_inference_sora" / "sora.npz"


@pytest.fixture(scope="module")
def sora():
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("growth", ["linear", "log-linear", "exp-linear"])
def test_golden_stages(growth, sora):
    name = f"sched_{growth.replace('-', '_')}"
    start, end, stages = sora[f"{name}_args"]
    found = growing(float(start), float(end), int(stages), growth)
    assert (found, growing(0.0, 0.5, 1, growth)) == (pytest.approx(sora[name], rel=1e-12), [0.5])


@pytest.mark.parametrize(("rule", "name"), [("soft", "soft_threshold"), ("reference", "reference")])
def test_golden_trajectory_of_a_list(rule, name, sora):
    """Thresholds of two steps each; the published AdamW does not correct ε."""
    gate = nn.Parameter(torch.from_numpy(sora["opt3_p0"]).clone())
    optimizer = torch.optim.AdamW([gate], float(sora["opt3_lrs"][0]), weight_decay=0.0)
    thresholds = sora["opt3_lambdas"][::2].tolist()
    with pytest.warns(UserWarning, match="the threshold 0.06 is 3 times the learning rate"):
        schedule = ThresholdSchedule(optimizer, [gate], thresholds, 2, rule=rule)
    values = []
    for step, grad in enumerate(torch.from_numpy(sora["opt3_grads"]), 1):
        assert schedule.proximal.threshold == sora["opt3_lambdas"][step - 1]
        optimizer.param_groups[0]["eps"] = 1e-6 / (1 - 0.999**step) ** 0.5
        gate.grad = grad
        optimizer.step()
        values.append(gate.data.clone())
    expected = torch.from_numpy(sora[f"opt3_traj_{name}"])
    assert_close(torch.stack(values), expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(torch.stack(values) == 0, expected == 0)


def fresh(values, thresholds=(0.0, 0.01, 0.03), stage_steps=4):
    gate = nn.Parameter(values.clone())
    optimizer = torch.optim.Adam([{"params": [gate], "lr": 0.1}], lr=1e-3)
    schedule = ThresholdSchedule(optimizer, [gate], list(thresholds), stage_steps, warmup=0.5)
    return gate, optimizer, schedule, LambdaLR(optimizer, schedule.rate)


def run(gate, optimizer, rates, steps):
    seen = []
    for step in steps:
        seen.append(optimizer.param_groups[0]["lr"])
        gate.grad = torch.full_like(gate, 0.1 * (step - 2))
        optimizer.step()
        rates.step()
    return seen


def test_each_stage_restarts_its_learning_rate():
    gate, optimizer, schedule, rates = fresh(torch.randn(6))
    assert run(gate, optimizer, rates, range(14)) == pytest.approx(
        [0.05, 0.1, 0.1, 0.05] * 3 + [0, 0]
    )
    assert (schedule.stage, schedule.num_steps, schedule.proximal.threshold) == (2, 14, 0.03)


def test_it_resumes_in_a_stage_bit_for_bit():
    torch.manual_seed(0)
    start = torch.randn(6)
    gate, optimizer, schedule, rates = fresh(start)
    run(gate, optimizer, rates, range(6))
    other, second, again, rates2 = fresh(gate.data)
    for mine, its in ((second, optimizer), (again, schedule), (rates2, rates)):
        mine.load_state_dict(deepcopy(its.state_dict()))
    assert (again.proximal.threshold, again.stage) == (0.01, 1)
    run(gate, optimizer, rates, range(6, 12))
    run(other, second, rates2, range(6, 12))
    assert torch.equal(other, gate)


@given(st.floats(0.02, 0.98), st.integers(1, 1000))
def test_without_learning_a_threshold_keeps_what_was_asked_for(kept, steps):
    threshold = threshold_for(kept, steps)
    assert math.erfc(threshold * steps / math.sqrt(2)) == pytest.approx(kept)


def learning(kept, thresholds, stage_steps=240, *, fixed=None, rank=600, resumed=None):
    """Train gates that noise and a pull away from zero move, and return them and all ξ."""
    torch.manual_seed(0)
    gate = nn.Parameter(torch.randn(rank))
    noise = torch.randn(stage_steps * len(thresholds), rank)
    optimizer = torch.optim.AdamW([gate], 0.02, weight_decay=0.0)
    own = [fixed] * len(thresholds) if fixed else thresholds
    schedule = ThresholdSchedule(optimizer, [gate], own, stage_steps, kept=kept)
    rates, seen = LambdaLR(optimizer, schedule.rate), []
    for step, row in enumerate(noise):
        if step == resumed:
            states = [deepcopy(one.state_dict()) for one in (optimizer, schedule, rates)]
            gate = nn.Parameter(gate.detach().clone())
            optimizer = torch.optim.AdamW([gate], 0.02, weight_decay=0.0)
            schedule = ThresholdSchedule(optimizer, [gate], own, stage_steps, kept=kept)
            rates = LambdaLR(optimizer, schedule.rate)
            for one, state in zip((optimizer, schedule, rates), states, strict=True):
                one.load_state_dict(state)
        gate.grad = row - gate.detach().sign()
        optimizer.step()
        seen.append(schedule.proximal.threshold)
        rates.step()
    return gate.detach(), seen


@pytest.mark.fault("46 S3")
@pytest.mark.parametrize("kept", [0.1, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("thresholds", [[1.0], [0.0, 1.0, 2.0]])
def test_gates_that_learn_keep_what_was_asked_for(kept, thresholds):
    steps = 240 * len(thresholds)
    plain, _ = learning(None, thresholds, fixed=threshold_for(kept, steps))
    assert float((plain != 0).double().mean()) > kept + 0.03  # they come back
    gate, seen = learning(kept, thresholds)
    assert int((gate != 0).sum()) == round(kept * 600)
    assert all(one == 0 for one in seen[:240]) == (thresholds[0] == 0)
    first = next(one for one in seen if one)
    assert max(seen) < first + 0.03  # no cut at once at the end
    again, _ = learning(kept, thresholds, resumed=steps - 25)
    assert torch.equal(again, gate)


@pytest.mark.fault("46 S3")
def test_thresholds_follow_gates_at_rest_in_the_ratio_of_their_stages():
    gate = nn.Parameter(torch.arange(1.0, 11.0, dtype=torch.float64))
    optimizer = torch.optim.SGD([gate], lr=1.0)
    schedule = ThresholdSchedule(optimizer, [gate], [0.0, 1.0, 3.0], 2, kept=0.4)
    gate.grad, seen = torch.zeros_like(gate), []
    for _ in range(7):
        optimizer.step()
        seen.append(schedule.proximal.threshold)
    assert seen == pytest.approx([0, 0, 0.75, 0.75, 2.25, 2.25, 0])
    assert gate.tolist() == pytest.approx([0] * 6 + [1, 2, 3, 4])
    gate.data.fill_(2)
    gate.data[:2] = 0  # it may lose four more
    optimizer.step()
    assert schedule.proximal.threshold == 2


def test_only_a_threshold_too_large_for_the_gates_warns():
    gate, weight = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    groups = [{"params": [weight], "lr": 1e-4}, {"params": [gate], "lr": 0.02}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ThresholdSchedule(torch.optim.AdamW(groups), [gate], [0.0, 7.9e-3], 1)
    groups = [{"params": [weight], "lr": 1e-4}, {"params": [gate], "lr": 0.02}]
    with pytest.warns(UserWarning, match=r"0.008 is 0.4 .* learning rate above 0.02$"):
        ThresholdSchedule(torch.optim.AdamW(groups), [gate], [8e-3], 1)
    groups = [{"params": [weight], "lr": 1e-4}, {"params": [gate], "lr": 0.02}]
    with pytest.warns(UserWarning, match="the threshold 0.0089932 is 0.45 times"):  # in the last
        ThresholdSchedule(torch.optim.AdamW(groups), [gate], [0.0, 1.0, 2.0], 50, kept=0.5)


def test_settings_are_checked(refuses):
    gate = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([gate], lr=0.1)

    def schedule(thresholds, steps=1, **options):
        return lambda: ThresholdSchedule(optimizer, [gate], thresholds, steps, **options)

    refuses(
        ValueError,
        ("threshold must not be negative, got -0.1", schedule([0.0, -0.1])),
        ("number_of_thresholds must be at least 1", schedule([])),
        ("stage_steps must be at least 1", schedule([0.1], 0)),
        ("rule is 'hard'", schedule([0.01], rule="hard")),
        ("kept must lie between 0 and 1, got 0", schedule([0.01], kept=0.0)),
        (
            "and the rule 'soft', got 1, 0.01 and 'reference'",
            schedule([0.01], kept=0.5, rule="reference"),
        ),
        ("a last threshold above 0 .* got 1, 0 and 'soft'", schedule([1.0, 0.0], kept=0.5)),
        ("kept must lie between 0 and 1, got 1", lambda: threshold_for(1, 10)),
        ("steps must be at least 1", lambda: threshold_for(0.5, 0)),
        ("needs positive ends", lambda: growing(0.0, 1.0, 3, "exp-linear")),
        ("growth is 'cubic'; choose one of linear", lambda: growing(0.0, 1.0, 3, "cubic")),
        ("stages must be at least 1", lambda: growing(0.0, 1.0, 0)),
    )
