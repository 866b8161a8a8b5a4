from copy import deepcopy

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from core_gates import (
    GateMonitor,
    HashGate,
    MaskedMixture,
    MultiGate,
    SoftmaxGate,
    TopKGate,
    collect_routing,
    kernels,
)
from tests.core_gates.drawn import filled

DIM, FEATURES = 6, 4
# Two tasks with one expert each, a category expert, two shared experts.
MASK = torch.tensor([[1, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
OWN = torch.tensor([[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)


def batch(num_experts, *leading, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(*leading, DIM, generator=generator, dtype=dtype)
    return x, torch.randn(*leading, num_experts, FEATURES, generator=generator, dtype=dtype)


@pytest.fixture
def home():
    return filled(MaskedMixture(DIM, MASK, self_mask=OWN, dtype=torch.float64))


def test_rows_of_the_weight_follow_the_masks(home):
    x, experts = batch(5, 7)
    counts = [int(row.sum()) for row in (*MASK, *OWN)]
    logits = (x @ home.weight.mT + home.bias).split(counts, -1)
    expected = []
    for gate, own, row, own_row in zip(logits[:3], logits[3:], MASK, OWN, strict=True):
        own = own.sigmoid() if own.shape[-1] == 1 else own.softmax(-1)
        expected.append(
            torch.einsum("be,bed->bd", gate.softmax(-1), experts[:, row])
            + torch.einsum("be,bed->bd", own, experts[:, own_row])
        )
    assert_close(home(x, experts), torch.stack(expected, 1), rtol=0, atol=1e-13)
    assert_close(home.weights(x) @ experts, home(x, experts), rtol=0, atol=1e-13)


def test_parameters_are_those_of_visible_experts_alone(home):
    assert home.weight.shape == (int(MASK.sum() + OWN.sum()), DIM)
    assert set(home.state_dict()) == {"weight", "bias"}


def test_forbidden_experts_get_exactly_zero_gradient(home):
    """Every pair of gate and expert against the table."""
    x, experts = batch(5, 7)
    experts.requires_grad_()
    mixed = home(x, experts)
    for s in range(len(MASK)):
        (grad,) = torch.autograd.grad(mixed[:, s].sum(), experts, retain_graph=True)
        assert torch.equal((grad != 0).any(-1).any(0), MASK[s] | OWN[s])


def test_gradients(home):
    x, experts = batch(5, 3)
    names, parameters = zip(*home.named_parameters(), strict=True)

    def call(x, experts, *parameters):
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(home, state, (x, experts))

    assert gradcheck(call, (x.requires_grad_(), experts.requires_grad_(), *parameters))


def test_without_self_gates_and_mask_it_is_mmoe():
    x, experts = batch(4, 2, 5)
    gates = [SoftmaxGate(DIM, 4, bias=True, dtype=torch.float64) for _ in range(3)]
    mixture = MaskedMixture(DIM, torch.ones(3, 4, dtype=torch.bool), dtype=torch.float64)
    mixture.load_state_dict(
        {
            "weight": torch.cat([g.weight for g in gates]),
            "bias": torch.cat([filled(g).bias for g in gates]),
        }
    )
    mixture.weight.data.copy_(torch.cat([g.weight for g in gates]))
    assert_close(mixture(x, experts), MultiGate(gates)(x, experts), rtol=0, atol=1e-13)


def test_cgc_from_any_gates_equals_the_masked_mixture():
    x, experts = batch(5, 7)
    gates = [
        filled(SoftmaxGate(DIM, int(row.sum()), bias=True, dtype=torch.float64)) for row in MASK
    ]
    cgc = MaskedMixture(DIM, MASK, dtype=torch.float64)
    cgc.weight.data.copy_(torch.cat([g.weight for g in gates]))
    cgc.bias.data.copy_(torch.cat([g.bias for g in gates]))
    multi = MultiGate(gates, MASK)
    assert_close(multi(x, experts), cgc(x, experts), rtol=0, atol=1e-13)
    assert torch.equal(multi.weights(x) != 0, MASK.expand(7, -1, -1))


def test_permuting_experts_with_their_rows_changes_nothing(home):
    x, experts = batch(5, 7)
    order = torch.tensor([2, 4, 0, 3, 1])
    permuted = MaskedMixture(DIM, MASK[:, order], self_mask=OWN[:, order], dtype=torch.float64)
    tables = torch.stack([MASK, OWN])
    row_of = torch.full(tables.shape, -1).masked_scatter(tables, torch.arange(len(home.weight)))
    rows = row_of[..., order][tables[..., order]]
    permuted.load_state_dict({"weight": home.weight[rows], "bias": home.bias[rows]})
    assert_close(permuted(x, experts[:, order]), home(x, experts), rtol=0, atol=1e-13)


def test_sparse_gates_mix_too():
    x, experts = batch(5, 7)
    gates = [TopKGate(DIM, 5, k=2, dtype=torch.float64), SoftmaxGate(DIM, 5, dtype=torch.float64)]
    multi = MultiGate(gates)
    with collect_routing(multi) as routings:
        mixed = multi(x, experts)
    (top,) = routings["gates.0"]
    chosen = experts.gather(1, top.indices.unsqueeze(-1).expand(-1, -1, FEATURES))
    assert_close(mixed[:, 0], (top.weights.unsqueeze(-1) * chosen).sum(1), rtol=0, atol=1e-13)
    assert ((multi.weights(x)[:, 0] != 0).sum(-1) == 2).all()


@pytest.mark.fault("core F9")
def test_gates_by_identity_and_padding():
    x, experts = batch(5, 4)
    hashed = HashGate(DIM, 5, num_ids=3, dtype=torch.float64)
    multi = MultiGate([SoftmaxGate(DIM, 5, dtype=torch.float64), hashed])
    ids, mask = torch.tensor([2, 0, 2, 1]), torch.tensor([False, False, False, True])
    expected = multi(x, experts, ids=ids)
    assert_close(expected[:, 1], experts[torch.arange(4), hashed.table[ids, 0]])
    x[3] = experts[3] = torch.nan
    mixed = multi(x, experts, ids=ids, padding_mask=mask)
    assert_close(mixed[:3], expected[:3], rtol=0, atol=0)
    assert not mixed[3].any()
    assert not multi.weights(x, ids=ids, padding_mask=mask)[3].any()


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,)])
def test_shapes(home, leading):
    x, experts = batch(5, *leading)
    assert home(x, experts).shape == (*leading, 3, FEATURES)
    assert home.weights(x).shape == (*leading, 3, 5)
    assert home.gate_values(x, experts).shape == (*leading, len(home.weight))
    assert MultiGate([SoftmaxGate(DIM, 5, dtype=torch.float64)])(x, experts).shape == (
        *leading,
        1,
        FEATURES,
    )


def test_gates_are_float32_under_autocast_and_results_keep_the_dtype_of_the_experts(home):
    x, experts = batch(5, 7, dtype=torch.float32)
    home = home.float()
    expected = home.weights(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights, mixed = home.weights(x), home(x, experts.bfloat16())
    assert_close(weights, expected, rtol=0, atol=0)
    assert mixed.dtype == torch.bfloat16


def test_gates_of_a_mixture_are_reset_with_it():
    x, _ = batch(5, 7, dtype=torch.float32)
    multi = MultiGate([SoftmaxGate(DIM, 5, device="meta")]).to_empty(device="cpu")
    multi.places.fill_(0)
    multi.reset_parameters()
    assert_close(multi.weights(x).sum(-1), torch.ones(7, 1))


def test_copies_and_compilation(home):
    x, experts = batch(5, 7)
    assert_close(deepcopy(home)(x, experts), home(x, experts))
    compiled = torch.compile(home, backend="eager", fullgraph=True)
    assert_close(compiled(x, experts), home(x, experts))


def test_the_monitor_sees_the_weights_of_visible_experts(home):
    monitor = GateMonitor(torch.nn.Sequential(home))
    x, experts = batch(5, 7)
    home(x, experts)
    (values,) = monitor.compute().values()
    assert_close(values["mean"], home.gate_values(x, experts).mean().item())
    assert values["values"] == 7 * len(home.weight)


def test_gates_may_read_an_input_each(home):
    reads = [1, 0, 1]
    several = MaskedMixture(DIM, MASK, self_mask=OWN, reads=reads, dtype=torch.float64)
    several.load_state_dict(home.state_dict())
    x, experts = batch(5, 7, 2)
    x, experts = x, experts[:, 0]
    expected = torch.stack([home(x[:, i], experts)[:, s] for s, i in enumerate(reads)], 1)
    assert_close(several(x, experts), expected, rtol=0, atol=1e-13)
    weights = torch.stack([home.weights(x[:, i])[:, s] for s, i in enumerate(reads)], 1)
    assert_close(several.weights(x), weights, rtol=0, atol=1e-13)


def test_free_weights_of_the_residual_path():
    """AdaTT: a lone own expert is added as it is, several with weights that no input changes."""
    mixture = MaskedMixture(DIM, MASK, self_mask=OWN, self_weights="free", dtype=torch.float64)
    assert mixture.self_weight.shape == (2,)
    assert mixture.self_weight.abs().max() <= 2**-0.5
    gates = MaskedMixture(DIM, MASK, dtype=torch.float64)
    gates.load_state_dict({"weight": mixture.weight, "bias": mixture.bias})
    x, experts = batch(5, 7)
    residual = (mixture(x, experts) - gates(x, experts)).unbind(1)
    assert_close((residual[0], residual[1]), (experts[:, 0], experts[:, 1]))
    first, second = mixture.self_weight
    assert_close(residual[2], first * experts[:, 3] + second * experts[:, 4])
    assert_close(mixture.weights(x) @ experts, mixture(x, experts))
    assert_close(mixture.weights(x, residual=False), gates.weights(x))
    torch.autograd.grad(mixture(x, experts).sum(), mixture.self_weight)


def test_weights_with_and_without_the_residual_path(home):
    x, _ = batch(5, 7)
    plain = home.weights(x, residual=False)
    assert_close(plain.sum(-1), torch.ones(7, 3, dtype=torch.float64))
    assert torch.equal(plain != 0, MASK.expand(7, -1, -1))
    assert torch.equal(home.weights(x) - plain > 0, OWN.expand(7, -1, -1))


DENSE = torch.ones(3, 5, dtype=torch.bool)
SPARSE = torch.tensor([[1, 0, 0, 0, 1], [0, 1, 0, 0, 1], [0, 0, 0, 1, 0]], dtype=torch.bool)


@pytest.mark.parametrize("mode", ["reference", "cpp"])
@pytest.mark.parametrize("own", [OWN, None], ids=["self gates", "plain"])
@pytest.mark.parametrize("mask", [SPARSE, MASK, DENSE], ids=["sparse", "groups", "dense"])
def test_float32_is_computed_another_way_with_the_same_results(mask, own, mode, cpp):
    exact = filled(MaskedMixture(DIM, mask, self_mask=own, dtype=torch.float64))
    mine = MaskedMixture(DIM, mask, self_mask=own)
    mine.load_state_dict(exact.state_dict())
    x, experts = batch(5, 9)
    weights = torch.randn(
        9, 3, FEATURES, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    results = []
    for mixture, dtype in ((exact, torch.float64), (mine, torch.float32)):
        inputs = [t.to(dtype).requires_grad_() for t in (x, experts)]
        tensors = [*inputs, *mixture.parameters()]
        with kernels(mode):
            y = mixture(*inputs)
        slopes = torch.autograd.grad((y * weights.to(dtype)).sum(), tensors, create_graph=True)
        results.append([y, *slopes, *torch.autograd.grad(slopes[0].square().sum(), tensors)])
    for one, other in zip(*results, strict=True):
        scale = max(one.abs().max().item(), 1.0)
        assert_close(other.double(), one, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MaskedMixture(0, MASK), "dim must be at least 1, got 0"),
        (lambda: MaskedMixture(3, MASK.int()), "must be boolean tables"),
        (lambda: MaskedMixture(3, MASK, self_mask=OWN[:2]), "of one shape"),
        (lambda: MaskedMixture(3, torch.tensor([[True], [False]])), r"gates \[1\] see no expert"),
        (lambda: MaskedMixture(3, MASK, reads=[0, 1]), "an input for each of 3 gates"),
        (
            lambda: MaskedMixture(3, MASK, self_weights="learned"),
            "choose one of gate, free, trained",
        ),
        (lambda: MultiGate([]), "at least one gate"),
        (lambda: MultiGate([SoftmaxGate(3, 4)], MASK), r"boolean table \(1, experts\)"),
        (lambda: MultiGate([SoftmaxGate(3, 4)], MASK[2:]), "over 4 experts, its row .* shows 5"),
        (
            lambda: MultiGate([SoftmaxGate(DIM, 4)])(torch.zeros(2, DIM), torch.zeros(2, 5, 3)),
            "expected 4 experts, found 5",
        ),
    ],
)
def test_arguments_are_checked(refuses, build, message):
    refuses(ValueError, (message, lambda: build()))
