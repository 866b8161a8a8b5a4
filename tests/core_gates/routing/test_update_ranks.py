"""Gates learn from the routings of the ranks that hold them, and of no other."""

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from core_gates import MoELayer, ReMoEGate, SigmoidGate, StackedExperts, update_gates

DIM = 4


def stage(number):
    """Return a pipeline stage: the second holds fewer gates, of another size."""
    torch.manual_seed(number)
    gates = [SigmoidGate(DIM, 5, k=2, balance_rate=0.01), ReMoEGate(DIM, 3, k=1)]
    return nn.ModuleList(gates if number == 0 else [SigmoidGate(DIM, 3, k=1, balance_rate=0.02)])


def state_after_training(model, group=None):
    for _ in range(3):
        for gate in model:
            nn.init.normal_(gate.weight)
            gate(torch.randn(7, DIM) + 1)
        update_gates(model, group)
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def state_of_stage():
    groups = [dist.new_group([rank]) for rank in range(2)]
    rank = dist.get_rank()
    return state_after_training(stage(rank), groups[rank])


@pytest.mark.fault("core A3")
def test_pipeline_stages_do_not_mix_their_loads(ranks):
    expected = [state_after_training(stage(number)) for number in range(2)]
    assert all(state["0.balance_bias"].abs().max() > 0.01 for state in expected)
    assert_close(ranks(state_of_stage), expected)


def reductions_of_rank():
    numbers = []
    reduce = dist.all_reduce
    dist.all_reduce = lambda *args, **options: numbers.append(1) or reduce(*args, **options)
    state_after_training(stage(0))
    return len(numbers)


@pytest.mark.fault("core A3")
def test_all_gates_are_summed_in_one_reduction(ranks):
    assert ranks(reductions_of_rank) == [3, 3]


def layer():
    torch.manual_seed(0)
    gate = SigmoidGate(DIM, 5, k=2, balance_rate=0.01)
    return MoELayer(gate, StackedExperts(5, DIM, 3), return_routing=False)


def train(model, micro_batches):
    for x in micro_batches:
        model(x).square().mean().backward()
    update_gates(model)


def bias_of_rank(x):
    """Accumulate over micro-batches; each forward pass copies the buffers of rank 0."""
    model = layer()
    parallel = DistributedDataParallel(model)
    for x_step in x:
        train(parallel, x_step.chunk(2)[dist.get_rank()].chunk(3))
    return model.gate.balance_bias


def test_accumulation_under_ddp_balances_like_one_process(ranks):
    x = torch.randn(2, 24, DIM, generator=torch.Generator().manual_seed(1)) + 1
    expected = layer()
    for x_step in x:
        train(expected, x_step.chunk(6))
    assert expected.gate.balance_bias.abs().max() > 0.01
    for bias in ranks(bias_of_rank, x):
        assert torch.equal(bias, expected.gate.balance_bias)


def try_update():
    """Rank 1 saw no token: that is not an error, for rank 0 did; then neither has."""
    gate = SigmoidGate(DIM, 3, k=1, balance_rate=0.5)
    if dist.get_rank() == 0:
        gate(torch.ones(2, DIM))
    update_gates(gate)
    moved = bool(gate.balance_bias.any())
    try:
        update_gates(gate)
    except ValueError as error:
        return moved, str(error)
    return moved, ""


@pytest.mark.fault("core A1")
def test_only_what_no_rank_saw_is_refused_on_all(ranks):
    for moved, message in ranks(try_update):
        assert moved
        assert "gate 'SigmoidGate' learns from its routings, but saw none" in message
