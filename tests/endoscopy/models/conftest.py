import pytest
import torch

from core_gates.features.selection import FeatureSelectionGate


@pytest.fixture(scope="session")
def grown():
    """``grown(model, *inputs)``: in evaluation, with gates and statistics as if trained."""

    @torch.no_grad()
    def grow(model, *inputs, seed=0):
        draw = torch.Generator().manual_seed(seed)
        for module in model.modules():
            gate = isinstance(module, FeatureSelectionGate)
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None and tensor.is_floating_point() and tensor.ndim == 1:
                    noise = torch.randn if gate else torch.rand
                    tensor.data += (1.0 if gate else 0.3) * noise(tensor.shape, generator=draw)
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0  # the statistics of the inputs, else deep networks fade out
        if inputs and norms:
            model.train()(*inputs)
        return model.eval()

    return grow
