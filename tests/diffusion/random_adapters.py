"""Random adapters of any model of linear layers."""

import torch

from diffusion.fusion.protocol import linear_sizes
from diffusion.lora_file import Factors, LoraBundle


def random_adapter(
    model, seed, rank=2, where="blocks", family="flux", size=0.2, scale=1.0, dtype=None
):
    """Return an adapter of the layers whose names hold a text, with factors of a size."""
    draw = torch.Generator().manual_seed(seed)
    modules = {}
    for name, (inputs, outputs) in linear_sizes(model).items():
        if where in name:
            down = torch.randn(rank, inputs, generator=draw, dtype=dtype)
            up = torch.randn(outputs, rank, generator=draw, dtype=dtype)
            modules[name] = Factors(size * down, size * up, scale)
    return LoraBundle(family, modules)
