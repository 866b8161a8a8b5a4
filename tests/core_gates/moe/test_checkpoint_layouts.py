import copy

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.testing import assert_close

from core_gates import MoELayer, SigmoidGate, StackedExperts, TopKGate
from core_gates.moe import GatedMlp

EXPERTS, DIM, HIDDEN = 3, 4, 6
PROJECTIONS = {
    "mixtral": ("w1", "w3", "w2"),
    "qwen3_moe": ("gate_proj", "up_proj", "down_proj"),
    "deepseek_v3": ("gate_proj", "up_proj", "down_proj"),
}


def published(layout):
    """The state of one layer as the model of that name publishes it."""
    torch.manual_seed(1)
    gate, up, down = PROJECTIONS[layout]
    state = {"gate.weight": torch.randn(EXPERTS, DIM)}
    for e in range(EXPERTS):
        state[f"experts.{e}.{gate}.weight"] = torch.randn(HIDDEN, DIM)
        state[f"experts.{e}.{up}.weight"] = torch.randn(HIDDEN, DIM)
        state[f"experts.{e}.{down}.weight"] = torch.randn(DIM, HIDDEN)
    if layout == "deepseek_v3":
        state["gate.e_score_correction_bias"] = torch.randn(EXPERTS)
        state["shared_experts.gate_proj.weight"] = torch.randn(8, DIM)
        state["shared_experts.up_proj.weight"] = torch.randn(8, DIM)
        state["shared_experts.down_proj.weight"] = torch.randn(DIM, 8)
    return state


def layer_for(layout):
    experts = StackedExperts(EXPERTS, DIM, HIDDEN)
    if layout == "deepseek_v3":
        gate = SigmoidGate(DIM, EXPERTS, k=2, balance_rate=1e-3)
        return MoELayer(gate, experts, shared=GatedMlp(DIM, 8))
    return MoELayer(TopKGate(DIM, EXPERTS), experts)


@pytest.mark.parametrize("layout", PROJECTIONS)
def test_published_state_is_loaded_where_it_belongs(layout):
    state = published(layout)
    layer = layer_for(layout)
    layer.load_state_dict(copy.copy(state))
    gate, up, down = PROJECTIONS[layout]
    for e in range(EXPERTS):
        x = torch.randn(5, DIM)
        weights = (state[f"experts.{e}.{name}.weight"] for name in (gate, up, down))
        g, u, d = weights
        expected = (torch.nn.functional.silu(x @ g.T) * (x @ u.T)) @ d.T
        assert_close(layer.experts.single(x, e), expected)
    assert torch.equal(layer.gate.weight, state["gate.weight"])
    if layout == "deepseek_v3":
        assert torch.equal(layer.gate.balance_bias, state["gate.e_score_correction_bias"])
        assert torch.equal(layer.shared.up_proj.weight, state["shared_experts.up_proj.weight"])


@pytest.mark.fault("core A4")
@pytest.mark.parametrize("layout", PROJECTIONS)
def test_loading_a_published_state_leaves_distributed_checkpoints_working(layout):
    layer, twin = layer_for(layout), layer_for(layout)
    layer.load_state_dict(published(layout))
    state = get_model_state_dict(layer)
    assert state["experts.gate_up_proj"].shape == (EXPERTS, 2 * HIDDEN, DIM)
    set_model_state_dict(twin, state)
    assert_close(dict(twin.state_dict()), dict(layer.state_dict()), rtol=0, atol=0)


def test_the_stacked_form_has_the_names_of_transformers():
    layer = layer_for("mixtral")
    assert set(layer.state_dict()) == {
        "gate.weight",
        "experts.gate_up_proj",
        "experts.down_proj",
    }
    assert layer.state_dict()["experts.gate_up_proj"].shape == (EXPERTS, 2 * HIDDEN, DIM)


def test_prefixes_and_the_given_dictionary_are_respected():
    state = {f"layers.0.mlp.{key}": value for key, value in published("qwen3_moe").items()}
    before = set(state)
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Module()])})
    model["layers"][0].mlp = layer_for("qwen3_moe")
    model.load_state_dict(state)
    assert set(state) == before
    gate_up = model.state_dict()["layers.0.mlp.experts.gate_up_proj"]
    assert torch.equal(gate_up[1, :HIDDEN], state["layers.0.mlp.experts.1.gate_proj.weight"])


def test_a_missing_expert_is_reported():
    state = published("mixtral")
    del state["experts.1.w3.weight"]
    with pytest.raises(RuntimeError, match=r"experts\.gate_up_proj"):
        layer_for("mixtral").load_state_dict(state)
