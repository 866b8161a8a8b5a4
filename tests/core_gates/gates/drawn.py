"""Gates and scores that the tests of several gates draw alike."""

import torch


def identity_gate(gate, num_experts, **options):
    """Return a gate of the given class whose logits are its input."""
    built = gate(num_experts, num_experts, dtype=torch.float64, **options)
    built.weight.data.copy_(torch.eye(num_experts))
    return built


def scores(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
