"""Names of diffusers before 0.22, when attention processors held the adapters of a layer."""

from diffusion.lora_file.family.flux import FLUX
from diffusion.lora_file.family.sd3 import SD3
from diffusion.lora_file.names.table import NameTable, Row


def _rows(layers: list[str]) -> dict[str, Row]:
    rows = {}
    for name in layers:
        block, attention, layer = name.partition(".attn.")
        if attention:
            rows[f"{block}.attn.processor.{layer.removesuffix('.0')}_lora"] = Row((name,))
    return rows


PROCESSORS_FLUX = NameTable("attention processors", "flux", _rows(list(FLUX.layers)))
PROCESSORS_SD3 = NameTable("attention processors", "sd3", _rows(list(SD3.layers)))
