import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.testing import assert_close

from core_gates import GatesError, StackedExperts
from core_gates.moe import GatedMlp
from tests.core_gates.drawn import filled, randn

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
    assert_close((experts.dense(x), experts.single(x, 2)), (expected, expected[..., 2, :]))
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
    filled(experts.double())
    x = randn(5, DIM)
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
    "identity": lambda: nn.Sequential(
        nn.Linear(DIM, HIDDEN), nn.Identity(), nn.Linear(HIDDEN, DIM)
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_copies_of_a_dense_network_compute_the_same(name):
    mlp = NETWORKS[name]()
    x = torch.randn(7, DIM)
    experts = StackedExperts.from_dense(mlp, 3)
    assert experts.num_experts == 3
    assert_close(experts.dense(x), mlp(x).unsqueeze(1).expand(-1, 3, -1))
    networks = [NETWORKS[name]() for _ in range(2)]
    several = StackedExperts.from_dense(nn.ModuleList(networks))
    assert_close(several.dense(x), torch.stack([network(x) for network in networks], 1))
    assert {p.dtype for p in StackedExperts.from_dense(mlp.double(), 2).parameters()} == {
        torch.float64
    }


def test_copies_do_not_share_memory():
    mlp = GatedMlp(DIM, HIDDEN)
    before = copy.deepcopy(mlp.state_dict())
    nn.init.zeros_(StackedExperts.from_dense(mlp, 2).gate_up_proj)
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
def test_what_cannot_be_copied(refuses, arguments, message):
    refuses(ValueError, (message, lambda: StackedExperts.from_dense(*arguments)))


class Swish(nn.Module):
    """What ``silu`` computes, as a module of an unknown kind."""

    def forward(self, x):
        return x * x.sigmoid()


def test_an_unseen_activation_can_be_named():
    mlp, x = GatedMlp(DIM, HIDDEN, activation=Swish()), torch.randn(7, DIM)
    experts = StackedExperts.from_dense(mlp, 2, activation="silu")
    assert experts.activation == "silu"
    assert_close(experts.single(x, 1), mlp(x))


class OfFunctions(nn.Module):
    """Two layers, with what a function computes between them."""

    def __init__(self, function, **others):
        super().__init__()
        self.function = function
        self.fc1, self.fc2 = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)
        for name, module in others.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.fc2(self.function(self.fc1(x)))


def without_last(mlp):
    """As many networks begin: the last weights are zero."""
    nn.init.zeros_(mlp.fc2.weight)
    return mlp


def layers(*between, first=()):
    return nn.Sequential(*first, nn.Linear(DIM, HIDDEN), *between, nn.Linear(HIDDEN, DIM))


@pytest.mark.fault("dense copies")
@pytest.mark.parametrize(
    ("mlp", "options", "refused"),
    [
        (layers(nn.GELU(), first=[nn.LayerNorm(DIM)]), {}, r"Sequential has '0' \(LayerNorm\)"),
        (layers(nn.ReLU(), nn.Softplus()), {}, r"Sequential has '2' \(Softplus\)"),
        (layers(nn.ReLU(), nn.GELU()), {"activation": "relu"}, r"Sequential has '2' \(GELU\)"),
        (layers(nn.PReLU()), {"activation": "relu"}, r"Sequential has '1' \(PReLU\)"),
        (
            layers(nn.Sequential(nn.ReLU(), nn.Linear(HIDDEN, HIDDEN))),
            {},
            r"Sequential has '1.1' \(Linear\)",
        ),
        (
            OfFunctions(F.relu, gamma=nn.Parameter(torch.ones(1))),
            {"activation": "relu"},
            r"OfFunctions has 'gamma' \(Parameter\)",
        ),
    ],
)
def test_what_experts_cannot_copy_is_refused_by_name(mlp, options, refused):
    message = (
        f"^{refused}, which experts cannot copy: expected linear layers, one activation, Dropout "
        "and Identity; leave it out, or apply it before or after the experts$"
    )
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match=message):
            StackedExperts.from_dense(mlp.to(device), 2, **options)


@pytest.mark.fault("dense copies")
@pytest.mark.parametrize(
    ("mlp", "activation"),
    [
        (OfFunctions(lambda x: F.relu(x) ** 2), "relu"),
        (OfFunctions(F.relu, norm=nn.Identity()), None),
        (OfFunctions(F.gelu), "gelu_tanh"),
        (GatedMlp(DIM, HIDDEN, activation=nn.Hardswish()), "silu"),
        (nn.Sequential(nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM), nn.ReLU()), None),
        (layers(nn.ReLU6()), "relu"),
        (OfFunctions(lambda x: F.relu(x.clamp(-7, 7))), "relu"),
        (OfFunctions(lambda x: x * (1.702 * x).sigmoid()).bfloat16(), "gelu"),
        (without_last(OfFunctions(lambda x: F.relu(x) ** 2)), "relu"),
    ],
)
def test_another_function_than_that_of_experts_is_refused(refuses, mlp, activation):
    message = (
        rf"^experts that copy {type(mlp).__name__} differ from it by \S+ where its "
        r"(outputs|hidden features) reach \S+: expected "
        r"down\(\w+\((up\(x\)\)|gate\(x\)\) \* up\(x\))\); pass another activation=, or apply "
        r"the rest before or after the experts$"
    )
    refuses(ValueError, (message, lambda: StackedExperts.from_dense(mlp, 2, activation=activation)))


@pytest.mark.fault("dense copies")
def test_each_of_several_networks_is_compared():
    networks = [layers(nn.ReLU()) for _ in range(3)]
    networks[2].register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match="experts that copy Sequential differ from it by"):
        StackedExperts.from_dense(networks)


@pytest.mark.fault("dense copies")
@pytest.mark.parametrize(
    "other",
    [
        layers(nn.GELU()),
        GatedMlp(DIM, HIDDEN, activation=nn.ReLU(), bias=True),
        nn.Sequential(nn.Linear(DIM, 3), nn.ReLU(), nn.Linear(3, DIM)),
        nn.Sequential(
            nn.Linear(DIM, HIDDEN, bias=False), nn.ReLU(), nn.Linear(HIDDEN, DIM, bias=False)
        ),
    ],
)
def test_experts_are_of_one_form(other):
    with pytest.raises(ValueError, match="the networks of one stack must be alike, found "):
        StackedExperts.from_dense([layers(nn.ReLU()), other])


class Odd(OfFunctions):
    def forward(self, x):
        return self.function(self, x)


@pytest.mark.fault("dense copies")
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda mlp, x: x[0, 0, 0, 0], r"Odd cannot be called with tokens \(N, D\): IndexErr"),
        (lambda mlp, x: (x, None), r"returns tuple for tokens, expected a tensor \(16, 6\)"),
        (
            lambda mlp, x: mlp.fc1(x),
            r"returns \(16, 10\) for tokens, expected a tensor \(16, 6\)",
        ),
    ],
)
def test_what_does_not_map_tokens_to_tokens_is_refused(function, message):
    with pytest.raises(ValueError, match=message) as refused:
        StackedExperts.from_dense(Odd(function), 2, activation="relu")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("first", "last"),
    [(nn.Linear(DIM, 2 * HIDDEN), nn.Linear(HIDDEN, DIM)), (nn.Linear(DIM, 4), nn.Linear(4, 5))],
)
def test_layers_that_do_not_fit_are_refused(first, last):
    with pytest.raises(
        ValueError, match=r"the weights of Sequential are \(\d+, 6\) .*, expected \(F"
    ):
        StackedExperts.from_dense(nn.Sequential(first, nn.ReLU(), last), 2)


class Noted(nn.Module):
    """ReLU that counts its calls, draws random numbers and keeps its modes in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("modes", torch.zeros(2))

    def forward(self, x):
        self.calls += 1
        self.modes = self.modes + torch.rand(2)
        assert not self.training
        assert not torch.is_grad_enabled()
        return x.clamp(min=0)


@pytest.mark.parametrize("training", [True, False])
def test_the_comparison_leaves_no_trace(training):
    mlp = layers(Noted(), nn.Dropout(0.5)).train(training)
    mlp[2].eval()
    before = copy.deepcopy(mlp.state_dict())
    buffers, modes = list(mlp.buffers()), [module.training for module in mlp.modules()]
    torch.manual_seed(3)
    StackedExperts(2, DIM, HIDDEN, activation="relu", gated=False, bias=True)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    StackedExperts.from_dense(mlp, 2, activation="relu")
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in mlp.modules()] == modes
    assert_close(mlp.state_dict(), before, rtol=0, atol=0)
    assert all(one is other for one, other in zip(mlp.buffers(), buffers, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [True, False])
def test_networks_of_many_features_in_any_dtype_are_copied(gated, dtype):
    first = nn.Sequential(nn.Linear(192, 768), nn.SiLU(), nn.Dropout(), nn.Linear(768, 192))
    mlp = (GatedMlp(192, 768) if gated else first).to(dtype).eval()
    x = torch.randn(5, 192, dtype=dtype)
    assert_close(StackedExperts.from_dense(mlp, 3).single(x, 2), mlp(x))


@pytest.mark.fault("dense copies")
def test_networks_of_timm(refuses):
    layers = pytest.importorskip("timm.layers")
    mlp, x = layers.Mlp(DIM, HIDDEN, drop=0.1), torch.randn(7, DIM)
    assert_close(StackedExperts.from_dense(mlp, 2).single(x, 1), mlp.eval()(x))
    refuses(
        ValueError,
        (
            r"^Mlp has 'norm' \(LayerNorm\), which experts cannot",
            lambda: StackedExperts.from_dense(layers.Mlp(DIM, HIDDEN, norm_layer=nn.LayerNorm), 2),
        ),
        (
            r"^the weights of GluMlp are \(20, 6\) \S+, \(6, 10\)",
            lambda: StackedExperts.from_dense(layers.GluMlp(DIM, 2 * HIDDEN), 2),
        ),
    )


def test_networks_without_memory_are_copied():
    assert StackedExperts.from_dense(two_layers(nn.GELU()).to("meta"), 2).up_proj.is_meta


def test_parametrized_layers_are_copied():
    mlp, x = layers(nn.ReLU()), torch.randn(7, DIM)
    nn.utils.parametrizations.weight_norm(mlp[0])
    assert_close(StackedExperts.from_dense(mlp, 2).single(x, 0), mlp(x))


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
