import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from core_gates import GatesError, RoutingOutput, StackedExperts
from core_gates.moe import dispatch as combining
from core_gates.moe.dispatch import DISPATCHES, choices, combine, dispatch, plan

EXPERTS, DIM, HIDDEN, TOKENS, K = 6, 8, 12, 40, 3


def zipf_logits(generator):
    shares = 1 / torch.arange(1, EXPERTS + 1, dtype=torch.float64) ** 2
    return shares.log() + torch.randn(TOKENS, EXPERTS, generator=generator, dtype=torch.float64)


def balanced_indices(_):
    return (torch.arange(TOKENS)[:, None] + torch.arange(K)) % EXPERTS


LOADS = {
    "balanced": balanced_indices,
    "zipf": lambda g: zipf_logits(g).topk(K).indices,
    "one expert": lambda _: torch.full((TOKENS, K), 4),
    "empty experts": lambda g: torch.randint(2, 4, (TOKENS, K), generator=g),
}


@pytest.fixture
def experts():
    torch.manual_seed(0)
    return StackedExperts(EXPERTS, DIM, HIDDEN, bias=True, activation="gelu")


def routing_of(load, form):
    """A routing with a weight that requires a gradient: plain, with drops, or dense."""
    generator = torch.Generator().manual_seed(1)
    indices = LOADS[load](generator)
    weights = torch.rand(TOKENS, K, generator=generator)
    weights[3, 1] = 0  # a weight of zero is routed nevertheless
    kept = torch.rand(TOKENS, K, generator=generator) > 0.3
    kept[5] = False
    if form == "choices":
        return RoutingOutput(weights.requires_grad_(), indices)
    if form == "dropped":
        return RoutingOutput(weights.requires_grad_(), indices, kept)
    dense = torch.zeros(TOKENS, EXPERTS).scatter(1, indices, weights * kept)
    if form == "full":
        dense = dense + 0.1
    return RoutingOutput(dense.requires_grad_())


def expected_result(x, routing, experts):
    """Token by token, from the definition of a routing."""
    rows = []
    for t in range(TOKENS):
        total = torch.zeros(DIM)
        for j, weight in enumerate(routing.weights[t]):
            expert = j if routing.indices is None else int(routing.indices[t, j])
            routed = weight != 0 if routing.indices is None else True
            if routing.kept is not None:
                routed = routing.kept[t, j]
            if routed:
                total = total + weight * experts.single(x[t], expert)
        rows.append(total)
    return torch.stack(rows)


def gradients(y, x, routing, experts):
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    wanted = [x, routing.weights, *experts.parameters()]
    found = torch.autograd.grad(y, wanted, cotangent, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("form", ["choices", "dropped", "sparse", "full"])
@pytest.mark.parametrize("load", LOADS)
def test_all_ways_agree_with_the_definition(load, form, experts):
    routing = routing_of(load, form)
    x = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(3)).requires_grad_()
    expected = expected_result(x, routing, experts)
    wanted = gradients(expected, x, routing, experts)
    for how in DISPATCHES:
        y = dispatch(x, routing, experts, how)
        assert_close(y, expected, rtol=1e-5, atol=1e-5)
        found = gradients(y, x, routing, experts)
        assert_close(found, wanted, rtol=1e-5, atol=1e-5, msg=lambda m, how=how: f"{how}: {m}")


@pytest.mark.parametrize("how", DISPATCHES)
def test_twice_is_bit_equal_and_positions_may_be_permuted(how, experts):
    routing = routing_of("zipf", "dropped")
    x = torch.randn(TOKENS, DIM)
    y = dispatch(x, routing, experts, how)
    assert torch.equal(y, dispatch(x, routing, experts, how))
    p = torch.randperm(TOKENS)
    permuted = RoutingOutput(routing.weights[p], routing.indices[p], routing.kept[p])
    assert_close(dispatch(x[p], permuted, experts, how), y[p])


@pytest.mark.parametrize("how", DISPATCHES)
@pytest.mark.parametrize("leading", [(2, 5), (0,), (1,), (3, 0)])
def test_leading_shapes(leading, how, experts):
    weights = torch.rand(*leading, K).requires_grad_()
    indices = torch.randint(EXPERTS, (*leading, K))
    x = torch.randn(*leading, DIM).requires_grad_()
    y = dispatch(x, RoutingOutput(weights, indices), experts, how)
    assert y.shape == x.shape
    flat = RoutingOutput(weights.flatten(0, -2), indices.flatten(0, -2))
    assert_close(y.flatten(0, -2), dispatch(x.flatten(0, -2), flat, experts, how))
    y.sum().backward()
    assert experts.down_proj.grad is not None
    assert bool(experts.down_proj.grad.any()) == bool(x.numel())


@pytest.mark.parametrize("how", DISPATCHES)
def test_nothing_kept_gives_zero_and_finite_gradients(how, experts):
    x = torch.randn(4, DIM)
    x[2] = torch.nan  # padding holds anything
    routing = RoutingOutput(
        torch.rand(4, K).requires_grad_(), torch.zeros(4, K, dtype=torch.int64),
        torch.zeros(4, K, dtype=torch.bool),
    )  # fmt: skip
    y = dispatch(x.requires_grad_(), routing, experts, how)
    assert not y.any()
    y.sum().backward()
    for tensor in (x, routing.weights, *experts.parameters()):
        assert tensor.grad is None or not tensor.grad.any()


@pytest.mark.parametrize("how", DISPATCHES)
@pytest.mark.parametrize("leading", [(), (2,)])
def test_slots(leading, how, experts):
    tokens, slots = 5, 2
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(*leading, tokens, EXPERTS, slots, generator=generator)
    routing = RoutingOutput(
        scores.flatten(-2).softmax(-1).view(scores.shape), dispatch=scores.softmax(-3)
    )
    x = torch.randn(*leading, tokens, DIM, generator=generator)
    y = dispatch(x, routing, experts, how)
    expected = torch.zeros_like(x)
    for e in range(EXPERTS):
        for s in range(slots):
            mixed = (routing.dispatch[..., e, s].unsqueeze(-1) * x).sum(-2)
            out = experts.single(mixed, e).unsqueeze(-2)
            expected += routing.weights[..., e, s].unsqueeze(-1) * out
    assert_close(y, expected)


@given(st.integers(0, 30), st.integers(1, 4), st.integers(1, 5), st.integers(0, 9999))
def test_plan_is_a_stable_sort(num_tokens, k, num_experts, seed):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(num_experts, (num_tokens, k), generator=generator)
    kept = torch.rand(num_tokens, k, generator=generator) > 0.2
    routing = RoutingOutput(torch.ones(num_tokens, k), indices, kept)
    order, place, counts = plan(choices(routing), num_experts)
    assert torch.equal(place.flatten()[order], torch.arange(num_tokens * k))
    routed = int(kept.sum())
    assert int(counts.sum()) == routed
    assert kept.flatten()[order[:routed]].all()
    experts = indices.flatten()[order[:routed]]
    assert torch.equal(experts, torch.repeat_interleave(counts))
    same = experts[1:] == experts[:-1]
    assert (order[1:routed] > order[: max(routed - 1, 0)])[same].all()


def test_dense_weights_become_as_many_choices_as_needed():
    weights = torch.zeros(5, 9)
    weights[0, [2, 7]] = torch.tensor([0.25, 0.75])
    weights[4, 3] = 1
    chosen = choices(RoutingOutput(weights))
    assert (chosen.weights.shape, chosen.indices[0].tolist()) == ((5, 2), [7, 2])
    assert chosen.kept.sum(1).tolist() == [2, 0, 0, 0, 1]


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_gradients_of_combine_where_every_row_is_one_choice(chunk, monkeypatch, poisoned_empty):
    monkeypatch.setattr(combining, "CHUNK", chunk)
    rows = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    order = torch.tensor([4, 0, 3, 5, 1, 2])
    place = order.argsort().view(3, 2)
    assert gradcheck(combine, (rows, weights, place, order))
    assert gradgradcheck(combine, (rows, weights, place, order))
    assert gradcheck(lambda r: combine(r, weights.detach(), place, order), rows)
    assert gradcheck(lambda w: combine(rows.detach(), w, place, order), weights)
    half = rows.detach().bfloat16().requires_grad_()
    grad = torch.randn(3, 4).bfloat16()
    results = [combine(half, weights, place, *way) for way in ((), (order,))]
    assert_close(*(torch.autograd.grad(r, (half, weights), grad) for r in results))


@pytest.mark.parametrize(("form", "how"), [("dropped", "capacity"), ("dense", "sorted")])
def test_counts_on_the_host_bring_weights_that_are_not_finite(form, how, experts):
    routing = routing_of("balanced", form)
    weights = routing.weights.detach().clone()
    weights[7, 4:] = torch.nan
    weights[7, 0] = torch.inf
    if routing.kept is not None:
        routing = routing._replace(kept=torch.ones_like(routing.kept))
    number = int((~weights.isfinite()).sum())
    with pytest.raises(GatesError, match=f"the gate returned {number} weights? that are not fin"):
        dispatch(torch.zeros(TOKENS, DIM), routing._replace(weights=weights), experts, how)
