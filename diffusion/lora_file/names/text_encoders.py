"""The names of the layers of CLIP and T5, which transformers and kohya share."""

from diffusion.lora_file.names.table import NameTable, Row

_CLIP = "text_model.encoder.layers.{i}."
_T5 = "encoder.block.{i}.layer."
_ATTENTION = {
    "self_attn.to_q_lora": "self_attn.q_proj",
    "self_attn.to_k_lora": "self_attn.k_proj",
    "self_attn.to_v_lora": "self_attn.v_proj",
    "self_attn.to_out_lora": "self_attn.out_proj",
}
_LAYERS = (
    *(_CLIP + name for name in (*_ATTENTION.values(), "mlp.fc1", "mlp.fc2")),
    *(f"{_T5}0.SelfAttention.{name}" for name in "qkvo"),
    *(f"{_T5}1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wi", "wo")),
    "text_projection",
)

TEXT_ENCODERS = NameTable(
    "transformers",
    "",
    {name: Row((name,)) for name in _LAYERS}
    | {_CLIP + old: Row((_CLIP + new,)) for old, new in _ATTENTION.items()},
)
"""Adapters of text encoders, old attention processors included."""
