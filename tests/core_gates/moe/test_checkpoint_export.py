"""The state of experts in the form of published models, whole or spread over two ranks."""

import copy

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.testing import assert_close

from core_gates import (
    ExpertParallel,
    GatesError,
    MoELayer,
    SigmoidGate,
    StackedExperts,
    TopKGate,
    export_state_dict,
)
from core_gates.moe import GatedMlp

EXPERTS, DIM, HIDDEN = 5, 4, 6
NAMES = {
    "mixtral": ("w1", "w3", "w2"),
    "qwen3_moe": ("gate_proj", "up_proj", "down_proj"),
    "deepseek_v3": ("gate_proj", "up_proj", "down_proj"),
}


class Block(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(DIM), mlp

    def forward(self, x):
        return x + self.mlp(self.norm(x))


def model_of(num_experts=EXPERTS):
    """A model of one layer with everything that a layout renames, the same every time."""
    torch.manual_seed(0)
    gate = SigmoidGate(DIM, num_experts, k=2, balance_rate=1e-3)
    nn.init.normal_(gate.balance_bias)
    experts = StackedExperts(num_experts, DIM, HIDDEN)
    layer = MoELayer(gate, experts, shared=GatedMlp(DIM, 8), return_routing=False)
    return Block(layer)


def expected_of(model, layout):
    layer, (gate, up, down) = model.mlp, NAMES[layout]
    shared, bias = "shared", "balance_bias"
    if layout == "deepseek_v3":
        shared, bias = "shared_experts", "e_score_correction_bias"
    state = {f"norm.{name}": value for name, value in model.norm.state_dict().items()}
    state |= {"mlp.gate.weight": layer.gate.weight, f"mlp.gate.{bias}": layer.gate.balance_bias}
    state |= {f"mlp.{shared}.{name}": value for name, value in layer.shared.state_dict().items()}
    for e in range(layer.experts.num_experts):
        stem = f"mlp.experts.{e}."
        state[f"{stem}{gate}.weight"], state[f"{stem}{up}.weight"] = layer.experts.gate_up_proj[
            e
        ].chunk(2)
        state[f"{stem}{down}.weight"] = layer.experts.down_proj[e]
    return {name: value.detach() for name, value in state.items()}


@pytest.mark.fault("core A4")
@pytest.mark.parametrize("layout", NAMES)
def test_a_model_is_exported_as_published_and_loaded_again(layout):
    model, twin = model_of(), model_of()
    exported = export_state_dict(model, layout)
    assert exported.keys() == expected_of(model, layout).keys()
    assert_close(exported, expected_of(model, layout), rtol=0, atol=0)
    assert not any(value.requires_grad for value in exported.values())
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    twin.load_state_dict(exported)
    assert exported.keys() == expected_of(model, layout).keys()  # also after it was loaded
    assert_close(dict(twin.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    distributed = copy.deepcopy(get_model_state_dict(twin))
    assert distributed["mlp.experts.gate_up_proj"].shape == (EXPERTS, 2 * HIDDEN, DIM)
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    set_model_state_dict(twin, distributed)
    assert_close(dict(twin.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def test_a_missing_expert_is_reported():
    state = export_state_dict(model_of(), "mixtral")
    del state["mlp.experts.1.w3.weight"]
    with pytest.raises(RuntimeError, match=r"mlp\.experts\.gate_up_proj"):
        model_of().load_state_dict(state)


def test_experts_alone_and_a_module_under_two_names():
    experts = StackedExperts(2, DIM, HIDDEN)
    assert len(export_state_dict(experts, "mixtral")) == 6
    assert torch.equal(export_state_dict(experts, "mixtral")["1.w2.weight"], experts.down_proj[1])
    twice = export_state_dict(nn.ModuleList([experts, experts]), "mixtral")
    assert torch.equal(twice["0.1.w2.weight"], twice["1.1.w2.weight"])
    assert len(twice) == 12


def sharded(model, dim=0):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    return fully_shard(model, shard_placement_fn=lambda p: Shard(dim if p.ndim == 3 else 0))


def refusal_of_rank():
    with pytest.raises(GatesError) as refused:
        export_state_dict(sharded(model_of(), dim=1), "mixtral")
    return str(refused.value)


def gathered_sizes(call):
    """Sizes of the results of every collective of a call."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            found = function(*arguments, **(options or {}))
            if function.namespace in ("_c10d_functional", "c10d") and isinstance(
                found, torch.Tensor
            ):
                sizes.append(found.numel())
            return found

    with Watch():
        result = call()
    return result, sizes


def states_of_rank():
    """What this rank exports under FSDP and with its part of the experts, and what it loads."""
    model = sharded(model_of())
    exported, sizes = gathered_sizes(lambda: export_state_dict(model, "mixtral"))
    _, sizes_of_state = gathered_sizes(model.state_dict)
    parallel = model_of(4)
    parallel.mlp.experts = ExpertParallel.shard(parallel.mlp.experts)
    mine = {n: value.clone() for n, value in export_state_dict(parallel, "mixtral").items()}
    states = [None, None]
    dist.all_gather_object(states, mine)
    more = {name: value + 1 for state in states for name, value in state.items()}
    parallel.load_state_dict(more)
    whole = parallel.mlp.experts.unshard().state_dict()
    return {
        "fsdp": {name: value.clone() for name, value in exported.items()},
        "sizes": sizes,
        "sizes of state": sizes_of_state,
        "parallel": mine,
        "loaded": dict(whole),
        "refusal": refusal_of_rank(),
    }


@pytest.mark.fault("core A4")
def test_ranks_export_the_experts_that_they_hold(ranks):
    first, second = ranks(states_of_rank)
    for form, num_experts in (("fsdp", EXPERTS), ("parallel", 4)):
        expected = expected_of(model_of(num_experts), "mixtral")
        shared = {name for name in expected if ".experts." not in name}
        assert first[form].keys() & second[form].keys() == shared
        assert_close(first[form] | second[form], expected, rtol=0, atol=0)
    expert = 3 * HIDDEN * DIM
    for found in (first, second):
        assert "mlp.experts: the ranks hold parts of experts (Shard(dim=1))" in found["refusal"]
        assert found["sizes of state"] == []
        assert 0 < max(found["sizes"]) < expert  # the router and the like, no expert
        stacks = model_of(4).mlp.experts.state_dict()
        assert_close(found["loaded"], {name: value + 1 for name, value in stacks.items()})


@pytest.mark.parametrize(
    ("model", "layout", "message"),
    [
        (model_of, "llama", "layout is 'llama'; choose one of mixtral, qwen3_moe"),
        (lambda: TopKGate(2, 3), "mixtral", "TopKGate holds no StackedExperts to export"),
        (lambda: StackedExperts(2, 3, 4, gated=False), "mixtral", "'mixtral' holds gated experts"),
        (lambda: StackedExperts(2, 3, 4, bias=True), "qwen3_moe", "experts without biases"),
    ],
)
def test_what_cannot_be_exported(refuses, model, layout, message):
    refuses(GatesError, (message, lambda: export_state_dict(model(), layout)))
