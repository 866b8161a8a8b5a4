"""Finding adapters by their weights: an encoder into the space of captions (arXiv 2508.02107).

What trains it, `diffusion.retrieval.retriever` and `diffusion.retrieval.retriever_data`,
needs Lightning and is imported from there.
"""

from diffusion.data.published_table import Example
from diffusion.retrieval.encoder import AdapterBatch, LoraWeightEncoder, collate
from diffusion.retrieval.encoder_config import EncoderConfig, modules_of, types_used
from diffusion.retrieval.encoder_folder import (
    TrainedEncoder,
    load_encoder,
    load_published,
    save_encoder,
)

__all__ = [
    "AdapterBatch",
    "EncoderConfig",
    "Example",
    "LoraWeightEncoder",
    "TrainedEncoder",
    "collate",
    "load_encoder",
    "load_published",
    "modules_of",
    "save_encoder",
    "types_used",
]
