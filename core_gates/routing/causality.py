"""The refusal of gates that look into the future, for models that must not."""

from torch import nn

from core_gates.routing.collect import routing_gates


def refuse_coupled_gates(model: nn.Module, *, allow_leak: bool = False) -> None:
    """Refuse a causal model with a gate that couples tokens.

    Such a gate routes a token by those after it, too: a language model then sees in training what
    it must predict, and routes otherwise when it generates.

    Args:
        model: Model that must be causal; any module that holds gates.
        allow_leak: Whether to accept the leak.

    Raises:
        ValueError: A gate ``couples_tokens`` and the leak is not accepted.
    """
    coupled = [
        f"{name} ({type(gate).__name__})"
        for name, gate in routing_gates(model)
        if gate.couples_tokens
    ]
    if coupled and not allow_leak:
        raise ValueError(
            f"a causal model must not route by later tokens, as {', '.join(coupled)} would;"
            " take a gate that does not couple tokens (top-k, or no capacity), or pass"
            " allow_leak=True"
        )
