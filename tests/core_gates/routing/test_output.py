import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from core_gates.routing.output import RoutingOutput

PROBS = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3]])


@pytest.fixture
def indexed():
    weights = torch.tensor([[0.5, 0.3], [0.6, 0.3]], requires_grad=True)
    kept = torch.tensor([[True, True], [False, True]])
    return RoutingOutput(weights, torch.tensor([[0, 2], [1, 2]]), kept, probs=PROBS)


def test_fields_are_the_contract():
    names = ("weights", "indices", "kept", "logits", "probs", "dispatch", "aux")
    assert (RoutingOutput._fields, RoutingOutput(PROBS)[1:]) == (names, (None,) * 6)


def test_dense_form_puts_kept_weights_on_their_experts(indexed):
    dense = indexed.to_dense()
    assert_close(dense.weights, torch.tensor([[0.5, 0.0, 0.3], [0.0, 0.0, 0.3]]))
    assert (dense.indices, dense.kept) == (None, None)
    assert dense.probs is PROBS
    dense.weights.sum().backward()
    assert indexed.weights.grad.tolist() == [[1.0, 1.0], [0.0, 1.0]]


def test_dense_form_of_a_dense_routing_is_itself():
    routing = RoutingOutput(PROBS)
    assert routing.to_dense() is routing


def test_choices_of_one_expert_add_up():
    routing = RoutingOutput(torch.tensor([[0.25, 0.5]]), torch.tensor([[1, 1]]))
    assert routing.to_dense(3).weights.tolist() == [[0.0, 0.75, 0.0]]
    assert routing.chosen(3).tolist() == [[0.0, 2.0, 0.0]]


def test_number_of_experts_must_be_known_or_given():
    routing = RoutingOutput(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="does not know its number of experts; pass num_experts"):
        routing.to_dense()
    assert routing.to_dense(4).weights.shape == (2, 4)
    assert routing._replace(logits=torch.zeros(2, 5)).num_experts == 5


def test_top_k_form_takes_the_largest_and_marks_what_is_not_routed():
    routing = RoutingOutput(torch.tensor([[0.0, 0.2, 0.2], [0.0, 0.0, 0.7]])).to_top_k(2)
    assert routing.indices.tolist() == [[1, 2], [2, 0]]
    assert_close(routing.weights, torch.tensor([[0.2, 0.2], [0.7, 0.0]]))
    assert routing.kept.tolist() == [[True, True], [True, False]]


def test_top_k_form_of_choices_passes_over_dropped_ones(indexed):
    top = indexed.to_top_k(1)
    assert top.indices.tolist() == [[0], [2]]
    assert_close(top.weights, torch.tensor([[0.5], [0.3]]))


@given(st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5]), min_size=3, max_size=8))
def test_forms_are_inverse_when_k_covers_the_routed_experts(weights):
    routing = RoutingOutput(torch.tensor([weights]))
    back = routing.to_top_k(max(1, sum(w != 0 for w in weights))).to_dense(len(weights))
    assert torch.equal(back.weights, routing.weights)


@pytest.mark.parametrize("k", [0, 3])
def test_top_k_form_refuses_more_than_there_is(indexed, k):
    with pytest.raises(ValueError, match=f"between 1 and the 2 weights given, got {k}"):
        indexed.to_top_k(k)


def test_hard_form_weighs_one_with_the_soft_gradient(indexed):
    hard = indexed.hard()
    assert (hard.indices.tolist(), hard.weights.tolist()) == ([[0], [2]], [[1.0], [1.0]])
    (hard.weights * torch.tensor([[2.0], [3.0]])).sum().backward()
    assert indexed.weights.grad.tolist() == [[2.0, 0.0], [0.0, 3.0]]


def test_hard_form_leaves_unrouted_positions_unrouted():
    hard = RoutingOutput(torch.zeros(1, 3)).hard()
    assert (hard.weights.tolist(), hard.kept.tolist()) == ([[0.0]], [[False]])


def test_chosen_counts_dropped_choices_on_request(indexed):
    assert indexed.chosen().tolist() == [[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]
    assert indexed.chosen(dropped=False).tolist() == [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    dense = RoutingOutput(torch.tensor([[0.0, 0.4, 0.6]], requires_grad=True)).chosen()
    assert dense.tolist() == [[0.0, 1.0, 1.0]]
    assert not dense.requires_grad


def test_ignored_positions_weigh_nothing(refuses, indexed):
    mask = torch.tensor([True, False])
    ignored = indexed.ignore(mask)
    assert_close(ignored.weights, torch.tensor([[0.0, 0.0], [0.6, 0.3]]))
    assert ignored.kept.tolist() == [[False, False], [False, True]]
    assert RoutingOutput(PROBS).ignore(mask).weights[0].tolist() == [0.0, 0.0, 0.0]
    assert indexed.ignore(None) is indexed
    assert indexed._replace(kept=None).ignore(mask).kept.tolist() == [[False, False], [True, True]]
    refuses(ValueError, ("shape", lambda: indexed.ignore(torch.tensor([True]))))


def test_slots_have_a_dense_form_only(refuses):
    combine = torch.rand(2, 5, 3, 4)
    routing = RoutingOutput(combine, dispatch=torch.rand(2, 5, 3, 4))
    assert routing.num_experts == 3
    dense = routing.to_dense()
    assert_close(dense.weights, combine.sum(-1))
    assert dense.dispatch is None
    for form in (routing.hard, lambda: routing.to_top_k(1)):
        refuses(ValueError, ("a Soft-MoE routing has no top-k form", form))
    with pytest.raises(ValueError, match="mask the padding before their softmax"):
        routing.ignore(torch.zeros(2, 5, dtype=torch.bool))
