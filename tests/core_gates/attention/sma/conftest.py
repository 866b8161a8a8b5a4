import pytest
import torch

from core_gates.attention.sma.layer import SeqBoatLayer


@pytest.fixture
def lively_layer():
    """``lively_layer(**options)``: a layer in float64 that activates about half of its tokens."""

    def build(seed=0, **options):
        torch.manual_seed(seed)
        options = {"num_states": 3, "window": 3, "max_positions": 9} | options
        layer = SeqBoatLayer(8, 4, 6, **options).double()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(torch.randn_like(parameter) / 2)
        return layer

    return build
