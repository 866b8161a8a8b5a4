"""The names of DiffSynth-Studio: streams a (image) and b (text), those of the published gates."""

from diffusion.lora_file.family.flux import FLUX
from diffusion.lora_file.names.table import NameTable, Row

_T = "time_text_embed."

DIFFSYNTH_FLUX = NameTable(
    "diffsynth",
    "flux",
    {layer.name: Row(layer.parts) for layer in FLUX.fused}
    | {
        "time_embedder.timestep_embedder.0": Row((_T + "timestep_embedder.linear_1",)),
        "time_embedder.timestep_embedder.2": Row((_T + "timestep_embedder.linear_2",)),
        "guidance_embedder.timestep_embedder.0": Row((_T + "guidance_embedder.linear_1",)),
        "guidance_embedder.timestep_embedder.2": Row((_T + "guidance_embedder.linear_2",)),
        "pooled_text_embedder.0": Row((_T + "text_embedder.linear_1",)),
        "pooled_text_embedder.2": Row((_T + "text_embedder.linear_2",)),
        "final_norm_out.linear": Row(("norm_out.linear",)),
        "final_proj_out": Row(("proj_out",)),
    },
)
