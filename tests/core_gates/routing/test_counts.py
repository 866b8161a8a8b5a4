import torch

from core_gates import GatesError, RoutingOutput, TopKGate
from core_gates.routing.capacity import count_routed, read_counts


def test_kept_choices_are_counted_and_positions_that_are_not_finite_flagged():
    weights = torch.tensor([[0.5, 0.5], [0.5, 0.5], [torch.nan, 1.0], [torch.inf, 1.0]])
    indices = torch.tensor([[0, 1], [0, 2], [1, 2], [0, 1]])
    kept = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    counts = count_routed(RoutingOutput(weights, indices, kept), 4)
    assert (counts.dtype, counts.tolist()) == (torch.int64, [2, 1, 0, 0, 2])


def test_dense_and_slot_routings_are_counted():
    dense = RoutingOutput(torch.tensor([[0.2, 0.0, 0.8], [0.0, 0.0, 1.0]]))
    assert count_routed(dense).tolist() == [1, 0, 2, 0]
    slots = torch.ones(2, 5, 3, 4)
    slots[1, 2, 0, 3] = torch.nan
    assert count_routed(RoutingOutput(slots, dispatch=slots)).tolist() == [9, 9, 9, 1]


def test_counts_of_parts_add_up_to_those_of_the_whole():
    gate, x = TopKGate(4, 5, k=2), torch.randn(11, 4)
    parts = count_routed(gate(x[:7])) + count_routed(gate(x[7:]))
    assert torch.equal(parts, count_routed(gate(x)))
    assert parts.sum() == 22


def test_reading_counts_names_the_gate(refuses):
    assert read_counts(torch.tensor([3, 4, 0])) == [3, 4]
    refuses(
        GatesError,
        (
            r"gate 'layers\.0' routed 1 token with weights",
            lambda: read_counts(torch.tensor([3, 4, 1]), "layers.0"),
        ),
        ("routed 2 tokens", lambda: read_counts(torch.tensor([3, 4, 2]))),
    )
