"""Seeded numbers, and modules filled with them, for the tests of several rooms."""

import torch


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def filled(module, seed=1, scale=1.0, **scales):
    """Return the module with normal parameters; ``scales`` are those of single names."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(scales.get(name, scale) * values)
    return module


def identity_gate(gate, num_experts, **options):
    """Return a gate of the given class whose logits are its input."""
    built = gate(num_experts, num_experts, dtype=torch.float64, **options)
    built.weight.data.copy_(torch.eye(num_experts))
    return built
