from copy import deepcopy

import pytest
import torch
from torch import nn

from recsys.ranker_module import JoinedOptimizer


def parameters(seed=0):
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(3)) for _ in range(3)]


def both(ps):
    return [torch.optim.Adam(ps[:2], lr=0.1), torch.optim.SGD(ps[2:], lr=0.5, momentum=0.9)]


def backward(ps, step):
    loss = sum(((i + 1) * p - step).square().sum() for i, p in enumerate(ps))
    loss.backward()
    return loss


def test_it_steps_as_both_do():
    ours, theirs = parameters(), parameters()
    joined, apart = JoinedOptimizer(both(ours)), both(theirs)
    for step in range(4):
        joined.zero_grad()
        assert ours[0].grad is None
        loss = joined.step(lambda s=step: backward(ours, s))
        for optimizer in apart:
            optimizer.zero_grad()
        assert loss == backward(theirs, step)
        for optimizer in apart:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_restart_continues_bit_for_bit():
    first = parameters()
    joined = JoinedOptimizer(both(first))
    for step in range(3):
        joined.zero_grad()
        joined.step(lambda s=step: backward(first, s))
    second = [nn.Parameter(p.detach().clone()) for p in first]
    again = JoinedOptimizer(both(second))
    again.load_state_dict(deepcopy(joined.state_dict()))
    assert {len(s) for s in again.state.values()} == {len(s) for s in joined.state.values()}
    for ps, optimizer in ((first, joined), (second, again)):
        optimizer.zero_grad()
        optimizer.step(lambda ps=ps: backward(ps, 3))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_schedulers_find_all_groups():
    joined = JoinedOptimizer(both(parameters()))
    schedule = torch.optim.lr_scheduler.LambdaLR(joined, lambda step: 1 / (1 + step))
    joined.step()
    schedule.step()
    assert [g["lr"] for g in joined.param_groups] == [0.05, 0.25]
    assert [g["lr"] for o in joined.optimizers for g in o.param_groups] == [0.05, 0.25]


def test_mistakes():
    ps = parameters()
    with pytest.raises(ValueError, match="parameter in common"):
        JoinedOptimizer([*both(ps), torch.optim.SGD(ps[:1])])
    with pytest.raises(ValueError, match="empty"):
        JoinedOptimizer([])
    joined = JoinedOptimizer(both(ps))
    with pytest.raises(ValueError, match="state is that of 0 joined optimizers, not 2"):
        joined.load_state_dict(torch.optim.SGD(ps).state_dict())
    with pytest.raises(ValueError, match="add the group to one"):
        joined.add_param_group({"params": parameters()})
