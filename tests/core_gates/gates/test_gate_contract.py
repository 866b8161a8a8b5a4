"""What holds for every routing gate; a new gate is added to ``GATES``."""

from copy import deepcopy

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from core_gates import (
    ActivationGate,
    CometGate,
    CosineGate,
    DenseToSparseGate,
    DSelectKGate,
    Gate,
    GShardGate,
    HardConcreteGate,
    MlpGate,
    NoisyTopKGate,
    PermutedGate,
    ReMoEGate,
    SigmoidGate,
    SoftmaxGate,
    StagedSchedule,
    SwitchGate,
    TemperatureSchedule,
    ThresholdGate,
    TopKGate,
    TopPGate,
    update_gates,
)
from core_gates.routing import PermutationSearch
from tests.core_gates.drawn import filled, randn

DIM, EXPERTS = 6, 5
SEARCH = PermutationSearch(6, start=0.1, end=0.01)
GATES = {
    "softmax": lambda **o: SoftmaxGate(DIM, EXPERTS, **o),
    "annealed": lambda **o: SoftmaxGate(
        DIM, EXPERTS, tau=TemperatureSchedule(2.0, 0.3, 10), bias=True, **o
    ),
    "mlp": lambda **o: MlpGate(DIM, EXPERTS, hidden_dims=(7, 4), activation="silu", **o),
    "top-k": lambda **o: TopKGate(DIM, EXPERTS, k=2, **o),
    "top-k of all": lambda **o: TopKGate(DIM, EXPERTS, k=3, renormalize=False, bias=True, **o),
    "sigmoid": lambda **o: SigmoidGate(DIM, EXPERTS, bias=True, **o),
    "balanced sigmoid": lambda **o: SigmoidGate(DIM, EXPERTS, k=2, balance_rate=0.1, **o),
    "noisy top-k": lambda **o: NoisyTopKGate(DIM, EXPERTS, **o),
    "switch": lambda **o: SwitchGate(
        DIM, EXPERTS, capacity_factor=None, eval_capacity_factor=None, **o
    ),
    "gshard": lambda **o: GShardGate(
        DIM, EXPERTS, capacity_factor=None, eval_capacity_factor=None, **o
    ),
    "cosine": lambda **o: CosineGate(DIM, EXPERTS, projection_dim=3, **o),
    "top-p": lambda **o: TopPGate(DIM, EXPERTS, **o),
    "threshold": lambda **o: ThresholdGate(DIM, EXPERTS, renormalize=True, **o),
    "remoe": lambda **o: ReMoEGate(DIM, EXPERTS, **o),
    "hard concrete": lambda **o: HardConcreteGate(DIM, EXPERTS, **o),
    "comet": lambda **o: CometGate(DIM, EXPERTS, k=2, gamma=8.0, **o),
    "dselect-k": lambda **o: DSelectKGate(DIM, EXPERTS, k=2, gamma=8.0, **o),
    "static dselect-k": lambda **o: DSelectKGate(DIM, EXPERTS, gamma=8.0, per_example=False, **o),
    "activation": lambda **o: ActivationGate(DIM, EXPERTS, learn_tau=True, **o),
    "dense to sparse": lambda **o: DenseToSparseGate(DIM, EXPERTS, **o),
    "shared": lambda **o: DenseToSparseGate(DIM, EXPERTS, stages=StagedSchedule(2, 3), **o),
    "hardened": lambda **o: DenseToSparseGate(DIM, EXPERTS, stages=StagedSchedule(0, 0), **o),
    "permuted top-k": lambda **o: PermutedGate(TopKGate(DIM, EXPERTS, **o), search=SEARCH, **o),
    "permuted comet": lambda **o: PermutedGate(
        CometGate(DIM, EXPERTS, gamma=8.0, **o), search=SEARCH, **o
    ),
}

NOISY = (DenseToSparseGate, GShardGate, HardConcreteGate, NoisyTopKGate, SwitchGate)
INDEPENDENT = (HardConcreteGate, ReMoEGate)  # every expert has its own weight


@pytest.fixture(params=GATES)
def make(request):
    def build(**options):
        gate = filled(GATES[request.param](**options))
        torch.manual_seed(0)  # for gates that draw noise
        return gate

    return build


def positions(*shape, dtype=torch.float32):
    return randn(*shape, DIM, seed=2, dtype=dtype)


def differentiable(routing):
    return [t for t in (routing.weights, routing.logits, routing.probs) if t is not None]


def assert_same_routing(actual, expected, **tolerance):
    for a, b in zip(actual, expected, strict=True):
        if isinstance(b, torch.Tensor | dict):
            assert_close(a, b, **tolerance)
        else:
            assert a == b


@pytest.mark.parametrize("leading", [(), (7,), (2, 3, 4), (0,), (2, 0)])
def test_shapes(make, leading):
    routing = make()(positions(*leading))
    choices = EXPERTS if routing.indices is None else routing.indices.shape[-1]
    assert routing.weights.shape == (*leading, choices)
    for scores in (routing.probs, routing.logits):
        assert scores is None or scores.shape == (*leading, EXPERTS)
    assert routing.probs is not None
    assert routing.to_dense().weights.shape == (*leading, EXPERTS)


def test_positions_do_not_see_each_other(make):
    gate, x = make().eval(), positions(4, 3)
    assert not gate.couples_tokens
    together = gate(x)._replace(aux=None)
    for i in range(4):
        alone = gate(x[i])._replace(aux=None)
        assert_same_routing(
            alone, type(together)(*(t[i] if t is not None else t for t in together))
        )


def test_weights_are_a_distribution_where_the_gate_says_so(make):
    gate = make()
    sums = gate(positions(9)).to_dense().weights.sum(-1)
    if gate.renormalize or isinstance(gate, SoftmaxGate):
        assert_close(sums, torch.ones(9))
    elif not isinstance(gate, INDEPENDENT):
        assert (sums <= 1 + 1e-6).all()


def test_gradients(make):
    gate = make(dtype=torch.float64)
    gate.train(not isinstance(gate, NOISY))  # which draw noise in training
    x = positions(3, dtype=torch.float64).requires_grad_()

    def outputs(x, *parameters):
        routing = torch.func.functional_call(gate, dict(zip(names, parameters, strict=True)), (x,))
        return tuple(differentiable(routing))

    names, parameters = zip(*gate.named_parameters(), strict=True)
    assert gradcheck(outputs, (x, *parameters))


def test_routing_is_float32_and_the_same_under_autocast(make):
    gate, x = make(), positions(50)
    rng = torch.get_rng_state()
    expected = gate(x)
    torch.set_rng_state(rng)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = gate(x)
    assert_same_routing(routing, expected, rtol=0, atol=0)
    assert {t.dtype for t in differentiable(routing)} == {torch.float32}


def test_bfloat16_modules_route_in_float32(make):
    gate = make().to(torch.bfloat16).eval()
    x = positions(50).bfloat16()
    routing = gate(x)
    assert {t.dtype for t in differentiable(routing)} == {torch.float32}
    exact = deepcopy(gate).float()(x.float())
    assert_same_routing(routing, exact)


def test_state_is_never_rounded_by_a_cast_to_half_precision(make):
    gate = make()
    before = {name: b.clone() for name, b in gate.named_buffers()}
    torch.nn.Sequential(gate).to(torch.bfloat16)
    assert {p.dtype for p in gate.parameters()} == {torch.bfloat16}
    assert_close(dict(gate.named_buffers()), before, rtol=0, atol=0)


def test_ties_go_to_the_lowest_index(make):
    gate = make()
    gate.train(not isinstance(gate, NOISY))  # which draw noise in training
    for parameter in gate.parameters():
        torch.nn.init.zeros_(parameter)
    routing = gate(positions(3))
    if routing.logits is None:  # leaves and codes of equal scores are not equally likely
        assert (routing.weights > 0).all()
        return
    k = min(2, routing.weights.shape[-1])
    assert routing.to_top_k(k).indices.tolist() == [[0, 1][:k]] * 3


def test_padding_weighs_nothing_and_changes_nothing_else(make):
    gate, x = make().eval(), positions(2, 4)
    mask = torch.tensor([[False, True, False, True], [False, False, True, False]])
    x_padded = x.masked_fill(mask.unsqueeze(-1), torch.nan)
    routing, expected = gate(x_padded, padding_mask=mask), gate(x).to_dense().weights
    dense = routing.to_dense().weights
    assert (dense[mask] == 0).all()
    assert_close(dense[~mask], expected[~mask], rtol=0, atol=0)
    if routing.kept is not None:
        assert torch.equal(routing.kept.any(-1), ~mask)
    (dense**2).sum().backward()
    masked = {name: p.grad for name, p in gate.named_parameters() if p.grad is not None}
    gate.zero_grad()
    (gate(x[~mask]).to_dense().weights ** 2).sum().backward()
    assert masked
    for name, parameter in gate.named_parameters():
        if name in masked:
            assert_close(masked[name], parameter.grad)


def test_selectors_sum_to_the_dense_weights(make):
    gate, x = make().eval(), positions(2, 3)
    selectors = gate.selectors(x)
    assert selectors.ndim == 4
    assert_close(selectors.sum(-2), gate(x).to_dense().weights)


@pytest.mark.fault("core F9")
def test_selectors_of_ignored_positions_are_zero(make):
    gate, x = make().eval(), positions(2, 3)
    mask = torch.tensor([[False, True, False], [False, False, True]])
    expected = gate.selectors(x)
    selectors = gate.selectors(x.masked_fill(mask.unsqueeze(-1), torch.nan), padding_mask=mask)
    assert not selectors[mask].any()
    assert_close(selectors[~mask], expected[~mask], rtol=0, atol=0)


def test_forward_changes_no_state(make):
    gate, x = make().train(), positions(5)
    before, rng = deepcopy(gate.state_dict()), torch.get_rng_state()
    gate.eval()(x)
    assert torch.equal(torch.get_rng_state(), rng)
    gate.train()(x).weights.sum().backward()
    assert_close(dict(gate.state_dict()), dict(before), rtol=0, atol=0)


def test_state_resumes_exactly(make):
    gate, twin = make(), make()
    x = positions(5)
    for _ in range(3):
        gate(x)
        update_gates(gate)
    twin.load_state_dict(gate.state_dict())
    routings = []
    for g in (gate, twin):
        torch.manual_seed(1)
        g(x)
        update_gates(g)
        routings.append(g(x))
    assert_same_routing(*routings, rtol=0, atol=0)


def test_activation_checkpointing_is_exact(make):
    gate, x = make(), positions(5)

    def layer(x):
        return gate(x).weights.exp()

    parameters, rng = list(gate.parameters()), torch.get_rng_state()
    plain = torch.autograd.grad(layer(x).sum(), parameters, allow_unused=True)
    torch.set_rng_state(rng)
    again = checkpoint(layer, x, use_reentrant=False)
    again = torch.autograd.grad(again.sum(), parameters, allow_unused=True)
    assert any(gradient is not None for gradient in plain)
    assert_close(again, plain, rtol=0, atol=0)


def test_meta_device(make):
    gate = make(device="meta")
    assert all(t.is_meta for t in gate.state_dict().values())
    mask = torch.empty(3, dtype=torch.bool, device="meta")
    routing = gate(torch.empty(3, DIM, device="meta"), padding_mask=mask)
    assert routing.weights.is_meta
    assert routing.weights.shape[:-1] == (3,)


def test_compiles_into_one_graph(make):
    gate, x = make(), positions(5)
    mask = torch.tensor([True, False, False, True, False])
    compiled = torch.compile(gate, backend="eager", fullgraph=True)
    rng = torch.get_rng_state()
    expected = gate(x, padding_mask=mask)
    torch.set_rng_state(rng)
    assert_same_routing(compiled(x, padding_mask=mask), expected)


def test_every_class_of_gates_has_its_own_limit_of_graphs():
    """Otherwise the gates of a process would share that of one code object."""
    gates = [GATES[name]() for name in ("softmax", "top-k", "sigmoid", "cosine", "top-p", "remoe")]
    codes = [Gate.__call__.__code__, *(type(gate).__call__.__code__ for gate in gates)]
    assert len({id(code) for code in codes}) == 7
    for _ in range(2):
        for gate in gates:
            gate.train(not gate.training)
            torch.compile(gate, backend="eager", fullgraph=True)(positions(3))


def test_defaults_of_the_contract(make):
    gate = make()
    assert gate.phase in gate.phases
    assert f"num_experts={EXPERTS}" in repr(gate)
