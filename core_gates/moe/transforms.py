"""Calls that PyTorch transforms or traces: grouped operators and the host are out of reach."""

import torch

from core_gates.errors import GatesError


def is_transformed() -> bool:
    """Return whether ``torch.func.grad``, ``vmap``, ``jvp`` or the like runs this call."""
    if torch.compiler.is_compiling():  # which traces the transform itself
        return False
    return torch._C._are_functorch_transforms_active()


def refuse_tracing(name: str) -> None:
    """Refuse ``torch.jit.trace``, which would record one routing for all inputs.

    Raises:
        GatesError: The call is being traced.
    """
    if torch.jit.is_tracing():  # type: ignore[no-untyped-call]
        raise GatesError(
            f"torch.jit.trace would record the routing of this one input in {name}: use"
            " torch.export.export, or torch.onnx.export with dynamo=True"
        )
