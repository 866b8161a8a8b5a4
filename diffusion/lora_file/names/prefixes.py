"""What comes before the name of a layer: which program wrote the file, and of which network."""

from typing import NamedTuple

TRANSFORMER = "transformer"


class Prefix(NamedTuple):
    """The start of the names of a network.

    Attributes:
        text: Such as ``lora_unet_``.
        component: ``transformer``, or a text encoder by its role: ``clip_l``, ``clip_g``, ``t5``,
            ``first``, ``second``, ``third``.
    """

    text: str
    component: str


_TRANSFORMER = (
    "base_model.model.transformer.",
    "base_model.model.diffusion_model.",
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "pipe.dit.",
    "dit.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
    "",
)
_TEXT = {
    "text_encoders.clip_l.transformer.": "clip_l",
    "text_encoders.clip_g.transformer.": "clip_g",
    "text_encoders.t5xxl.transformer.": "t5",
    "text_encoders.clip_l.": "clip_l",
    "text_encoders.clip_g.": "clip_g",
    "text_encoders.t5xxl.": "t5",
    "text_encoder_3.": "third",
    "text_encoder_2.": "second",
    "text_encoder.": "first",
    "lora_te3_": "t5",
    "lora_te2_": "second",
    "lora_te1_": "first",
    "lora_te_": "first",
    "base_model.model.": "first",
}

PREFIXES = (
    *(Prefix(text, component) for text, component in _TEXT.items()),
    *(Prefix(text, TRANSFORMER) for text in _TRANSFORMER),
)
"""All prefixes; a name may start with several, and the layer that follows decides."""

_ENCODERS = {
    "flux": {"first": 1, "clip_l": 1, "second": 2, "t5": 2, "third": 2},
    "sd3": {"first": 1, "clip_l": 1, "second": 2, "clip_g": 2, "third": 3, "t5": 3},
}


def encoder_name(family: str, component: str) -> str:
    """Return the diffusers name of a text encoder, such as ``text_encoder_2``."""
    number = _ENCODERS.get(family, _ENCODERS["sd3"]).get(component, 2)
    return "text_encoder" if number == 1 else f"text_encoder_{number}"
