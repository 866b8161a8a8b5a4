"""The hard inputs, for gates with losses or weights that do not depend on the tokens.

These are permuted gates, static selectors, and a staged gate whose experts are still shared.
"""

import pytest
import torch
from torch.testing import assert_close

from core_gates import (
    CometGate,
    DenseToSparseGate,
    DSelectKGate,
    GatesError,
    PermutedGate,
    StagedSchedule,
    TopKGate,
)
from core_gates.routing import PermutationSearch, count_routed, read_counts

DIM = 4
SEARCH = PermutationSearch(3, start=0.1, end=0.01)
GATES = {
    "static dselect-k": lambda n: DSelectKGate(DIM, n, k=n, gamma=4.0, per_example=False),
    "shared": lambda n: DenseToSparseGate(DIM, n, stages=StagedSchedule(1, 1)),
    "permuted comet": lambda n: PermutedGate(CometGate(DIM, n, k=n), search=SEARCH),
    "permuted top-k": lambda n: PermutedGate(TopKGate(DIM, n, k=n), search=SEARCH),
}
COUNTS = [2, 5, 9]


@pytest.fixture(params=GATES)
def name(request):
    return request.param


@pytest.fixture(params=["training", "evaluation"])
def make(name, request):
    def build(num_experts=5):
        gate = GATES[name](num_experts).train(request.param == "training")
        generator = torch.Generator().manual_seed(1)
        for key, parameter in gate.named_parameters():
            scale = 0.05 if key == "permutation_logits" else 1.0
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))
        torch.manual_seed(0)
        return gate

    return build


def positions(*shape):
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(2))


def assert_finite_training(gate, routing):
    loss = routing.to_dense(gate.num_experts).weights.sum() + sum((routing.aux or {}).values())
    assert loss.isfinite()
    loss.backward()
    gradients = [p.grad for p in gate.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (1,), (1, 1)])
def test_no_position_and_one(make, shape):
    gate = make()
    routing = gate(positions(*shape))
    weights = routing.to_dense(5).weights
    assert weights.shape == (*shape, 5)
    assert weights.isfinite().all()
    assert_finite_training(gate, routing)


@pytest.mark.parametrize("num_experts", COUNTS)
def test_as_many_choices_as_experts(make, num_experts):
    gate = make(num_experts)
    with torch.no_grad():
        weights = gate(positions(6)).to_dense(num_experts).weights
    assert weights.shape == (6, num_experts)
    assert (weights >= 0).all()
    assert (weights.sum(-1) > 0).all()
    assert (weights.sum(-1) <= 1 + 1e-5).all()


def test_nothing_but_padding(make):
    gate = make()
    mask = torch.ones(2, 3, dtype=torch.bool)
    routing = gate(torch.full((2, 3, DIM), torch.nan), padding_mask=mask)
    assert not routing.to_dense(5).weights.any()
    assert not count_routed(routing, 5).any()
    searching = getattr(gate, "phase", "") == "search" and gate.training
    for key, loss in (routing.aux or {}).items():
        if key == "permutation_entropy":
            assert (loss > 0) == searching
        elif not isinstance(gate, DSelectKGate):
            assert loss == 0, key
    assert_finite_training(gate, routing)


def test_layout_and_gradient_strides_do_not_matter(make):
    gate, x = make(), positions(3, 5)
    rng = torch.get_rng_state()
    expected = gate(x).to_dense(5).weights
    for other in (x.mT.contiguous().mT, torch.stack([x, x], -1)[..., 0]):
        assert not other.is_contiguous()
        torch.set_rng_state(rng)
        leaf = other.clone(memory_format=torch.preserve_format).requires_grad_()
        weights = gate(leaf).to_dense(5).weights
        assert_close(weights, expected)
        weights.backward(torch.ones(1, 1, 1).expand(3, 5, 5))
        assert leaf.grad is None or leaf.grad.isfinite().all()


def test_one_expert_takes_everything(make, name):
    gate, x = make(), positions(40).abs()
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.zero_()
        if isinstance(gate, DSelectKGate):
            gate.code_weight.fill_(-9.0)
            wanted = 0
        elif isinstance(gate, PermutedGate):
            gate.permutation_logits.copy_(9 * torch.eye(5).roll(1, 0))
            wanted = 2  # becomes of expert 3 of the gate
            if name == "permuted top-k":
                gate.gate.weight[3] = 99.0
            else:
                gate.gate.leaf_bias[:, 3] = 99.0
        else:
            gate.weight[3] = 99.0
            wanted = 0
    routing = gate(x)
    expected = torch.zeros(40, 5)
    expected[:, wanted] = 1
    assert_close(routing.to_dense(5).weights, expected, rtol=0, atol=1e-5)
    assert_finite_training(gate, routing)


def test_nan_reaches_the_counts_and_names_the_gate(make, name):
    gate, x = make(), positions(6)
    x[2, 1] = torch.nan
    counts = count_routed(gate(x), 5)
    if name == "static dselect-k":  # which does not depend on its input
        assert len(read_counts(counts)) == 5
        return
    assert counts[-1] == 1
    with pytest.raises(GatesError, match=r"gate 'layers\.3' routed 1 token with weights that"):
        read_counts(counts, "layers.3")
