"""What a script needs first, each with its file."""

from .fusion import GatedFusion as GatedFusion
from .fusion.pipeline import AutoLoraPipeline as AutoLoraPipeline
from .library import LoraLibrary as LoraLibrary
from .lora_file import load_lora as load_lora
from .lora_file import save_lora as save_lora
from .retrieval import LoraWeightEncoder as LoraWeightEncoder
from .retrieval import load_encoder as load_encoder

__version__: str
