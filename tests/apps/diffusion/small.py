"""A small embedded base of random weights, adapters of it, and gates, as files."""

import torch

from diffusion.fusion import GatedFusion
from diffusion.lora_file import Factors, LoraBundle, load_lora, save_lora
from diffusion.models.autoencoder import PatchAutoencoder
from diffusion.models.base import EmbeddedBase
from diffusion.models.text import text_encoder
from diffusion.models.tiny_flux import transformer_of

LAYERS = {
    "transformer_blocks.0.attn.to_q": (32, 32),
    "transformer_blocks.0.ff.net.2": (128, 32),
    "single_transformer_blocks.0.proj_out": (160, 32),
}
TITLES = {"fox": "a red fox", "night": "night sky", "snow": "deep snow"}


def write_base(folder, seed=0):
    """Write an embedded base for tests."""
    torch.manual_seed(seed)
    encoder = text_encoder("ngrams")
    named = {"name": "ngrams", "fingerprint": encoder.fingerprint}
    images = torch.rand(20, 3, 32, 32) * 2 - 1
    base = EmbeddedBase(transformer_of("unit").eval(), PatchAutoencoder.fitted(images), named)
    folder.mkdir()
    base.save(folder)
    return EmbeddedBase.load(folder)


def write_adapter(path, title, seed, layers=None, **metadata):
    """Write an adapter of some layers."""
    torch.manual_seed(seed)
    modules = {
        layer: Factors(torch.randn(2, inputs) / 4, torch.randn(outputs, 2) / 4)
        for layer, (inputs, outputs) in (layers or LAYERS).items()
    }
    found = {"modelspec.title": title} | metadata
    save_lora(LoraBundle("flux", modules, metadata=found), path)


def write_library(folder):
    """Write adapters whose titles are words."""
    folder.mkdir()
    for seed, (name, title) in enumerate(TITLES.items()):
        write_adapter(folder / f"{name}.safetensors", title, seed)


def write_gates(path, base, library):
    """Write gates that are no plain sum."""
    adapters = {name: load_lora(library / f"{name}.safetensors") for name in TITLES}
    fusion = GatedFusion(base.transformer, adapters, everywhere=True)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    fusion.save_gates(path)
