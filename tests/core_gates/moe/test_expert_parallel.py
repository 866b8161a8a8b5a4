"""Experts on two ranks against all experts on one."""

import warnings

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from core_gates import (
    ExpertChoiceGate,
    ExpertParallel,
    GatesError,
    MoELayer,
    SoftMoEGate,
    StackedExperts,
    SwitchGate,
    TopKGate,
)
from core_gates.moe import expert_parameters
from core_gates.moe.dispatch import DISPATCHES
from core_gates.moe.dispatch import dispatch as mix_experts

DIM, EXPERTS, SIZES = 6, 4, [7, 3]
GATES = {
    "top-k": lambda: TopKGate(DIM, EXPERTS, k=2),
    "switch": lambda: SwitchGate(DIM, EXPERTS, jitter=0),  # drops
    "expert choice": lambda: ExpertChoiceGate(DIM, EXPERTS),
    "soft moe": lambda: SoftMoEGate(DIM, EXPERTS, num_slots=2),
}


def layer_of(gate="top-k", dispatch="sorted", dtype=torch.float32):
    """The same layer every time, with all its experts."""
    torch.manual_seed(0)
    gate = GATES[gate]()
    nn.init.normal_(gate.weight)
    experts = StackedExperts(EXPERTS, DIM, 5, bias=True)
    for name, parameter in experts.named_parameters():
        if name.endswith("_bias"):
            nn.init.normal_(parameter)
    return MoELayer(gate, experts, dispatch=dispatch, return_routing=False).to(dtype)


def batches(sizes=SIZES, dtype=torch.float32):
    x = torch.randn(sum(sizes), DIM, generator=torch.Generator().manual_seed(1)).to(dtype)
    return list(x.split(sizes))


def loss_of(y):
    return (y * torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)).sum()


def run(layer, x):
    """Result and gradients by name; those of missing parameters are left out."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    loss_of(y).backward()
    gradients = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad} | gradients


def sharded(*args, **options):
    layer = layer_of(*args)
    layer.experts = ExpertParallel.shard(layer.experts, **options)
    return layer


def cases_of_rank(x):
    found = {}
    for gate in GATES:
        for dispatch in DISPATCHES if gate in ("top-k", "soft moe") else ("sorted",):
            found[f"{gate}, {dispatch}"] = run(sharded(gate, dispatch), x[dist.get_rank()])
    return found


def refusal_of_rank(x):
    """What a rank says of weights that only those of rank 0 make infinite."""
    routing = layer_of().gate(x)
    weights = routing.weights / dist.get_rank()
    with pytest.raises(GatesError) as refused:
        mix_experts(x, routing._replace(weights=weights), sharded().experts, "sorted")
    return str(refused.value)


def special_of_rank(x, empty):
    rank, layer = dist.get_rank(), sharded()
    return {
        "checkpointed": run(Checkpointed(layer), x[rank]),
        "empty": run(layer, empty[rank]),
        "refusal": refusal_of_rank(x[rank]),
        "float64": run(sharded("top-k", "sorted", torch.float64), x[rank].double()),
        "whole": dict(layer.experts.unshard().state_dict()),
        "number": layer.experts.num_experts,
        "local": layer.experts.experts.num_experts,
    }


class Checkpointed(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=False)


def averaged_of_rank(x):
    layer = sharded(average_gradients=True)
    layer._ddp_params_and_buffers_to_ignore = list(expert_parameters(layer))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parallel = nn.parallel.DistributedDataParallel(layer)
        loss_of(parallel(x[dist.get_rank()])).backward()
    return {n: p.grad for n, p in layer.named_parameters()}


def all_on_rank(x, empty):
    """Everything in one start of the ranks, which takes longer than the tests."""
    return {
        "cases": cases_of_rank(x),
        "special": special_of_rank(x, empty),
        "averaged": averaged_of_rank(x),
    }


def assert_equals_dense(found, dense, **tolerance):
    """Compare the ranks with one process that holds all experts."""
    shared = [name for name in dense[0] if not name.startswith("experts.")]
    for mine, alone in zip(found, dense, strict=True):
        assert_close({n: mine[n] for n in shared}, {n: alone[n] for n in shared}, **tolerance)
    for name in set(dense[0]) - set(shared):
        total = dense[0][name] + dense[1][name]
        parts = [mine["experts." + name] for mine in found]
        assert_close(torch.cat(parts), total, **tolerance)


@pytest.fixture(scope="module")
def on_ranks(ranks):
    return ranks(all_on_rank, batches(), batches([0, 5]))


@pytest.fixture(scope="module")
def cases(on_ranks):
    return [found["cases"] for found in on_ranks]


@pytest.fixture(scope="module")
def special(on_ranks):
    return [found["special"] for found in on_ranks]


@pytest.mark.parametrize("gate", GATES)
def test_ranks_equal_one_process_with_gradients(cases, gate):
    dense = [run(layer_of(gate), x) for x in batches()]
    assert all(result["experts.down_proj"].any() for result in dense)
    for name in cases[0]:
        if name.startswith(gate):
            assert_equals_dense([found[name] for found in cases], dense, rtol=1e-6, atol=1e-6)


def test_double_precision(special):
    dense = [run(layer_of(dtype=torch.float64), x.double()) for x in batches()]
    assert_equals_dense([s["float64"] for s in special], dense, rtol=1e-12, atol=1e-12)


def test_checkpointed_layers_and_ranks_without_positions(special):
    dense = [run(Checkpointed(layer_of()), x) for x in batches()]
    dense = [{n.removeprefix("layer."): t for n, t in result.items()} for result in dense]
    found = [{n.removeprefix("layer."): t for n, t in s["checkpointed"].items()} for s in special]
    assert_equals_dense(found, dense, rtol=1e-6, atol=1e-6)
    dense = [run(layer_of(), x) for x in batches([0, 5])]
    assert dense[0]["y"].shape == (0, DIM)
    assert_equals_dense([s["empty"] for s in special], dense, rtol=1e-6, atol=1e-6)


def test_weights_that_are_not_finite_stop_every_rank(special):
    number = 2 * SIZES[0]
    for found in special:
        assert f"a gate returned {number} weights that are not finite" in found["refusal"]


def test_shards_join_to_the_whole(special):
    whole = dict(layer_of().experts.state_dict())
    for found in special:
        assert (found["number"], found["local"]) == (4, 2)
        assert_close(found["whole"], whole, rtol=0, atol=0)


def test_averaged_gradients_are_those_of_the_mean_over_ranks(on_ranks):
    dense = [run(layer_of(), x) for x in batches()]
    found = [f["averaged"] for f in on_ranks]
    for name in ("gate.weight", "experts.down_proj", "experts.gate_up_proj"):
        mean = (dense[0][name] + dense[1][name]) / 2
        if name.startswith("gate"):
            parts = found[0][name]
            assert_close(parts, found[1][name], rtol=0, atol=0)
        else:
            parts = torch.cat([f["experts." + name] for f in found])
        assert_close(parts, mean, rtol=1e-6, atol=1e-6)


def test_one_process_holds_everything():
    layer, x = sharded(), batches()[0]
    assert_close(run(layer, x)["y"], run(layer_of(), x)["y"], rtol=0, atol=0)
    assert list(expert_parameters(nn.ModuleDict({"moe": layer}))) == [
        "moe.experts.experts.gate_up_proj",
        "moe.experts.experts.gate_up_proj_bias",
        "moe.experts.experts.down_proj",
        "moe.experts.experts.down_proj_bias",
    ]
    whole = layer.experts.unshard().state_dict()
    assert_close(dict(whole), dict(layer_of().experts.state_dict()), rtol=0, atol=0)


def test_numbers_must_fit(monkeypatch):
    monkeypatch.setattr("core_gates.moe.expert_parallel.num_ranks", lambda group: 3)
    with pytest.raises(ValueError, match="4 experts cannot be spread evenly over 3 ranks"):
        ExpertParallel.shard(StackedExperts(4, 2, 2))
