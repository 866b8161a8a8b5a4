"""The settings from which PEFT rebuilds an adapter."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffusion.lora_file.factors.change import Factors
from diffusion.lora_file.writers.layout import alpha_of, most_common, refuse

_ENDS = {"proj_out"}
"""Names that other layers end with, too: PEFT takes a name for the end of any longer one."""


def tensors_of(modules: Mapping[str, Factors], prefix: str, format_name: str) -> dict[str, Tensor]:
    """Return the tensors of the layers of one network under the names of PEFT.

    Raises:
        FormatError: Only some layers are DoRA adapters, or they hold norms of columns.
    """
    dora = [name for name in modules if modules[name].magnitude is not None]
    if dora:
        others = [name for name in modules if modules[name].magnitude is None]
        refuse(format_name, others, "in PEFT all layers are DoRA adapters or none is")
        columns = [n for n in dora if (m := modules[n].magnitude) is not None and m.shape[1] != 1]
        refuse(format_name, columns, "PEFT's DoRA knows norms of rows only")
    tensors = {}
    for name in modules:
        factors = modules[name]
        tensors[f"{prefix}{name}.lora_A.weight"] = factors.down
        tensors[f"{prefix}{name}.lora_B.weight"] = factors.up
        if factors.magnitude is not None:
            tensors[f"{prefix}{name}.lora_magnitude_vector"] = factors.magnitude[:, 0]
    return tensors


def settings_of(modules: Mapping[str, Factors]) -> dict[str, Any]:
    """Return rank, α and the layers with others, as ``LoraConfig`` takes them."""
    alphas, ranks, dora = {}, {}, False
    for name in modules:
        factors = modules[name]
        ranks[name], alphas[name] = factors.rank, _plain(alpha_of(factors))
        dora = dora or factors.magnitude is not None
    rank, alpha = int(most_common(ranks.values())), most_common(alphas.values())
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_anchored(n): r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {_anchored(n): a for n, a in alphas.items() if a != alpha},
        "target_modules": _targets(list(modules)),
        "use_dora": dora,
        "use_rslora": False,
        "bias": "none",
    }


def _plain(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha


def _anchored(name: str) -> str:
    return f"^{name}" if name in _ENDS else name


def _targets(names: list[str]) -> list[str] | str:
    """Return the names, or a regular expression where one of them is the end of others."""
    if not _ENDS.intersection(names):
        return sorted(names)
    return "|".join(re.escape(name) for name in sorted(names))
