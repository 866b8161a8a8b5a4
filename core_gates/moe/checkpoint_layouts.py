"""Names that published models give to the entries of a mixture-of-experts layer, and reading them.

Mixtral, Qwen3-MoE and DeepSeek-V3 store the three matrices of every expert by themselves; here they
are stacked. The hooks of this file translate while a state dictionary is loaded, so that a
published checkpoint fits without conversion. Saving keeps the stacks, which distributed checkpoints
need; `core_gates.moe.checkpoint_export.export_state_dict` writes the published form.
"""

from typing import Any, Literal

import torch
from torch import nn

from core_gates.collectives import sharded_like

Layout = Literal["mixtral", "qwen3_moe", "deepseek_v3"]
State = dict[str, Any]

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
EXPERT_NAMES: dict[Layout, tuple[str, str, str]] = {
    "mixtral": ("w1", "w3", "w2"),
    "qwen3_moe": _PROJECTIONS,
    "deepseek_v3": _PROJECTIONS,
}
"""Names of the gate, up and down matrices of an expert."""

LAYER_NAMES: dict[Layout, dict[str, str]] = {
    "deepseek_v3": {
        "shared.": "shared_experts.",
        "gate.balance_bias": "gate.e_score_correction_bias",
    }
}
"""Beginnings of the names in a layer that are not ours -> theirs."""


def merge_experts(module: nn.Module, state: State, prefix: str, *_: Any) -> None:
    """Stack the entries of single experts; a hook that runs before a state is loaded."""
    experts = range(int(module.num_experts))  # type: ignore[arg-type]
    for names in dict.fromkeys(EXPERT_NAMES.values()):
        keys = [[f"{prefix}{e}.{name}.weight" for name in names] for e in experts]
        if not all(key in state for expert in keys for key in expert):
            continue  # if some are there, loading reports them
        parts = [[state.pop(key) for key in expert] for expert in keys]
        first = torch.stack([torch.cat(part[:2]) for part in parts])
        down = torch.stack([part[2] for part in parts])
        for name, value in (("gate_up_proj", first), ("down_proj", down)):
            state[prefix + name] = sharded_like(value, getattr(module, name, None))


def take_own_experts(module: nn.Module, state: State, prefix: str, *_: Any) -> None:
    """Leave, of the entries of single experts, those of this rank; a hook as above."""
    held = int(module.experts.num_experts)  # type: ignore[union-attr, arg-type]
    first = int(module.first_expert)  # type: ignore[arg-type]
    for key in [key for key in state if key.startswith(prefix)]:
        number, dot, rest = key.removeprefix(prefix).partition(".")
        if number.isdecimal():
            value, place = state.pop(key), int(number) - first
            if 0 <= place < held:
                state[f"{prefix}experts.{place}{dot}{rest}"] = value


def rename_on_load(_module: nn.Module, state: State, prefix: str, *_: Any) -> None:
    """Give published entries our names; a hook that runs before a state is loaded."""
    for renamed in LAYER_NAMES.values():
        for ours, theirs in renamed.items():
            for key in [key for key in state if key.startswith(prefix + theirs)]:
                state[prefix + ours + key.removeprefix(prefix + theirs)] = state.pop(key)
