"""Adapters that are exchanged in a compiled model without compiling again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from core_gates.adapters import Room
from diffusion.evaluation.parity.models.subjects import (
    predicted,
    random_adapter,
    three_adapters,
    unit_base,
    unit_inputs,
    with_drawn_gates,
)
from diffusion.evaluation.parity.worst import Check, relative_error, worst
from diffusion.fusion import GatedFusion
from diffusion.lora_file import LoraBundle

ROOM = Room(3, 4)


def others(model: nn.Module) -> Iterator[dict[str, LoraBundle]]:
    """Yield other adapters of a model: fewer, more, of other ranks, of other layers."""
    yield {"d": random_adapter(model, 4, rank=4)}
    yield {"e": random_adapter(model, 5, rank=1, where="attn"), "d": random_adapter(model, 6)}
    yield {name: random_adapter(model, 7 + k, rank=k + 1) for k, name in enumerate("xyz")}


def check_recompiling(folder: str | Path) -> dict[str, Check]:
    """Count compilations after the first one, and compare what the compiled model predicts."""
    del folder
    model, inputs = unit_base(), unit_inputs()
    fusion = with_drawn_gates(GatedFusion(model, three_adapters(model), room=ROOM))
    counted = CompileCounterWithBackend("aot_eager")  # type: ignore[no-untyped-call]
    errors, exchanged = [], list(others(model))
    torch._dynamo.reset()
    with fusion:
        compiled: Any = torch.compile(model, backend=counted)
        predicted(compiled, inputs)
        first = counted.frame_count
        for number, adapters in enumerate(exchanged):
            fusion.set_adapters(adapters)
            fusion.set_strengths(dict.fromkeys(adapters, 0.5 + number))
            found = predicted(compiled, inputs)
            errors.append((f"exchange {number}", relative_error(found, predicted(model, inputs))))
    again = counted.frame_count - first
    return {
        "recompilations at an exchange": Check(float(again), len(errors)),
        "compiled after an exchange against uncompiled": worst(errors),
    }
