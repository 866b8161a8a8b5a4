"""The names that diffusers gives to the layers of FLUX.1 and SD3."""

from diffusion.lora_file.family.flux import FLUX
from diffusion.lora_file.family.sd3 import SD3
from diffusion.lora_file.names.table import NameTable, Row

DIFFUSERS_FLUX = NameTable("diffusers", "flux", {name: Row((name,)) for name in FLUX.layers})
DIFFUSERS_SD3 = NameTable("diffusers", "sd3", {name: Row((name,)) for name in SD3.layers})
