"""State dictionaries of expert layers as published models have them.

Mixtral, Qwen3-MoE and DeepSeek-V3 store the three matrices of every expert by themselves; here they
are stacked. The hooks of this file translate while a state dictionary is loaded or saved, so that
a published checkpoint fits without conversion, and one saved here fits the published model. Under
FSDP they gather the experts of a layer on every rank, and spread those of rank 0.
"""

from typing import Any, Literal, get_args

import torch
from torch import nn

from core_gates.collectives import gathered, sharded_like

Layout = Literal["stacked", "mixtral", "qwen3_moe", "deepseek_v3"]
State = dict[str, Any]

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_EXPERT_NAMES = {
    "mixtral": ("w1", "w3", "w2"),
    "qwen3_moe": _PROJECTIONS,
    "deepseek_v3": _PROJECTIONS,
}
_LAYER_NAMES = {
    "deepseek_v3": {
        "shared.": "shared_experts.",
        "gate.balance_bias": "gate.e_score_correction_bias",
    }
}


def check_layout(layout: str, *, gated: bool, bias: bool) -> None:
    """Refuse a layout that is unknown or cannot hold such experts.

    Raises:
        ValueError: There is no such layout, or it is one of gated experts without biases.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"unknown layout {layout!r}; choose one of {', '.join(get_args(Layout))}")
    if layout != "stacked" and (bias or not gated):
        raise ValueError(f"the layout {layout!r} holds gated experts without biases only")


def merge_experts(module: nn.Module, state: State, prefix: str, *_: Any) -> None:
    """Stack the entries of single experts; a hook that runs before a state is loaded."""
    experts = _numbers(module)
    for names in dict.fromkeys(_EXPERT_NAMES.values()):
        keys = [[f"{prefix}{e}.{name}.weight" for name in names] for e in experts]
        if not all(key in state for expert in keys for key in expert):
            continue  # if some are there, loading reports them
        parts = [[state.pop(key) for key in expert] for expert in keys]
        first = torch.stack([torch.cat(part[:2]) for part in parts])
        down = torch.stack([part[2] for part in parts])
        for name, value in (("gate_up_proj", first), ("down_proj", down)):
            state[prefix + name] = sharded_like(value, getattr(module, name, None))


def split_experts(module: nn.Module, state: State, prefix: str, _: Any) -> None:
    """Take the stacks apart; a hook that runs after a state was gathered."""
    names = _EXPERT_NAMES.get(str(module.layout))
    if names is None:
        return
    first, down = (gathered(state.pop(prefix + name)) for name in ("gate_up_proj", "down_proj"))
    for e, gate_up, last in zip(_numbers(module), first.unbind(), down.unbind(), strict=True):
        for name, value in zip(names, (*gate_up.chunk(2), last), strict=True):
            state[f"{prefix}{e}.{name}.weight"] = value


def _numbers(module: nn.Module) -> range:
    """Return the numbers of the experts of a module among those of all ranks."""
    first = int(module.first_expert)  # type: ignore[arg-type]
    return range(first, first + int(module.num_experts))  # type: ignore[arg-type]


def rename_on_load(_module: nn.Module, state: State, prefix: str, *_: Any) -> None:
    """Give published entries our names; a hook that runs before a state is loaded."""
    for names in _LAYER_NAMES.values():
        for ours, theirs in names.items():
            _rename(state, prefix + theirs, prefix + ours)


def rename_on_save(module: nn.Module, state: State, prefix: str, _: Any) -> None:
    """Give our entries the names of the layout; a hook that runs after a state was gathered."""
    layout = getattr(module.experts, "layout", "stacked")
    for ours, theirs in _LAYER_NAMES.get(str(layout), {}).items():
        _rename(state, prefix + ours, prefix + theirs)


def _rename(state: State, old: str, new: str) -> None:
    for key in [key for key in state if key.startswith(old)]:
        state[new + key.removeprefix(old)] = state.pop(key)
