from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from core_gates import (
    CrossLayerPredictor,
    MoELayer,
    NoisyTopKGate,
    PermutedGate,
    PreGate,
    RoutingOutput,
    SoftmaxGate,
    StackedExperts,
    TopKGate,
    collect_routing,
)
from core_gates.gates import fetch_order, prediction_recall
from core_gates.routing import PermutationSearch

GOLDEN = Path(__file__).parents[2] / "golden" / "moe_inference_sora"
EXACT = {"rtol": 0, "atol": 1e-9}
DIM, EXPERTS = 6, 5


def load(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {
            key: str(value) if value.dtype.kind == "U" else torch.from_numpy(value)
            for key, value in arrays.items()
        }


def golden_gates(golden, renormalize=True):
    num_experts, dim = golden["router_weight"].shape[1:]
    gates = []
    for weight in golden["router_weight"]:
        k = golden["top_k"].item()
        gate = TopKGate(dim, num_experts, k=k, renormalize=renormalize, dtype=torch.float64)
        gate.weight.data.copy_(weight)
        gates.append(gate)
    return gates


def random_gates(count, kind=TopKGate, **options):
    torch.manual_seed(0)
    gates = [kind(DIM, EXPERTS, k=2, **options) for _ in range(count)]
    for gate in gates:
        nn.init.normal_(gate.weight)
    return gates


def positions(*leading, seed=1):
    return torch.randn(*leading, DIM, generator=torch.Generator().manual_seed(seed))


def follow(pre_gate, inputs):
    """The routing of every layer, given the gate inputs of all."""
    ahead, routings, decided = {}, [], []
    for number, u in enumerate(inputs):
        routing, ahead = pre_gate(number, u, ahead)
        routings.append(routing)
        decided.append(sorted(ahead))
    return routings, decided


@given(level=st.integers(1, 6), count=st.integers(1, 5))
def test_every_layer_is_routed_by_the_input_of_level_layers_before(level, count):
    gates = random_gates(count)
    inputs = [positions(4, seed=number) for number in range(count)]
    routings, decided = follow(PreGate(gates, level=level), inputs)
    for number, routing in enumerate(routings):
        source = number - level if number >= level else number
        expected = gates[number](inputs[source])
        assert_close(routing.weights, expected.weights, rtol=0, atol=0)
        assert torch.equal(routing.indices, expected.indices)
        assert decided[number] == list(
            range(max(level, number + 1), min(count, number + level + 1))
        )


def test_gradients_reach_the_earlier_layer():
    gates = random_gates(2)
    first, second = positions(4).requires_grad_(), positions(4, seed=2).requires_grad_()
    routings, _ = follow(PreGate(gates), [first, second])
    routings[1].weights[:, 0].sum().backward()
    assert first.grad.abs().sum() > 0
    assert second.grad is None
    assert gates[1].weight.grad.abs().sum() > 0
    assert gates[0].weight.grad is None


def test_each_gate_routes_once_where_collectors_see_it():
    gates = nn.ModuleList(random_gates(3))
    with collect_routing(gates) as routings:
        follow(PreGate(gates), [positions(4)] * 3)
    assert [len(r) for r in routings.values()] == [1, 1, 1]


def test_padding_is_ignored_by_every_layer():
    mask = torch.tensor([False, True, False, True])
    x = positions(4).masked_fill(mask.unsqueeze(-1), torch.nan)
    pre_gate, ahead = PreGate(random_gates(3), level=2), {}
    for number in range(3):
        routing, ahead = pre_gate(number, x, ahead, padding_mask=mask)
        assert torch.equal(routing.kept.any(-1), ~mask)
        assert routing.weights.isfinite().all()


def test_layers_out_of_order_are_refused(refuses):
    pre_gate = PreGate(random_gates(4))
    _, ahead = pre_gate(0, positions(4), {})
    refuses(
        ValueError,
        (
            r"layer 2 is decided at layer 1, but ahead holds .*\[1\]",
            lambda: pre_gate(2, positions(4), ahead),
        ),
        ("layer must lie between 0 and 3, got 4", lambda: pre_gate(4, positions(4), ahead)),
    )
    assert sorted(ahead) == [1]


def test_settings_are_checked(refuses):
    refuses(
        ValueError,
        ("level must be at least 1, got 0", lambda: PreGate(random_gates(2), level=0)),
        ("at least one MoE layer", lambda: PreGate([])),
    )


@pytest.mark.parametrize("name", ["fate_small", "fate_wide"])
def test_golden_predictions(name):
    golden = load(name)
    gates, width = golden_gates(golden), golden["prefetch_width"].item()
    for number, gate in enumerate(gates[1:]):
        u, u_next = golden["gate_input"][number : number + 2]
        predicted, actual = CrossLayerPredictor(gate, width=width)(u), gate(u_next)
        assert torch.equal(predicted.indices, golden["predicted"][number])
        assert torch.equal(actual.indices, golden["actual_topk"][number + 1])
        recall = prediction_recall(predicted, actual)
        assert_close(recall.double(), golden["recall"][number], **EXACT)


@pytest.mark.parametrize("name", ["fate_small", "fate_wide"])
def test_golden_order_of_a_prefill(name):
    golden = load(name)
    tokens = golden["prefill_tokens"].item()
    for number, gate in enumerate(golden_gates(golden)[1:]):
        u, u_next = golden["gate_input"][number : number + 2, :tokens]
        order, counts = fetch_order(CrossLayerPredictor(gate, width=gate.num_experts)(u))
        assert torch.equal(counts, golden["prefill_counts"][number][order])
        expected = golden["prefill_order"][number]
        assert torch.equal(order.where(counts > 0, -1), expected)
        coverage = torch.isin(gate(u_next).indices.unique(), order[counts > 0]).double().mean()
        assert_close(coverage, golden["prefill_coverage"][number], **EXACT)


def test_wide_predictions_keep_the_choices_of_the_gate():
    (gate,) = random_gates(1)
    x = positions(2, 3)
    routing, own = CrossLayerPredictor(gate, width=4)(x), gate(x)
    assert torch.equal(routing.indices[..., :2], own.indices)
    assert_close(routing.weights[..., :2], own.weights, rtol=0, atol=0)
    assert not routing.weights[..., 2:].any()
    assert routing.kept[..., :2].all()
    assert not routing.kept[..., 2:].any()
    assert torch.equal(routing.indices, own.probs.argsort(descending=True)[..., :4])
    assert_close(routing.to_dense().weights, own.to_dense().weights, rtol=0, atol=0)


@pytest.mark.parametrize("dispatch", ["dense", "loop", "sorted", "capacity"])
def test_a_layer_can_follow_a_prediction(dispatch):
    (gate,) = random_gates(1)
    layer = MoELayer(gate, StackedExperts(EXPERTS, DIM, 4), dispatch=dispatch)
    x, earlier = positions(7), positions(7, seed=2)
    y, _ = layer(x, routing=CrossLayerPredictor(gate, width=4)(earlier))
    assert_close(y, layer(x, gate_input=earlier)[0])
    assert not torch.allclose(y, layer(x)[0])


def test_every_expert_can_be_guessed():
    (gate,) = random_gates(1)
    indices = CrossLayerPredictor(gate, width=EXPERTS)(positions(9)).indices
    assert torch.equal(indices.sort(-1).values, torch.arange(EXPERTS).expand(9, EXPERTS))


def test_a_prediction_is_silent():
    """No noise, no gradient, no collected routing, and the mode of the gate stays."""
    (gate,) = random_gates(1, NoisyTopKGate)
    gate.train()
    x = positions(50).requires_grad_()
    state = torch.get_rng_state()
    with collect_routing(gate) as routings:
        predicted = CrossLayerPredictor(gate)(x)
    assert routings == {"NoisyTopKGate": []}
    assert torch.equal(torch.get_rng_state(), state)
    assert gate.training
    assert not predicted.weights.requires_grad
    assert torch.equal(predicted.indices, gate.eval()(x).indices)


@pytest.mark.fault("core F8")
def test_a_prediction_leaves_every_mode_as_it_is():
    (inner,) = random_gates(1)
    gate = PermutedGate(inner, search=PermutationSearch(2)).train()
    inner.eval()
    CrossLayerPredictor(gate)(positions(3))
    assert gate.training
    assert not inner.training


@pytest.mark.fault("core F8")
def test_recall_is_as_exact_as_the_gates():
    predicted = RoutingOutput(torch.ones(1, 3), torch.tensor([[0, 1, 2]]))
    actual = RoutingOutput(torch.ones(1, 3).double(), torch.tensor([[1, 3, 4]]))
    assert prediction_recall(predicted, predicted).dtype == torch.float32
    for pair in ((predicted, actual), (actual, predicted)):
        recall = prediction_recall(*pair)
        assert (recall.dtype, recall.item()) == (torch.float64, 1 / 3)


def test_padding_is_not_fetched():
    (gate,) = random_gates(1)
    mask = torch.tensor([True, False, True, False])
    predicted = CrossLayerPredictor(gate, width=3)(positions(4), padding_mask=mask)
    assert not predicted.kept[mask].any()
    order, counts = fetch_order(predicted)
    assert counts.sum() == 2 * 2
    assert torch.equal(counts, gate(positions(4)[~mask]).chosen().sum(0)[order].long())


def test_popular_experts_come_first_and_ties_by_number():
    routing = RoutingOutput(torch.ones(3, 1, 2), torch.tensor([[[2, 4]], [[4, 1]], [[0, 4]]]))
    order, counts = fetch_order(routing, 5)
    assert (order.tolist(), counts.tolist()) == ([4, 0, 1, 2, 3], [3, 1, 1, 1, 0])


@pytest.mark.parametrize("leading", [(), (0,), (1,), (2, 3)])
def test_shapes(leading):
    (gate,) = random_gates(1)
    predicted = CrossLayerPredictor(gate, width=3)(positions(*leading))
    assert (predicted.indices.shape, fetch_order(predicted)[0].shape) == ((*leading, 3), (EXPERTS,))
    assert (
        prediction_recall(predicted, gate(positions(*leading))).tolist()
        == torch.ones(leading).tolist()
    )


def test_recall_counts_what_is_used():
    predicted = RoutingOutput(torch.ones(2, 2), torch.tensor([[0, 1], [0, 1]]))
    actual = RoutingOutput(torch.ones(2, 2), torch.tensor([[1, 3], [2, 3]]))
    assert prediction_recall(predicted, actual).tolist() == [0.5, 0.0]
    kept = torch.tensor([[True, False], [False, False]])
    recall = prediction_recall(predicted, actual._replace(kept=kept))
    assert recall[0] == 1
    assert recall[1].isnan()
    with pytest.raises(ValueError, match=r"use to_top_k\(k\)"):
        prediction_recall(RoutingOutput(torch.ones(2, 5)), actual)


@pytest.mark.parametrize("width", [1, 6])
def test_the_width_is_checked(width):
    (gate,) = random_gates(1)
    with pytest.raises(ValueError, match=f"between the 2 choices of TopKGate and its 5 .* {width}"):
        CrossLayerPredictor(gate, width=width)(positions(4))


def test_dense_gates_cannot_guess():
    with pytest.raises(ValueError, match="SoftmaxGate gives no indices"):
        CrossLayerPredictor(SoftmaxGate(DIM, EXPERTS))(positions(4))
