"""The names of SD3's own checkpoints: joint blocks of an image and a text stream."""

from diffusion.lora_file.names.table import NameTable, Row

_B, _T = "transformer_blocks.{i}.", "time_text_embed."


def _block(*layers: str, swapped: str = "never") -> Row:
    return Row(tuple(_B + layer for layer in layers), swapped)


NATIVE_SD3 = NameTable(
    "sd3",
    "sd3",
    {
        "joint_blocks.{i}.x_block.attn.qkv": _block("attn.to_q", "attn.to_k", "attn.to_v"),
        "joint_blocks.{i}.x_block.attn.proj": _block("attn.to_out.0"),
        "joint_blocks.{i}.x_block.attn2.qkv": _block("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "joint_blocks.{i}.x_block.attn2.proj": _block("attn2.to_out.0"),
        "joint_blocks.{i}.x_block.mlp.fc1": _block("ff.net.0.proj"),
        "joint_blocks.{i}.x_block.mlp.fc2": _block("ff.net.2"),
        "joint_blocks.{i}.x_block.adaLN_modulation.1": _block("norm1.linear"),
        "joint_blocks.{i}.context_block.attn.qkv": _block(
            "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"
        ),
        "joint_blocks.{i}.context_block.attn.proj": _block("attn.to_add_out"),
        "joint_blocks.{i}.context_block.mlp.fc1": _block("ff_context.net.0.proj"),
        "joint_blocks.{i}.context_block.mlp.fc2": _block("ff_context.net.2"),
        "joint_blocks.{i}.context_block.adaLN_modulation.1": _block(
            "norm1_context.linear", swapped="last"
        ),
        "context_embedder": Row(("context_embedder",)),
        "t_embedder.mlp.0": Row((_T + "timestep_embedder.linear_1",)),
        "t_embedder.mlp.2": Row((_T + "timestep_embedder.linear_2",)),
        "y_embedder.mlp.0": Row((_T + "text_embedder.linear_1",)),
        "y_embedder.mlp.2": Row((_T + "text_embedder.linear_2",)),
        "final_layer.linear": Row(("proj_out",)),
        "final_layer.adaLN_modulation.1": Row(("norm_out.linear",), "always"),
    },
)
