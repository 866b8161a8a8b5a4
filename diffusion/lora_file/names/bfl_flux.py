"""The names of FLUX.1's own checkpoints, in use by ComfyUI, kohya and others."""

from diffusion.lora_file.names.table import NameTable, Row

_D, _S, _T = "transformer_blocks.{i}.", "single_transformer_blocks.{i}.", "time_text_embed."


def _double(*layers: str) -> Row:
    return Row(tuple(_D + layer for layer in layers))


def _single(*layers: str) -> Row:
    return Row(tuple(_S + layer for layer in layers))


BFL_FLUX = NameTable(
    "bfl",
    "flux",
    {
        "double_blocks.{i}.img_attn.qkv": _double("attn.to_q", "attn.to_k", "attn.to_v"),
        "double_blocks.{i}.txt_attn.qkv": _double(
            "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"
        ),
        "double_blocks.{i}.img_attn.proj": _double("attn.to_out.0"),
        "double_blocks.{i}.txt_attn.proj": _double("attn.to_add_out"),
        "double_blocks.{i}.img_mlp.0": _double("ff.net.0.proj"),
        "double_blocks.{i}.img_mlp.2": _double("ff.net.2"),
        "double_blocks.{i}.txt_mlp.0": _double("ff_context.net.0.proj"),
        "double_blocks.{i}.txt_mlp.2": _double("ff_context.net.2"),
        "double_blocks.{i}.img_mod.lin": _double("norm1.linear"),
        "double_blocks.{i}.txt_mod.lin": _double("norm1_context.linear"),
        "single_blocks.{i}.linear1": _single("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "single_blocks.{i}.linear2": _single("proj_out"),
        "single_blocks.{i}.modulation.lin": _single("norm.linear"),
        "img_in": Row(("x_embedder",)),
        "txt_in": Row(("context_embedder",)),
        "time_in.in_layer": Row((_T + "timestep_embedder.linear_1",)),
        "time_in.out_layer": Row((_T + "timestep_embedder.linear_2",)),
        "vector_in.in_layer": Row((_T + "text_embedder.linear_1",)),
        "vector_in.out_layer": Row((_T + "text_embedder.linear_2",)),
        "guidance_in.in_layer": Row((_T + "guidance_embedder.linear_1",)),
        "guidance_in.out_layer": Row((_T + "guidance_embedder.linear_2",)),
        "final_layer.linear": Row(("proj_out",)),
        "final_layer.adaLN_modulation.1": Row(("norm_out.linear",), "always"),
    },
)
