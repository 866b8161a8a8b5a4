"""Names of layers in the dialects of adapter files, as tables from their names to diffusers names.

A dialect is a file with one table. To add one, write its rows and list the table here.
"""

from diffusion.lora_file.names.bfl_flux import BFL_FLUX
from diffusion.lora_file.names.diffsynth_flux import DIFFSYNTH_FLUX
from diffusion.lora_file.names.diffusers_layers import DIFFUSERS_FLUX, DIFFUSERS_SD3
from diffusion.lora_file.names.native_sd3 import NATIVE_SD3
from diffusion.lora_file.names.old_processors import PROCESSORS_FLUX, PROCESSORS_SD3
from diffusion.lora_file.names.prefixes import PREFIXES, Prefix
from diffusion.lora_file.names.table import Match, NameTable, Row
from diffusion.lora_file.names.text_encoders import TEXT_ENCODERS
from diffusion.lora_file.names.xlabs_flux import XLABS_FLUX

TABLES = (
    DIFFUSERS_FLUX,
    BFL_FLUX,
    XLABS_FLUX,
    PROCESSORS_FLUX,
    DIFFSYNTH_FLUX,
    DIFFUSERS_SD3,
    NATIVE_SD3,
    PROCESSORS_SD3,
)
"""Tables of the layers of transformers."""

__all__ = ["PREFIXES", "TABLES", "TEXT_ENCODERS", "Match", "NameTable", "Prefix", "Row"]
