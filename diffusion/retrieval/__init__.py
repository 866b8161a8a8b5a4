"""Finding adapters by their weights: an encoder into the space of captions (arXiv 2508.02107).

What trains it, ``diffusion.retrieval.module`` and ``diffusion.retrieval.data``, needs Lightning and
is imported from there.
"""

from diffusion.retrieval.augmentation import Augmentation
from diffusion.retrieval.batch import AdapterBatch, collate
from diffusion.retrieval.captions import Example, TextEncoder
from diffusion.retrieval.checkpoint import load_encoder, load_published, save_encoder
from diffusion.retrieval.config import EncoderConfig
from diffusion.retrieval.encoder import LoraWeightEncoder
from diffusion.retrieval.losses import ContrastiveLoss, PublishedLoss
from diffusion.retrieval.modules import modules_of, types_used
from diffusion.retrieval.trained import TrainedEncoder

__all__ = [
    "AdapterBatch",
    "Augmentation",
    "ContrastiveLoss",
    "EncoderConfig",
    "Example",
    "LoraWeightEncoder",
    "PublishedLoss",
    "TextEncoder",
    "TrainedEncoder",
    "collate",
    "load_encoder",
    "load_published",
    "modules_of",
    "save_encoder",
    "types_used",
]
