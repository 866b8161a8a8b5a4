"""The hard inputs that every routing gate must bear; a new gate is one line in ``GATES``."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch.testing import assert_close

from core_gates import (
    ActivationGate,
    BaseLayerGate,
    CometGate,
    CosineGate,
    DenseToSparseGate,
    DSelectKGate,
    ExpertChoiceGate,
    Gate,
    GateMonitor,
    GatesError,
    GShardGate,
    HardConcreteGate,
    HashGate,
    MoELayer,
    NoisyTopKGate,
    PermutedGate,
    ReMoEGate,
    SigmoidGate,
    SinkhornGate,
    SoftmaxGate,
    SoftMoEGate,
    StackedExperts,
    StagedSchedule,
    SwitchGate,
    ThresholdGate,
    TopKGate,
    TopPGate,
    collect_routing,
    update_gates,
)
from core_gates.routing import PermutationSearch, count_routed, read_counts
from tests.core_gates.drawn import filled

DIM, EXPERTS = 4, 5
SEARCH = PermutationSearch(3, start=0.1, end=0.01)


@dataclass(frozen=True)
class Case:
    """A gate of ``n`` experts, of which a token uses ``k`` if the gate knows such a number.

    ``sees_x``: the features decide. ``fixed_losses``: some losses are of the parameters alone.
    """

    make: Callable[[int, int], Gate]
    sees_x: bool = True
    fixed_losses: bool = False


GATES = {
    "softmax": Case(lambda n, k: SoftmaxGate(DIM, n)),
    "top-k": Case(lambda n, k: TopKGate(DIM, n, k=k)),
    "sigmoid": Case(lambda n, k: SigmoidGate(DIM, n)),
    "balanced sigmoid": Case(lambda n, k: SigmoidGate(DIM, n, k=k, balance_rate=0.1)),
    "noisy top-k": Case(lambda n, k: NoisyTopKGate(DIM, n, k=k)),
    "switch": Case(lambda n, k: SwitchGate(DIM, n)),
    "grouped switch": Case(lambda n, k: SwitchGate(DIM, n, group_dim=-2)),
    "base layer": Case(lambda n, k: BaseLayerGate(DIM, n)),
    "expert choice": Case(lambda n, k: ExpertChoiceGate(DIM, n)),
    "sinkhorn": Case(lambda n, k: SinkhornGate(DIM, n, k=k)),
    "soft moe": Case(lambda n, k: SoftMoEGate(DIM, n, num_slots=k)),
    "gshard": Case(lambda n, k: GShardGate(DIM, n)),
    "gshard sampling": Case(lambda n, k: GShardGate(DIM, n, second_policy="sampling")),
    "gshard by priority": Case(lambda n, k: GShardGate(DIM, n, prioritized=True)),
    "hash": Case(lambda n, k: HashGate(DIM, n, num_ids=99, k=k), sees_x=False),
    "cosine": Case(lambda n, k: CosineGate(DIM, n, k=k, projection_dim=3)),
    "top-p": Case(lambda n, k: TopPGate(DIM, n, p=1.0 if k == n else 0.5)),
    "threshold": Case(lambda n, k: ThresholdGate(DIM, n, threshold=0.3, renormalize=True)),
    "remoe": Case(lambda n, k: ReMoEGate(DIM, n, k=k)),
    "activation": Case(lambda n, k: ActivationGate(DIM, n)),
    "comet": Case(lambda n, k: CometGate(DIM, n, k=k, gamma=4.0)),
    "dselect-k": Case(lambda n, k: DSelectKGate(DIM, n, k=k, gamma=4.0)),
    "dense to sparse": Case(lambda n, k: DenseToSparseGate(DIM, n)),
    "hardened": Case(lambda n, k: DenseToSparseGate(DIM, n, stages=StagedSchedule(0, 0))),
    "hard concrete": Case(lambda n, k: HardConcreteGate(DIM, n)),
    "shared": Case(lambda n, k: DenseToSparseGate(DIM, n, stages=StagedSchedule(9, 1))),
    "static dselect-k": Case(
        lambda n, k: DSelectKGate(DIM, n, k=k, gamma=4.0, per_example=False),
        sees_x=False,
        fixed_losses=True,
    ),
    "permuted comet": Case(
        lambda n, k: PermutedGate(CometGate(DIM, n, k=k), search=SEARCH), fixed_losses=True
    ),
    "permuted top-k": Case(
        lambda n, k: PermutedGate(TopKGate(DIM, n, k=k), search=SEARCH), fixed_losses=True
    ),
}


@pytest.fixture(params=GATES)
def case(request):
    return GATES[request.param]


@pytest.fixture(params=["training", "evaluation"])
def make(case, request):
    def build(num_experts=EXPERTS, k=2):
        gate = case.make(num_experts, k).train(request.param == "training")
        return filled(gate, permutation_logits=0.05)

    return build


def positions(*shape):
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(2))


def route(gate, x, ids=None, padding_mask=None):
    """Route with the same noise, and the same ids of the tokens, on every call."""
    torch.manual_seed(0)
    if ids is None:
        ids = torch.arange(x.shape[:-1].numel()).view(x.shape[:-1]) % 99
    return gate(x, ids=ids, padding_mask=padding_mask)


def dense(gate, routing):
    return routing.to_dense(gate.num_experts).weights


def assert_trains(gate, routing):
    """Check that weights, losses, gradients and the state after an update are finite."""
    loss = dense(gate, routing).square().sum() + sum((routing.aux or {}).values())
    assert loss.isfinite()
    if loss.requires_grad:
        loss.backward()
    gradients = [p.grad for p in gate.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    with torch.no_grad():
        gate.update(gate.summary(routing) if gate.learns_from_routings else None)
    assert all(buffer.isfinite().all() for buffer in gate.buffers())


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_position(make, case, shape):
    gate = make()
    routing = route(gate, positions(*shape).requires_grad_())
    assert dense(gate, routing).shape == (*shape, EXPERTS)
    assert case.fixed_losses or not any((routing.aux or {}).values())
    assert not count_routed(routing, EXPERTS).any()
    assert_trains(gate, routing)


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_one_position(make, shape):
    gate = make()
    routing = route(gate, positions(*shape))
    assert dense(gate, routing).shape == (*shape, EXPERTS)
    assert dense(gate, routing).isfinite().all()
    if not gate.training and not gate.couples_tokens:
        among = route(gate, positions(*shape).expand(3, *shape[1:], DIM).clone())
        assert_close(dense(gate, routing)[0], dense(gate, among)[0])
    assert_trains(gate, routing)


@pytest.mark.parametrize("num_experts", [2, 3, 7])
def test_as_many_choices_as_experts_and_odd_numbers_of_them(make, num_experts):
    gate = make(num_experts, k=num_experts)
    routing = route(gate, positions(6))
    weights = dense(gate, routing)
    assert weights.shape == (6, num_experts)
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    if routing.indices is not None and routing.indices.shape[-1] == num_experts:
        everyone = torch.arange(num_experts).expand(6, num_experts)
        assert torch.equal(routing.indices.sort(-1).values, everyone)
    assert_trains(gate, routing)


def test_nothing_but_padding(make, case):
    gate = make()
    before = {name: buffer.clone() for name, buffer in gate.named_buffers()}
    x, mask = torch.full((2, 3, DIM), torch.nan), torch.ones(2, 3, dtype=torch.bool)
    routing = route(gate, x, padding_mask=mask)
    assert not dense(gate, routing).any()
    assert not count_routed(routing, EXPERTS).any()
    assert case.fixed_losses or not any((routing.aux or {}).values())
    assert_trains(gate, routing)
    gradients = [p.grad for p in gate.parameters() if p.grad is not None]
    assert case.fixed_losses or not any(gradient.any() for gradient in gradients)
    if gate.learns_from_routings:
        assert_close(dict(gate.named_buffers()), before, rtol=0, atol=0)


def test_one_expert_takes_everything(make):
    gate = make()
    x, ids = positions(1).expand(40, DIM).clone(), torch.zeros(40, dtype=torch.int64)
    routing = route(gate, x, ids)
    counts = count_routed(routing, EXPERTS)
    if not gate.training and not gate.couples_tokens:
        assert set(counts.tolist()) <= {0, 40}
    if routing.kept is not None and gate.couples_tokens:
        assert counts.max() < 40
    assert (dense(gate, routing) != 0).any()
    assert_trains(gate, routing)


def test_layout_of_the_input_does_not_matter(make):
    x = positions(3, 6)
    expected = route(make(), x)
    strided = torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    for other in (x.mT.contiguous().mT, x.transpose(0, 1).contiguous().transpose(0, 1), strided):
        assert not other.is_contiguous()
        gate = make()
        routing = route(gate, other.requires_grad_())
        assert_close((dense(gate, routing), routing.aux), (dense(gate, expected), expected.aux))
        assert_trains(gate, routing)


def test_gradient_of_stride_zero(make):
    gradients = []
    for cotangent in (torch.ones(6, EXPERTS), torch.ones(()).expand(6, EXPERTS)):
        gate, x = make(), positions(6).requires_grad_()
        weights = dense(gate, route(gate, x))
        if weights.requires_grad:
            weights.backward(cotangent)
        gradients.append([x.grad, *(p.grad for p in gate.parameters())])
    assert_close(*gradients)


def test_nan_is_flagged_with_the_counts_and_the_error_names_the_gate(refuses, make, case):
    gate, x = make(), positions(6)
    expected = dense(gate, route(gate, x))
    x[0, 1] = torch.nan
    with GateMonitor(torch.nn.ModuleDict({"router": gate})) as monitor:
        with torch.no_grad():
            routing = route(gate, x)
        if gate.training:
            update_gates(gate)
        non_finite = monitor.compute()["router"]["non_finite"]
    assert all(buffer.isfinite().all() for buffer in gate.buffers())
    flag = int(count_routed(routing, EXPERTS)[-1])
    if not case.sees_x:
        assert flag == non_finite == 0
        return
    assert flag >= 1
    assert non_finite >= 1
    if not gate.couples_tokens:
        assert flag == 1
        assert_close(dense(gate, routing)[1:], expected[1:], rtol=0, atol=0)
    with pytest.raises(GatesError, match=r"gate 'layers\.3\.router' routed"):
        read_counts(count_routed(routing, EXPERTS), "layers.3.router")
    layer = MoELayer(gate, StackedExperts(EXPERTS, DIM, 3))
    ids = torch.zeros(6, dtype=torch.int64)
    if routing.indices is None and routing.dispatch is None:  # dense weights become choices
        refuses(GatesError, ("the gate returned", lambda: layer(x, ids=ids)))
    else:
        assert layer(x, ids=ids)[0].isnan().any()


def test_layers_bear_the_hard_inputs(make):
    layer = MoELayer(make(), StackedExperts(EXPERTS, DIM, 3))
    mask = torch.tensor([[True, True], [False, True]])
    x = positions(2, 2).masked_fill(mask.unsqueeze(-1), torch.nan)
    ids = torch.zeros(2, 2, dtype=torch.int64)
    with collect_routing(layer) as routings, torch.autocast("cpu", dtype=torch.bfloat16):
        y, routing = layer(x, ids=ids, padding_mask=mask)
        nothing, _ = layer(x[:0], ids=ids[:0])
    assert nothing.shape == (0, 2, DIM)
    assert not y[mask].any()
    assert y.isfinite().all()
    assert routings["gate"][0] is routing
