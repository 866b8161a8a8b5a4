"""Output gates of a model as one small file."""

from pathlib import Path

import torch
from torch import nn

from core_gates.errors import GatesError
from language.gated.attach import (
    OutputGate,
    attach_output_gate,
    attached_gates,
    detach_output_gate,
    output_gates,
)
from language.hf.gate_file import read_gates, write_gates

KIND = "output"


def save_gates(model: nn.Module, path: str | Path) -> Path:
    """Write the output gates of a model, and nothing else of it.

    Args:
        model: With gates, see :func:`language.gated.attach.attach_output_gate`.
        path: A ``.safetensors`` file. Its metadata hold the options of the gates, and the
            fingerprint of the base, see :func:`language.hf.gate_file.fingerprint`.

    Returns:
        The path.

    Raises:
        GatesError: The model has no output gates, or the file cannot be written.
    """
    gates = output_gates(model)
    tensors = {
        f"{name}.{key}": tensor
        for name, gate in gates.items()
        for key, tensor in gate.state_dict().items()
    }
    options = next(iter(gates.values())).options
    return write_gates(path, model, kind=KIND, options=options, tensors=tensors)


def load_gates(
    model: nn.Module, path: str | Path, *, dtype: torch.dtype | None = None
) -> dict[str, OutputGate]:
    """Read output gates into a model, and attach them before if it has none.

    Args:
        model: The base that they were trained on, with gates of the same options or without.
        path: What :func:`save_gates` has written.
        dtype: Of gates that are attached; that of the model if None.

    Returns:
        The gates by the names of their attention modules.

    Raises:
        GatesError: The file is missing, damaged, or holds gates of another base, kind or options;
            the model is then as before.
    """
    options, tensors = read_gates(path, model, kind=KIND)
    gates = attached_gates(model)
    attaches = not gates
    if attaches:
        gates = attach_output_gate(model, dtype=dtype, **options)
    own = {f"{n}.{key}": t for n, gate in gates.items() for key, t in gate.state_dict().items()}
    found, expected = ({n: tuple(t.shape) for n, t in d.items()} for d in (tensors, own))
    given = {key: value for gate in gates.values() for key, value in gate.options.items()}
    if found != expected or options != given | {"bias_init": options.get("bias_init")}:
        if attaches:
            detach_output_gate(model)
        raise GatesError(
            f"{path} holds gates with {options}, which do not fit those of the model with {given}:"
            " call detach_output_gate(model) before"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    return gates
