"""Output gates of a model as one small file."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from core_gates.errors import GatesError
from language.gated.attach import (
    CHILD,
    OutputGate,
    attach_output_gate,
    detach_output_gate,
    output_gates,
)
from language.hf.gate_file import copy_into, read_gates, write_gates
from language.hf.locate import attached

KIND = "output"


def save_gates(model: nn.Module, path: str | Path) -> Path:
    """Write the output gates of a model, and nothing else of it.

    Args:
        model: With gates, see `language.gated.attach.attach_output_gate`.
        path: A ``.safetensors`` file. Its metadata hold the options of the gates, and the
            fingerprint of the base, see `language.hf.gate_file.fingerprint`.

    Returns:
        The path.

    Raises:
        GatesError: The model has no output gates, or the file cannot be written.
    """
    gates = output_gates(model)
    options = next(iter(gates.values())).options
    return write_gates(path, model, kind=KIND, options=options, tensors=_state_of(gates))


def load_gates(
    model: nn.Module, path: str | Path, *, dtype: torch.dtype | None = None
) -> dict[str, OutputGate]:
    """Read output gates into a model, and attach them before if it has none.

    Args:
        model: The base that they were trained on, with gates of the same options or without.
        path: What `save_gates` has written.
        dtype: Of gates that are attached; that of the model if None.

    Returns:
        The gates by the names of their attention modules.

    Raises:
        GatesError: The file is missing, damaged, or holds gates of another base, kind or options;
            the model is then as before.
    """
    options, tensors = read_gates(path, model, kind=KIND)
    before = attached(model, CHILD, OutputGate)
    gates = before or attach_output_gate(model, dtype=dtype, **options)
    given = {key: value for gate in gates.values() for key, value in gate.options.items()}
    given["bias_init"] = options.get("bias_init")
    try:
        copy_into(_state_of(gates), tensors, options=options, given=given, path=path)
    except GatesError:
        if not before:
            detach_output_gate(model)
        raise
    return gates


def _state_of(gates: Mapping[str, OutputGate]) -> dict[str, Tensor]:
    return {f"{n}.{key}": t for n, gate in gates.items() for key, t in gate.state_dict().items()}
