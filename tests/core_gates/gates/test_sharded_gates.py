"""Gates and experts under FSDP and DDP against the plain layer."""

import runpy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing import assert_close

from core_gates import (
    ActivationGate,
    CosineGate,
    MoELayer,
    PermutedGate,
    StackedExperts,
    TopKGate,
    export_state_dict,
    spawn_experts,
    update_gates,
)
from core_gates.routing import PermutationSearch

EVERY = runpy.run_path(str(Path(__file__).with_name("test_every_gate_with_every_dispatch.py")))
STEPS = 11  # beyond the search for a permutation

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")


@pytest.fixture(scope="module", autouse=True)
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(module):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def trained(name, wrap):
    """Gradients of every step, and the parameters and buffers after the last one."""
    layer = EVERY["build"](name, "sorted")
    wrapped = wrap(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x, target, cluster = EVERY["planted"]()
    gradients = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        y, _ = wrapped(x, ids=cluster)
        (y - target).square().mean().backward()
        optimizer.step()
        update_gates(layer)
        # FSDP may leave None where there are zeros otherwise.
        found = {n: whole(p.grad) for n, p in layer.named_parameters() if p.grad is not None}
        gradients.append({n: g.clone() for n, g in found.items() if g.any()})
    return gradients, {n: whole(t).detach() for n, t in layer.state_dict().items()}


@pytest.mark.parametrize("wrap", [shard, nn.parallel.DistributedDataParallel])
@pytest.mark.parametrize("gate", EVERY["GATES"])
def test_every_gate_trains_as_in_a_plain_layer(gate, wrap):
    gradients, state = trained(gate, wrap)
    expected, expected_state = trained(gate, lambda layer: layer)
    assert_close((gradients, state), (expected, expected_state))


@pytest.mark.fault("core S9")
def test_no_state_of_another_shape_is_loaded():
    gate = CosineGate(8, 5)
    with pytest.raises(RuntimeError, match="size mismatch"):
        gate.load_state_dict(gate.state_dict() | {"log_tau": torch.tensor(0.75)})


@pytest.mark.fault("core S9")
def test_learned_temperatures_are_scalars_sharded_or_not():
    for make in (CosineGate, partial(ActivationGate, learn_tau=True)):
        gate = make(8, 5)
        expected = gate.tau
        assert (expected.shape, gate.log_tau.shape) == ((), (1,))
        assert_close(shard(gate).tau, expected)


@pytest.mark.parametrize("training", [True, False])
def test_ddp_trains_on_after_the_search_without_its_loss(training):
    gate = PermutedGate(TopKGate(8, 5), search=PermutationSearch(2))
    layer = MoELayer(gate, StackedExperts(5, 8, 4), return_routing=False).train(training)
    parallel = nn.parallel.DistributedDataParallel(layer)
    for phase in ("search", "permuted", "permuted"):
        assert gate.phase == phase
        parallel(torch.randn(6, 8)).sum().backward()
        update_gates(layer)
    assert not gate.permutation_logits.grad[0].isnan().any()


def experts_of(bias=True):
    torch.manual_seed(0)
    return StackedExperts(5, 4, 6, bias=bias)


def spawned(experts, seed):
    """Spawn after a step of Adam and a forward pass that leaves the experts gathered."""
    optimizer = torch.optim.Adam(experts.parameters(), lr=0.1)
    x = torch.linspace(-1, 1, 12).view(3, 4)
    experts.dense(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        experts.dense(x)
    generator = torch.Generator().manual_seed(seed)
    options = {"noise_std": 0.1, "reinit_fraction": 0.2, "keep_source": True}
    spawn_experts(experts, source=3, optimizer=optimizer, generator=generator, **options)
    experts.dense(x).square().sum().backward()
    parameters = dict(experts.named_parameters())
    moments = {n: whole(optimizer.state[p]["exp_avg"]) for n, p in parameters.items()}
    return {n: whole(p).detach() for n, p in parameters.items()}, moments


def loaded(experts):
    """Load other experts, in the form in which Mixtral publishes them."""
    state = export_state_dict(experts_of(bias=False), "mixtral")
    experts.load_state_dict({name: value + 1 for name, value in state.items()})
    return {name: whole(p).detach() for name, p in experts.named_parameters()}


def sharded_experts_of_rank():
    return spawned(shard(experts_of()), dist.get_rank()), loaded(shard(experts_of(bias=False)))


def test_sharded_experts_are_spawned_and_loaded_like_whole_ones(ranks):
    expected = spawned(experts_of(), 0), loaded(experts_of(bias=False))
    assert expected[0][1]["down_proj"].any()
    for found in ranks(sharded_experts_of_rank):
        assert_close(found, expected)
