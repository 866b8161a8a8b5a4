import torch

from core_gates.attention.sma.gated_attention_unit import DistanceBias


def test_distances_beyond_the_table_take_its_ends(refuses):
    bias = DistanceBias(3)
    bias.table.data = torch.arange(5.0)
    distances = torch.tensor([[-9, -2, -1], [0, 2, 7]])
    assert bias(distances).tolist() == [[0, 0, 1], [2, 4, 4]]
    refuses(ValueError, ("max_positions must be at least 1, got 0", lambda: DistanceBias(0)))
