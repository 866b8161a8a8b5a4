import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from core_gates.gates.top_p import ThresholdGate, TopPGate


def identity(gate):
    torch.nn.init.eye_(gate.weight)
    return gate


def logits_of(*probs):
    return torch.tensor(probs).log()


@given(st.integers(1, 7), st.floats(0.01, 1), st.integers(0, 500))
def test_top_p_is_the_smallest_set_that_reaches_p(num_experts, p, seed):
    x = torch.randint(
        -2, 3, (5, num_experts), generator=torch.Generator().manual_seed(seed)
    ).double()  # with ties
    routing = identity(TopPGate(num_experts, num_experts, p=p, dtype=torch.float64))(x)
    for weights, probs in zip(routing.weights, routing.probs, strict=True):
        order = sorted(range(num_experts), key=lambda e: -probs[e])
        size = int((weights != 0).sum())
        assert set(weights.nonzero().flatten().tolist()) == set(order[:size])
        reached = sum(probs[e] for e in order[:size])
        assert reached >= p - 1e-12
        assert size == 1 or sum(probs[e] for e in order[: size - 1]) < p
        assert_close(weights, torch.where(weights != 0, probs, 0))


def test_threshold_routes_what_exceeds_it_and_always_the_best():
    gate = identity(ThresholdGate(4, 4, threshold=0.2))
    x = logits_of([0.8, 0.1, 0.05, 0.05], [0.4, 0.3, 0.21, 0.09])
    assert (gate(x).weights != 0).tolist() == [[True, False, False, False], [True] * 3 + [False]]
    gate.threshold = 0.5
    assert_close(gate(x).weights, torch.tensor([[0.8, 0, 0, 0], [0.4, 0, 0, 0]]))


def test_gradient_is_that_of_the_routed_probabilities():
    gate = identity(TopPGate(4, 4, p=0.6, dtype=torch.float64))
    x = logits_of([0.4, 0.3, 0.2, 0.1]).double().requires_grad_()
    gate(x).weights.sum().backward()
    p = x.detach().softmax(-1)[0]
    expected = p * (torch.tensor([1, 1, 0, 0]) - p[:2].sum())
    assert_close(x.grad[0], expected)
