"""The names of XLabs' trainer: processors of attention, 1 of the image and 2 of the text."""

from diffusion.lora_file.names.table import NameTable, Row

_D, _S = "transformer_blocks.{i}.attn.", "single_transformer_blocks.{i}."

XLABS_FLUX = NameTable(
    "xlabs",
    "flux",
    {
        "double_blocks.{i}.processor.qkv_lora1": Row((_D + "to_q", _D + "to_k", _D + "to_v")),
        "double_blocks.{i}.processor.qkv_lora2": Row(
            (_D + "add_q_proj", _D + "add_k_proj", _D + "add_v_proj")
        ),
        "double_blocks.{i}.processor.proj_lora1": Row((_D + "to_out.0",)),
        "double_blocks.{i}.processor.proj_lora2": Row((_D + "to_add_out",)),
        "single_blocks.{i}.processor.qkv_lora": Row(
            (_S + "attn.to_q", _S + "attn.to_k", _S + "attn.to_v")
        ),
        "single_blocks.{i}.processor.proj_lora": Row((_S + "proj_out",)),
    },
)
