"""How dialects of adapter files spell the factors of a change, by the definitions of formats."""

import itertools
from collections.abc import Iterator

from diffusion.evaluation.parity.files.dialects import NAMES, PREFIXES

PAIRS = {
    "lora_A": ("lora_A.weight", "lora_B.weight"),
    "lora_A bare": ("lora_A", "lora_B"),
    "lora_A adapter": ("lora_A.default.weight", "lora_B.default.weight"),
    "lora_A adapter bare": ("lora_A.my-style", "lora_B.my-style"),
    "lora_down": ("lora_down.weight", "lora_up.weight"),
    "lora.down": ("lora.down.weight", "lora.up.weight"),
    "lora_linear_layer": ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    "convolution": ("lora_down.weight", "lora_up.weight"),
    "tucker": ("lora_down.weight", "lora_up.weight"),
    "dora rows": ("lora_down.weight", "lora_up.weight"),
    "dora peft": ("lora_A.weight", "lora_B.weight"),
}
LOKR = tuple(f"lokr {a}{b}" for a, b in itertools.product("wf", "wft"))
"""First and second matrix whole, factored, or with a core."""
FACTORS = (*PAIRS, "loha", "loha tucker", *LOKR)
UNFUSED_FACTORS = ("dora columns",)
"""Norms of columns belong to the whole layer, so they occur on layers of one part only."""
PROCESSOR_FACTORS = ("_lora",)
PAIRS |= {"_lora": ("down.weight", "up.weight"), "dora columns": PAIRS["lora_down"]}


def kinds_of(names: str) -> tuple[str, ...]:
    """Return the kinds of factors that occur with the names of a dialect."""
    if names == "xlabs" or names.startswith("processors"):
        return PROCESSOR_FACTORS
    return FACTORS + (UNFUSED_FACTORS if names.startswith("diffusers") else ())


def product() -> Iterator[tuple[str, str, str]]:
    """Yield every dialect of names with every kind of factors and every prefix."""
    for names, (prefix, underscored) in itertools.product(
        NAMES, [(p, u) for u, ps in PREFIXES.items() for p in ps]
    ):
        for kind in kinds_of(names):
            if not (underscored and kind == "_lora"):
                yield names, kind, prefix
