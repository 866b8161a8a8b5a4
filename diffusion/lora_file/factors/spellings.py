"""The last part of the name of a tensor: which factor of a layer it is."""

import re
from typing import NamedTuple

SPELLINGS = {
    "lora_A": "down",
    "lora_B": "up",
    "lora_down": "down",
    "lora_up": "up",
    "lora_mid": "mid",
    "lora.down": "down",
    "lora.up": "up",
    "lora_linear_layer.down": "down",
    "lora_linear_layer.up": "up",
    "hada_w1_a": "w1_a",
    "hada_w1_b": "w1_b",
    "hada_w2_a": "w2_a",
    "hada_w2_b": "w2_b",
    "hada_t1": "t1",
    "hada_t2": "t2",
    "lokr_w1": "k1",
    "lokr_w1_a": "k1_a",
    "lokr_w1_b": "k1_b",
    "lokr_w2": "k2",
    "lokr_w2_a": "k2_a",
    "lokr_w2_b": "k2_b",
    "lokr_t2": "k2_t",
    "dora_scale": "magnitude",
    "lora_magnitude_vector": "magnitude",
    "alpha": "alpha",
}
"""Each spelling of a factor and its role; PEFT puts the name of the adapter after it."""

UNSUPPORTED = {
    r"\.diff(?:\.weight)?": "a full weight difference",
    r"\.diff_b(?:\.weight)?": "a difference of a bias",
    r"\.set_weight": "a replaced weight",
    r"\.lora_[AB](?:\.[\w-]+)?\.bias|\.lora_(?:up|down)\.bias": "a bias of a factor",
    r"\.(?:oft_blocks|oft_diag|oft_[rR]|boft_[rRs])(?:\.[\w-]+)*": "an orthogonal rotation (OFT)",
    r"\.[ab][12]\.weight": "a factor of GLoRA",
    r"\.(?:on_input|ia3_l)(?:\.[\w-]+)*": "a factor of IA3",
    r"\.(?:w_norm|b_norm)": "a difference of a norm",
}
"""What is known and has no low-rank form."""

_ADAPTER = r"(?:\.(?!weight$|bias$)(?P<adapter>[\w-]+))?(?:\.weight)?"
_FACTOR = re.compile(
    r"(?P<stem>.+)\.(?P<spelling>"
    + "|".join(re.escape(s) for s in sorted(SPELLINGS, key=len, reverse=True))
    + ")"
    + _ADAPTER
)
_PROCESSOR = re.compile(r"(?P<stem>.+_lora[12]?)\.(?P<spelling>down|up)\.weight")
_UNSUPPORTED = {re.compile(f".+(?:{pattern})"): what for pattern, what in UNSUPPORTED.items()}


class Spelled(NamedTuple):
    """A name taken apart.

    Attributes:
        stem: Prefix and name of the layer.
        role: Of the factor, such as ``down``.
        spelling: As in the file, such as ``lora_A.weight``, with ``*`` for the name of an adapter.
        adapter: Name that PEFT gave to the adapter, or empty.
    """

    stem: str
    role: str
    spelling: str
    adapter: str = ""


def spell(name: str) -> Spelled | None:
    """Split the factor off a name; None if it ends with none that is known."""
    if match := _PROCESSOR.fullmatch(name):
        return Spelled(match["stem"], match["spelling"], f"_lora.{match['spelling']}.weight")
    if match := _FACTOR.fullmatch(name):
        stem, spelling, adapter = match["stem"], match["spelling"], match["adapter"] or ""
        rest = name[len(stem) + 1 + len(spelling) :]
        rest = rest.replace(f".{adapter}", ".*", 1) if adapter else rest
        return Spelled(stem, SPELLINGS[spelling], spelling + rest, adapter)
    return None


def unsupported(name: str) -> str | None:
    """Return what a tensor is that has no low-rank form; None if it is unknown."""
    return next((what for p, what in _UNSUPPORTED.items() if p.fullmatch(name)), None)
