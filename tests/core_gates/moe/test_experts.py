import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.testing import assert_close

from core_gates.errors import GatesError
from core_gates.moe.dense_mlp import GatedMlp
from core_gates.moe.experts import StackedExperts

EXPERTS, DIM, HIDDEN = 4, 6, 10


def naive(experts, x, e):
    if experts.gated:
        gate, up = experts.gate_up_proj[e].chunk(2)
        hidden = F.silu(x @ gate.T) * (x @ up.T)
    else:
        hidden = F.silu(x @ experts.up_proj[e].T)
    return hidden @ experts.down_proj[e].T


@pytest.mark.parametrize("gated", [True, False])
def test_formula(gated):
    experts = StackedExperts(EXPERTS, DIM, HIDDEN, gated=gated)
    x = torch.randn(2, 3, DIM)
    expected = torch.stack([naive(experts, x, e) for e in range(EXPERTS)], -2)
    assert_close(experts.dense(x), expected)
    assert_close(experts.single(x, 2), expected[..., 2, :])
    assert_close(experts.batched(x[0].expand(EXPERTS, -1, -1)), expected[0].transpose(0, 1))
    rows, counts = x.flatten(0, 1), torch.tensor([3, 0, 2, 0])
    out = experts.run(rows, counts)
    flat = expected.flatten(0, 1)
    assert_close(out[:5], torch.cat([flat[:3, 0], flat[3:5, 2]]))
    assert not out[5:].any()
    gather = torch.tensor([5, 5, 0, 1, 2])
    assert_close(experts.run(rows, counts, gather=gather)[:3], flat[[5, 5, 0], 0])


@pytest.mark.parametrize("gated", [True, False])
def test_all_methods_agree_with_biases(gated, weight_first):
    experts = StackedExperts(EXPERTS, DIM, HIDDEN, gated=gated, bias=True, activation="gelu_tanh")
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(5, DIM)
    expected = experts.dense(x)
    for e in range(EXPERTS):
        assert_close(experts.single(x, e), expected[:, e])
        counts = torch.zeros(EXPERTS, dtype=torch.int64)
        counts[e] = 5
        assert_close(experts.chosen(x, torch.full((5, 2), e))[:, 1], expected[:, e])
        assert_close(experts.run(x, counts), expected[:, e])


def mixtral_style(activation):
    mlp = nn.Module()
    mlp.w1, mlp.w3 = nn.Linear(DIM, HIDDEN, bias=False), nn.Linear(DIM, HIDDEN, bias=False)
    mlp.w2 = nn.Linear(HIDDEN, DIM, bias=False)
    mlp.act_fn = activation
    mlp.forward = lambda x: mlp.w2(mlp.act_fn(mlp.w1(x)) * mlp.w3(x))
    return mlp


def two_layers(activation):
    mlp = nn.Module()
    mlp.fc1, mlp.fc2 = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)
    mlp.act = activation
    mlp.forward = lambda x: mlp.fc2(mlp.act(mlp.fc1(x)))
    return mlp


NETWORKS = {
    "gated": lambda: GatedMlp(DIM, HIDDEN),
    "gated with biases": lambda: GatedMlp(DIM, HIDDEN, activation=nn.ReLU(), bias=True),
    "mixtral": lambda: mixtral_style(nn.GELU()),
    "transformer": lambda: two_layers(nn.GELU(approximate="tanh")),
    "sequential": lambda: nn.Sequential(nn.Linear(DIM, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, DIM)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_copies_of_a_dense_network_compute_the_same(name):
    mlp = NETWORKS[name]()
    x = torch.randn(7, DIM)
    experts = StackedExperts.from_dense(mlp, 3)
    assert experts.num_experts == 3
    assert_close(experts.dense(x), mlp(x).unsqueeze(1).expand(-1, 3, -1))
    networks = [NETWORKS[name]() for _ in range(2)]
    several = StackedExperts.from_dense(networks)
    assert_close(several.dense(x), torch.stack([network(x) for network in networks], 1))
    assert {p.dtype for p in StackedExperts.from_dense(mlp.double(), 2).parameters()} == {
        torch.float64
    }


def test_copies_do_not_share_memory():
    mlp = GatedMlp(DIM, HIDDEN)
    before = copy.deepcopy(mlp.state_dict())
    experts = StackedExperts.from_dense(mlp, 2)
    nn.init.zeros_(experts.gate_up_proj)
    assert_close(dict(mlp.state_dict()), dict(before))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((nn.Linear(2, 3), 2), "the linear layers of Linear are named nothing; expected gate_proj"),
        ((GatedMlp(2, 3),), "num_experts is needed where one network is copied"),
        (([GatedMlp(2, 3)], 4), "4 experts cannot copy 1 networks"),
        (([],), "None experts cannot copy 0 networks"),
        ((GatedMlp(2, 3, activation=nn.Tanh()), 2), "the activation of GatedMlp is not evident"),
        (
            (nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2, bias=False)), 2),
            "either all layers of the network must have a bias, or none",
        ),
    ],
)
def test_what_cannot_be_copied(arguments, message):
    with pytest.raises(ValueError, match=message):
        StackedExperts.from_dense(*arguments)


def test_an_unseen_activation_can_be_named():
    mlp = GatedMlp(DIM, HIDDEN, activation=torch.nn.Hardswish())
    assert StackedExperts.from_dense(mlp, 2, activation="silu").activation == "silu"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"hidden_dim": -1}, "hidden_dim must be at least 1, got -1"),
        ({"activation": "mish"}, "activation is 'mish'"),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        StackedExperts(**({"num_experts": 2, "dim": 3, "hidden_dim": 4} | change))


def test_meta_device_and_initial_values():
    experts = StackedExperts(EXPERTS, 64, 128, bias=True, device="meta")
    assert all(p.is_meta for p in experts.parameters())
    experts.to_empty(device="cpu").reset_parameters()
    linear = nn.Linear(64, 128)
    assert_close(experts.gate_up_proj.std(), linear.weight.std(), rtol=0.05, atol=0)
    assert experts.gate_up_proj.abs().max() <= 64**-0.5
    assert 0.9 * 128**-0.5 < experts.down_proj.abs().max() <= 128**-0.5
    assert not experts.down_proj_bias.any()


def test_repr():
    assert "num_experts=4, dim=6, hidden_dim=10, activation=silu" in repr(StackedExperts(4, 6, 10))


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.mark.fault("core A8")
@pytest.mark.parametrize("gated", [True, False])
def test_parametrized_weights_are_used(gated):
    experts = StackedExperts(EXPERTS, DIM, HIDDEN, gated=gated, bias=True)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    halved = copy.deepcopy(experts)
    names = [name for name, _ in experts.named_parameters()]
    for name in names:
        parametrize.register_parametrization(halved, name, Halved())
        experts.get_parameter(name).data /= 2
    x, counts = torch.randn(5, DIM), torch.tensor([2, 0, 3, 0])
    with torch.no_grad():
        indices = torch.randint(EXPERTS, (5, 2))
        assert_close(halved.chosen(x, indices), experts.chosen(x, indices))
    assert_close(halved.run(x, counts), experts.run(x, counts))
    assert_close(halved.dense(x), experts.dense(x))
    halved.run(x, counts).square().sum().backward()
    experts.run(x, counts).square().sum().backward()
    for name in names:
        original = halved.get_parameter(f"parametrizations.{name}.original")
        assert_close(original.grad, experts.get_parameter(name).grad / 2)
    halved.reset_parameters()
    assert not halved.down_proj_bias.any()


@pytest.mark.fault("core A8")
def test_spectral_norm_of_the_stack():
    experts = StackedExperts(EXPERTS, DIM, HIDDEN)
    nn.utils.parametrizations.spectral_norm(experts, "gate_up_proj")
    out = experts.dense(torch.randn(3, DIM))
    out.sum().backward()
    assert_close(
        torch.linalg.matrix_norm(experts.gate_up_proj.flatten(1), 2),
        torch.tensor(1.0),
        atol=0.1,
        rtol=0,
    )


@pytest.mark.fault("core A8")
@pytest.mark.parametrize("method", [torch.ones(2, DIM), "dance", None])
def test_a_call_without_counts_says_what_to_call(method):
    experts = StackedExperts(EXPERTS, DIM, HIDDEN)
    found = repr(method) if isinstance(method, str) else type(method).__name__
    message = f"StackedExperts was called with {found}, expected the name of a method: use a MoE"
    with pytest.raises(GatesError, match=message) as refused:
        experts(method)
    assert len(str(refused.value)) < 200


@pytest.mark.fault("core A7")
def test_rows_by_counts_are_transformed():
    experts, counts = StackedExperts(2, DIM, HIDDEN), torch.tensor([2, 1])
    x = torch.randn(3, DIM, requires_grad=True)
    found = torch.func.grad(lambda x: experts.run(x, counts).square().sum())(x.detach())
    (expected,) = torch.autograd.grad(experts.run(x, counts).square().sum(), x)
    assert_close(found, expected)
