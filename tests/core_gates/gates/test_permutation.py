from itertools import permutations
from math import log

import pytest
import torch
from torch.library import opcheck
from torch.testing import assert_close

from core_gates import (
    CometGate,
    DenseToSparseGate,
    DSelectKGate,
    GatesError,
    HashGate,
    PermutedGate,
    SigmoidGate,
    SoftmaxGate,
    StagedSchedule,
    TopKGate,
    update_gates,
)
from core_gates.routing.assignment import (
    PermutationSearch,
    best_assignments,
    nearest_permutations,
    permutation_entropy,
    sinkhorn,
    sinkhorn_in_one_op,
)
from tests.core_gates.drawn import filled

DIM, EXPERTS = 6, 5
SEARCH = PermutationSearch(6)
GATES = {
    "softmax": lambda: SoftmaxGate(DIM, EXPERTS),
    "top-k": lambda: TopKGate(DIM, EXPERTS, k=2),
    "top-k of all": lambda: TopKGate(DIM, EXPERTS, k=3, renormalize=False),
    "scaled sigmoid": lambda: SigmoidGate(DIM, EXPERTS, k=2, scale=2.5),
    "comet": lambda: CometGate(DIM, EXPERTS, k=2),
    "dselect-k": lambda: DSelectKGate(DIM, EXPERTS, k=2, gamma=4.0),
    "hash": lambda: HashGate(DIM, EXPERTS, num_ids=50),
    "dense to sparse": lambda: DenseToSparseGate(DIM, EXPERTS, stages=StagedSchedule(1, 5)),
}
GOLDEN = [
    "comet_n4_k2_g1_identity",
    "comet_n6_k2_g05_hardshared",
    "comet_n8_k2_g10_soft",
    "comet_n9_k4_g5_hardeach",
    "dselectk_n6_k2_g05",
    "dselectk_n9_k4_g5_perm",
    "topk_n6_k2_identity",
    "topk_n9_k4_hardshared",
]


def positions(*shape):
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(2))


def ids(*shape):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(3))


def permuted(gate, num_steps=6, step=0, **options):
    """Return a permuted gate with seeded parameters after some updates."""
    wrapped = PermutedGate(gate, search=PermutationSearch(num_steps, **options))
    filled(wrapped, permutation_logits=0.05)
    for _ in range(step):
        wrapped.update()
    return wrapped


@pytest.mark.parametrize("name", ["permutation_n4_k3_each", "permutation_n5_k2"])
def test_golden_search(golden, name):
    g = golden(name)
    num_permutations, n = g["log_weights"].shape[:2]
    k, steps = int(g["k"]), int(g["steps"])
    search = PermutationSearch(steps, num_permutations)
    gate = PermutedGate(CometGate(DIM, n, k=k), search=search)
    gate.permutation_logits.data.copy_(g["log_weights"])
    for call in range(steps + 1):
        matrices = gate.permutations()
        penalty = permutation_entropy(matrices)
        assert_close(gate(positions(3)).aux["permutation_entropy"], penalty, rtol=0, atol=1e-4)
        expected, gradient = g["perm_train"][call], g["grad_log_weights"][call]
        assert_close(matrices.expand(k, n, n), expected, rtol=1e-5, atol=1e-6)
        reg = g["perm_entropy_reg"] * penalty
        assert_close(reg, g["reg_train"][call], rtol=1e-5, atol=1e-6)
        if gate.phase == "search":
            loss = (matrices * g["cotangent"]).sum() + reg
            (actual,) = torch.autograd.grad(loss, gate.permutation_logits)
            # The last gradients of the vectors, up to 1.3e-4, are rounding of float32: exact is 0.
            tolerance = 1e-4 + 1e-6 * g["grad_log_weights"].abs().max().item()
            assert_close(actual, gradient, rtol=0, atol=tolerance)
        else:
            assert call >= steps - 1
            assert not gradient.any()
            assert not matrices.requires_grad
        gate.update()
    assert_close(gate.eval().permutations().expand(k, n, n), g["perm_eval"], rtol=0, atol=0)


def golden_gate(g):
    num_experts, dim = int(g["num_experts"]), g["x"].shape[-1]
    k = int(g["k"])
    if "node_kernel" in g:
        gate = CometGate(dim, num_experts, k=k, gamma=float(g["gamma"]))
        gate.node_weight.data.copy_(g["node_kernel"].permute(2, 0, 1))
        gate.node_bias.data.copy_(g["node_bias"].T)
        gate.leaf_weight.data.copy_(g["leaf_kernel"].permute(2, 0, 1))
        gate.leaf_bias.data.copy_(g["leaf_bias"].T)
    elif "z_kernel" in g:
        gate = DSelectKGate(dim, num_experts, k=k, gamma=float(g["gamma"]))
        state = (g["z_kernel"].T, g["z_bias"], g["w_kernel"].T, g["w_bias"])
        for parameter, value in zip(gate.parameters(), state, strict=True):
            parameter.data.copy_(value)
    else:
        gate = TopKGate(dim, num_experts, k=k, bias=True)
        gate.load_state_dict({"weight": g["weight"], "bias": g["bias"]})
    return gate


@pytest.mark.parametrize(
    ("name", "phase"),
    [(name, "search") for name in GOLDEN]
    + [(name, "permuted") for name in GOLDEN if not name.endswith("soft")],
)
def test_golden_gates_through_selectors(golden, name, phase, monkeypatch):
    g = golden(name)
    matrices = g["perm"]
    if (matrices == matrices[:1]).all():
        matrices = matrices[:1]
    gate = PermutedGate(golden_gate(g), search=PermutationSearch(2, len(matrices)))
    if phase == "permuted":
        gate.update()
        gate.targets.copy_(matrices.argmax(-1))
    else:
        monkeypatch.setattr(gate, "relaxed", lambda **_: matrices)
    assert gate.phase == phase
    x = g["x"].requires_grad_()
    weights = gate(x).to_dense().weights
    assert_close(weights, g["gate"], rtol=1e-5, atol=1e-6)
    y = torch.einsum("bn,nbh->bh", weights, g["experts"])
    assert_close(y, g["y"], rtol=1e-5, atol=1e-6)
    if name.startswith("topk"):  # the others differentiate a penalty too
        (y * g["cotangent"]).sum().backward()
        assert_close(x.grad, g["grad_x"], rtol=1e-3, atol=1e-4)


def test_schedule_of_the_search():
    search = PermutationSearch(10)
    assert [search.iterations_at(t) for t in (1, 3, 9)] == [33, 59, 137]
    for t in (1, 5, 9):
        assert search.temperature_at(t) == pytest.approx(10 ** (-3 - 4 * t / 10))


def test_sinkhorn_balances_and_assignment_is_the_best():
    scores = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    balanced = sinkhorn(scores, 100)
    ones = torch.ones(3, 4, dtype=torch.float64)
    assert_close((balanced.sum(-1), balanced.sum(-2)), (ones, ones))
    scaled = balanced.log() - scores  # differs by one number per row and one per column
    mixed = scaled[:, 1:, 1:] - scaled[:, :1, 1:] - scaled[:, 1:, :1] + scaled[:, :1, :1]
    assert_close(mixed, torch.zeros_like(mixed))
    for matrix, columns in zip(balanced, best_assignments(balanced), strict=True):
        totals = {c: matrix[range(4), list(c)].sum().item() for c in permutations(range(4))}
        assert tuple(columns.tolist()) == max(totals, key=totals.__getitem__)


def test_penalty_is_zero_for_permutations_alone():
    eye = torch.eye(4).unsqueeze(0)
    assert_close(permutation_entropy(eye), torch.tensor(0.0), rtol=0, atol=1e-4)
    even = torch.full((2, 4, 4), 0.25, dtype=torch.float64)
    assert permutation_entropy(even).item() == pytest.approx(2 * 4 * log(4), rel=1e-4)


@pytest.mark.parametrize("name", GATES)
def test_any_gate_is_searched_densely_and_then_permuted(name):
    gate = permuted(GATES[name](), start=0.05, end=0.02, first_iterations=1, last_iterations=1)
    assert gate.report()["row_error"] > 0.01  # so that scaling the weights matters
    x, numbers = positions(2, 7), ids(2, 7)
    inner = gate.gate
    if name == "dense to sparse":
        torch.manual_seed(0)
        inner.update()
    torch.manual_seed(0)
    relaxed = gate(x, ids=numbers)
    torch.manual_seed(0)
    dense = inner(x, ids=numbers).to_dense(EXPERTS).weights
    mixed = dense @ gate.relaxed()[0]
    if gate.renormalize:
        mixed = mixed * dense.sum(-1, keepdim=True) / mixed.sum(-1, keepdim=True)
    assert relaxed.indices is None
    assert_close(relaxed.weights, mixed)
    relaxed.weights.square().sum().backward()
    assert gate.permutation_logits.grad.any()

    gate = permuted(GATES[name](), step=5).eval()
    assert gate.phase == "permuted"
    if name == "dense to sparse":
        gate.gate.update()
    routing, plain = gate(x, ids=numbers), gate.gate(x, ids=numbers)
    moved = torch.zeros_like(plain.to_dense(EXPERTS).weights)
    moved[..., gate.targets[0]] = plain.to_dense(EXPERTS).weights
    assert (gate.targets[0] != torch.arange(EXPERTS)).any()
    assert_close(routing.to_dense(EXPERTS).weights, moved, rtol=0, atol=0)
    assert (routing.indices is None) == (plain.indices is None)
    for scores, plain_scores in ((routing.logits, plain.logits), (routing.probs, plain.probs)):
        if plain_scores is not None:
            assert_close(scores[..., gate.targets[0]], plain_scores, rtol=0, atol=0)
    for key, loss in (plain.aux or {}).items():
        assert_close(routing.aux[key], loss)
    assert routing.aux["permutation_entropy"] == 0


def test_the_noise_of_a_search_is_gumbel():
    gate = permuted(TopKGate(DIM, EXPERTS), noise=2.0)
    torch.manual_seed(0)
    noisy = gate.relaxed(noisy=True)
    torch.manual_seed(0)
    gate.permutation_logits.data -= 2.0 * torch.empty(1, EXPERTS, EXPERTS).exponential_().log()
    assert_close(gate.relaxed(), noisy)


def test_one_permutation_per_tree():
    gate = permuted(CometGate(DIM, EXPERTS, k=3), num_permutations=3, step=5)
    x = positions(20)
    selectors = gate.gate.selectors(x)
    expected = torch.zeros(20, EXPERTS)
    for tree in range(3):
        expected[:, gate.targets[tree]] += selectors[:, tree]
    assert len({tuple(t) for t in gate.targets.tolist()}) > 1
    routing = gate(x)
    assert_close(routing.weights, expected)
    assert routing.logits is None
    with pytest.raises(ValueError, match="num_permutations is 3, but the gate is a sum of 2"):
        permuted(CometGate(DIM, EXPERTS, k=2), num_permutations=3)(x)


@pytest.mark.fault("core F9")
@pytest.mark.parametrize("training", [True, False])
def test_a_fixed_permutation_is_given(training):
    targets = torch.tensor([3, 0, 4, 1, 2])
    gate = PermutedGate(TopKGate(DIM, EXPERTS), search=SEARCH).train(training)
    gate.set_permutations(targets)
    assert gate.phase == "permuted"
    x = positions(9)
    for _ in range(2):
        assert torch.equal(gate(x).indices, targets[gate.gate(x).indices])
        assert torch.equal(gate.permutations()[0].argmax(-1), targets)
        gate(x)
        update_gates(gate)
    twin = PermutedGate(TopKGate(DIM, EXPERTS), search=SEARCH)
    twin.load_state_dict(gate.state_dict())
    assert torch.equal(twin(x).indices, gate(x).indices)


@pytest.mark.fault("core F9")
def test_fixed_permutations_of_trees():
    targets = torch.stack([torch.randperm(EXPERTS) for _ in range(2)])
    search = PermutationSearch(9, num_permutations=2)
    gate, x = PermutedGate(CometGate(DIM, EXPERTS), search=search), positions(7)
    gate.set_permutations(targets)
    expected = torch.zeros(7, EXPERTS)
    for tree in range(2):
        expected[:, targets[tree]] += gate.gate.selectors(x)[:, tree]
    assert_close(gate(x).weights, expected)
    gate.set_permutations(targets[0])
    assert torch.equal(gate.targets, targets[:1].expand(2, -1))


@pytest.mark.fault("core F9")
@pytest.mark.parametrize(
    "targets",
    [
        torch.arange(4),
        torch.zeros(EXPERTS).long(),
        torch.arange(1, EXPERTS + 1),
        torch.eye(5),
        torch.arange(5.0),
    ],
)
def test_what_is_no_permutation_is_refused(targets):
    gate = PermutedGate(TopKGate(DIM, EXPERTS), search=SEARCH)
    with pytest.raises(GatesError, match="must be one or 1 permutations of the numbers 0 to 4"):
        gate.set_permutations(targets)
    assert gate.phase == "search"


def test_evaluation_during_the_search_is_hard_and_changes_nothing():
    gate = permuted(TopKGate(DIM, EXPERTS, k=2), start=0.1, end=0.05).eval()
    before = {key: value.clone() for key, value in gate.state_dict().items()}
    routing = gate(positions(9))
    assert routing.indices.shape == (9, 2)
    targets = best_assignments(gate.relaxed())
    assert_close(routing.indices, targets[0][gate.gate(positions(9)).indices])
    assert_close(dict(gate.state_dict()), before, rtol=0, atol=0)
    assert_close(gate.permutations().argmax(-1), targets)


@pytest.mark.parametrize("step", [0, 5])
def test_evaluation_is_compiled_and_exported_whole(step):
    gate = permuted(TopKGate(DIM, EXPERTS, k=2), step=step, start=0.1, end=0.05).eval()
    x = positions(9)
    expected = gate(x)
    assert (gate.permutations().argmax(-1) != torch.arange(EXPERTS)).any()
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(gate, (x,)).module()
    for routing in (compiled(x), exported(x)):
        assert_close(routing.weights, expected.weights)
        assert torch.equal(routing.indices, expected.indices)
    assert "logsumexp" not in str(exported.graph)  # no iterations one by one


def test_registration_of_the_assignment():
    scores = torch.randn(2, EXPERTS, EXPERTS, generator=torch.Generator().manual_seed(0))
    opcheck(torch.ops.core_gates.nearest_permutations.default, (scores, torch.tensor(3)))
    expected = best_assignments(sinkhorn(scores, 3))
    assert torch.equal(nearest_permutations(scores, torch.tensor(3)), expected)


def test_search_finds_a_planted_permutation():
    """A hash gate cannot learn but through its permutation."""
    hashed = HashGate(DIM, EXPERTS, num_ids=50, seed=4)
    gate = PermutedGate(hashed, search=PermutationSearch(60, start=0.3, end=0.02))
    torch.nn.init.uniform_(
        gate.permutation_logits, -0.05, 0.05, generator=torch.Generator().manual_seed(0)
    )
    planted = torch.tensor([3, 0, 4, 1, 2])
    wanted = planted[hashed.table.squeeze(-1)]
    optimizer = torch.optim.Adam([gate.permutation_logits], lr=0.1)
    x, everyone = torch.zeros(50, DIM), torch.arange(50)
    assert gate.eval()(x, ids=everyone).indices.squeeze(-1).ne(wanted).any()
    gate.train()
    while gate.phase == "search":
        optimizer.zero_grad()
        weights = gate(x, ids=everyone).weights
        torch.nn.functional.nll_loss(weights.clamp(min=1e-6).log(), wanted).backward()
        optimizer.step()
        update_gates(gate)
    assert gate.targets.tolist() == [planted.tolist()]


def test_after_the_search_its_parameter_stays_in_use_without_a_gradient():
    gate = permuted(TopKGate(DIM, EXPERTS), step=5)
    routing = gate(positions(3))
    (routing.weights.sum() + routing.aux["permutation_entropy"]).backward()
    assert gate.permutation_logits.grad is not None
    assert not gate.permutation_logits.grad.any()


def test_padding_does_not_reach_the_gradients():
    mask = torch.tensor([False, True, False, True])
    x = positions(4)
    for step in (0, 5):
        for name in ("top-k", "comet", "dselect-k"):
            gate = permuted(GATES[name](), step=step)
            routing = gate(x.masked_fill(mask.unsqueeze(-1), torch.nan), padding_mask=mask)
            dense = routing.to_dense(EXPERTS).weights
            assert not dense[mask].any()
            assert_close(dense[~mask], gate(x[~mask]).to_dense(EXPERTS).weights)
            dense.square().sum().backward()
            assert all(p.grad.isfinite().all() for p in gate.parameters() if p.grad is not None)


@pytest.mark.fault("core F4")
def test_a_search_is_compiled_once_and_learns_like_eager():
    """Temperature and iterations change in each step; a graph holds for all of a search."""
    torch._dynamo.reset()  # of sizes that other tests have compiled
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    options = {"num_steps": 14, "start": 0.1, "end": 0.01}
    eager, gate = (permuted(CometGate(DIM, EXPERTS), **options) for _ in range(2))
    compiled = torch.compile(gate, backend=backend, fullgraph=True)
    x, target = positions(8), torch.randn(8, EXPERTS)
    for step in range(16):
        for each, call in ((eager, eager), (gate, compiled)):
            each.zero_grad()
            routing = call(x)
            ((routing.weights * target).sum() + routing.aux["permutation_entropy"]).backward()
            update_gates(each)
        for ours, theirs in zip(gate.parameters(), eager.parameters(), strict=True):
            assert_close(ours.grad, theirs.grad)
        assert len(graphs) == (1 if step < 13 else 2)  # one a phase
    assert gate.phase == "permuted"
    assert torch.equal(gate.targets, eager.targets)


def test_registration_of_the_iterations():
    scores = torch.randn(2, EXPERTS, EXPERTS, dtype=torch.float64, requires_grad=True)
    number = torch.tensor(3)
    opcheck(torch.ops.core_gates.sinkhorn.default, (scores, number))
    assert_close(sinkhorn_in_one_op(scores, number), sinkhorn(scores, 3), rtol=0, atol=0)
    assert torch.autograd.gradcheck(lambda s: sinkhorn_in_one_op(s, number), (scores,))


def test_reset_begins_anew():
    gate = permuted(TopKGate(DIM, EXPERTS), step=5)
    gate.reset_parameters()
    assert (gate.phase, int(gate.step)) == ("search", 0)
    assert gate.permutation_logits.abs().max() <= 0.05
    assert gate.gate.weight.std() < 0.04
    assert gate.targets.tolist() == [[-1] * EXPERTS]


def test_report_shows_how_hard_the_relaxation_is():
    published, warm = permuted(TopKGate(DIM, 16)), permuted(TopKGate(DIM, 16), start=0.1, end=0.05)
    hard, soft = published.report(), warm.report()
    assert hard["hardness"] > 0.85 > 0.6 > soft["hardness"]
    assert hard["tau"] < 1e-3
    assert hard["iterations"] == 20 + 130 // 6
    assert hard["column_error"] < 1e-5
    assert soft["row_error"] < 0.05


def test_the_wrapped_gate_is_updated_once_a_step():
    sigmoid = SigmoidGate(DIM, EXPERTS, k=1, balance_rate=0.1)
    gate = permuted(sigmoid, num_steps=3)
    sigmoid.weight.data.fill_(-9.0)
    sigmoid.weight.data[2] = 9.0  # takes everything, whatever the bias
    for steps in (1, 2, 3):
        gate(torch.ones(20, DIM))
        update_gates(gate)
        assert int(gate.step) == steps
        assert_close(sigmoid.balance_bias, 0.1 * steps * torch.tensor([1.0, 1, -1, 1, 1]))


def test_traits_of_the_gate_are_kept():
    class Coupled(SoftmaxGate):
        couples_tokens = True

    assert permuted(Coupled(DIM, EXPERTS)).couples_tokens
    assert permuted(TopKGate(DIM, EXPERTS)).renormalize
    assert not permuted(DSelectKGate(DIM, EXPERTS)).renormalize


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 1}, "num_steps must be at least 2, got 1"),
        ({"num_permutations": 0}, "num_permutations must be at least 1, got 0"),
        ({"first_iterations": 0}, "first_iterations must be at least 1, got 0"),
        ({"last_iterations": 10}, "last_iterations must be at least 20, got 10"),
        ({"noise": -1.0}, "noise must not be negative, got -1.0"),
        ({"end": 0.0}, "end must be positive, got 0.0"),
    ],
)
def test_errors(refuses, options, message):
    refuses(ValueError, (message, lambda: PermutationSearch(**({"num_steps": 5} | options))))
