"""A staged gate evaluates by its buffers, however these came to their values."""

import copy

import pytest
import torch
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

from core_gates import (
    ActivationGate,
    DenseToSparseGate,
    PermutedGate,
    SoftmaxGate,
    StagedSchedule,
    TemperatureSchedule,
    TopKGate,
    update_gates,
)
from core_gates.routing import PermutationSearch
from tests.core_gates.drawn import filled

DIM, EXPERTS, STEPS = 6, 5, 9
ANNEALED = TemperatureSchedule(2.0, 0.3, STEPS)
GATES = {
    "dense to sparse": lambda: DenseToSparseGate(DIM, EXPERTS, stages=StagedSchedule(2, 5)),
    "permuted": lambda: PermutedGate(
        TopKGate(DIM, EXPERTS), search=PermutationSearch(6, start=0.1)
    ),
    "softmax": lambda: SoftmaxGate(DIM, EXPERTS, tau=ANNEALED),
    "activation": lambda: ActivationGate(DIM, EXPERTS, tau=ANNEALED),
}
STAGED = ["dense to sparse", "permuted"]


def build(name, steps=0):
    gate = filled(GATES[name]())
    for _ in range(steps):
        update_gates(gate)
    return gate


def x():
    return torch.randn(7, DIM, generator=torch.Generator().manual_seed(2))


def assert_evaluates_alike(gate, expected):
    assert gate.phase == expected.phase
    routing, wanted = gate.eval()(x()), expected.eval()(x())
    assert (routing.indices is None) == (wanted.indices is None)
    assert_close(routing.to_dense(EXPERTS).weights, wanted.to_dense(EXPERTS).weights)


@pytest.fixture(params=GATES)
def name(request):
    return request.param


@pytest.mark.fault("core F1")
def test_average_of_models(name):
    gate = build(name)
    averaged = AveragedModel(gate)
    phases = set()
    for _ in range(STEPS):
        update_gates(gate)
        averaged.update_parameters(gate)
        assert_evaluates_alike(averaged.module, gate)
        phases.add(gate.train().phase)
    assert phases == set(gate.phases)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.fault("core F1")
@pytest.mark.parametrize("steps", [4, STEPS])
def test_distributed_checkpoint_in_place(name, steps, tmp_path):
    trained, gate = build(name, steps), build(name)
    dcp.save(trained.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    dcp.load(gate.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    assert_evaluates_alike(gate, trained)


@pytest.mark.fault("core F1")
def test_copies_and_writes_that_nobody_notices(name):
    trained, gate = build(name, STEPS), build(name)
    assert_evaluates_alike(copy.deepcopy(trained), trained)
    for buffer, value in zip(gate.buffers(), trained.buffers(), strict=True):
        buffer.data.copy_(value)
    assert_evaluates_alike(gate, trained)


def loaded_on_rank_0(name, steps):
    """Return the number of the phase and the weights, from a state that rank 0 alone loads."""
    gate = build(name)
    if dist.get_rank() == 0:
        gate.load_state_dict(build(name, steps).state_dict())
    parallel = DistributedDataParallel(gate).eval()
    weights = parallel(x()).to_dense(EXPERTS).weights.detach()
    return gate.phases.index(gate.phase), weights


def all_loaded_on_rank_0():
    return {f"{name} {n}": loaded_on_rank_0(name, n) for name in GATES for n in (4, STEPS)}


@pytest.mark.fault("core F1")
def test_a_state_that_rank_0_alone_loads(ranks):
    expected = {}
    for name in GATES:
        for steps in (4, STEPS):
            gate = build(name, steps).eval()
            weights = gate(x()).to_dense(EXPERTS).weights.detach()
            expected[f"{name} {steps}"] = (gate.phases.index(gate.phase), weights)
    for found in ranks(all_loaded_on_rank_0):
        assert_close(found, expected)


@pytest.mark.fault("core F1")
@pytest.mark.parametrize("name", STAGED)
def test_a_compiled_graph_never_runs_in_another_phase(name):
    trained, gate = build(name, STEPS), build(name).eval()
    compiled = torch.compile(gate, backend="aot_eager", fullgraph=True)
    compiled(x())
    gate.load_state_dict(trained.state_dict())
    wanted = trained.eval()(x()).to_dense(EXPERTS).weights
    assert_close(compiled(x()).to_dense(EXPERTS).weights, wanted)
    for buffer, value in zip(gate.buffers(), build(name).buffers(), strict=True):
        buffer.copy_(value)
    with pytest.raises(RuntimeError, match=r"read gate\.phase once, outside of torch\.compile"):
        compiled(x())
    assert gate.phase == gate.phases[0]
    assert_close(compiled(x()).weights, build(name).eval()(x()).weights)


@pytest.mark.fault("core F1")
@pytest.mark.parametrize("name", STAGED)
def test_devices_that_are_read_only_after_a_change(name, monkeypatch):
    """On a GPU: reading the buffer each time would wait for it in every forward pass."""
    trained, gate = build(name, STEPS), build(name)
    reads = []
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    monkeypatch.setattr(
        torch.Tensor, "__int__", lambda t: reads.append(t) or t.detach().numpy().item()
    )
    assert [gate.phase for _ in range(3)] == [gate.phases[0]] * 3
    assert len(reads) <= 1
    gate.step.copy_(trained.step)
    for mine, other in zip(gate.buffers(), trained.buffers(), strict=True):
        mine.copy_(other)
    assert gate.phase == trained.phase
    gate.step.data.fill_(0)  # as by a collective: the version stays
    with pytest.raises(RuntimeError, match="has changed since"):
        _ = gate.phase


@pytest.mark.fault("core F4")
def test_a_search_cannot_be_resumed_with_fewer_steps(refuses, tmp_path):
    state = PermutedGate(TopKGate(DIM, EXPERTS), search=PermutationSearch(20))
    for _ in range(10):
        update_gates(state)
    message = "had not ended after 10 steps, but num_steps is 8; resume it with the num_steps"
    short = PermutedGate(TopKGate(DIM, EXPERTS), search=PermutationSearch(8))
    refuses(ValueError, (message, lambda: short.load_state_dict(state.state_dict())))
    short = PermutedGate(TopKGate(DIM, EXPERTS), search=PermutationSearch(8))
    for buffer, value in zip(short.buffers(), state.buffers(), strict=True):
        buffer.copy_(value)
    refuses(ValueError, (message, lambda: short(x())))
    for _ in range(10):
        update_gates(state)
    short.load_state_dict(state.state_dict())  # a search that has ended is used anywhere
    assert_evaluates_alike(short, state)
