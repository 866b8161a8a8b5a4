"""A small embedded base of random weights, adapters of it, and gates, as files."""

import torch
from safetensors.torch import load_file

from apps.diffusion.embedded_world import World
from apps.diffusion.studies.base_study import ENCODER, UNSEEN
from diffusion.data.concepts import concepts
from diffusion.experiments.trained_gates import GatesForm
from diffusion.experiments.zoo import EncoderForm, shape_of
from diffusion.fusion import GatedFusion
from diffusion.fusion.gates_file import gate_tensors
from diffusion.lora_file import Factors, LoraBundle, load_lora, save_lora
from diffusion.models.embedded_base import EmbeddedBase, PatchAutoencoder, transformer_of
from diffusion.models.text_encoders import text_encoder
from diffusion.retrieval import EncoderConfig, TrainedEncoder
from diffusion.retrieval.encoder import LoraWeightEncoder

LAYERS = {
    "transformer_blocks.0.attn.to_q": (32, 32),
    "transformer_blocks.0.ff.net.2": (128, 32),
    "single_transformer_blocks.0.proj_out": (160, 32),
}
TITLES = {"fox": "a red fox", "night": "night sky", "snow": "deep snow"}


def write_base(folder, seed=0):
    """Write an embedded base for tests."""
    torch.manual_seed(seed)
    named = {"name": "ngrams", "fingerprint": text_encoder("ngrams").fingerprint}
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
    save_lora(LoraBundle("flux", modules, metadata={"modelspec.title": title} | metadata), path)


def write_library(folder):
    """Write adapters whose titles are words."""
    folder.mkdir()
    for seed, (name, title) in enumerate(TITLES.items()):
        write_adapter(folder / f"{name}.safetensors", title, seed)


def write_gates(path, base, library):
    """Write gates that differ from the plain sum."""
    adapters = {name: load_lora(library / f"{name}.safetensors") for name in TITLES}
    fusion = GatedFusion(base.transformer, adapters, everywhere=True)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    fusion.save_gates(path)


def world_of(root):
    """Return the embedded world at unit size, in which nothing is trained."""
    return World(root, quick=True, base={"shape": "unit", "text_encoder": "ngrams"})


def write_world(root):
    """Write what a whole world trains, with random weights: base, both zoos, encoder, gates."""
    world = world_of(root)
    write_base(root / "made")
    world.bases.keep(world.base_piece, EmbeddedBase.load(root / "made"))
    world = world_of(root)
    draw = torch.Generator().manual_seed(3)
    zoos = {seed: {} for seed in (0, 1)}
    for concept in concepts():
        for zoo in zoos.values():
            modules = {
                layer: Factors(
                    torch.randn(1, inputs, generator=draw) / 4,
                    torch.randn(outputs, 1, generator=draw) / 4,
                )
                for layer, (inputs, outputs) in LAYERS.items()
            }
            zoo[concept.name] = LoraBundle(
                "flux", modules, metadata={"modelspec.title": concept.name}
            )
    for seed, zoo in zoos.items():
        world.zoos.keep(world.zoo_piece(seed), zoo)
    trained = [one.name for one in concepts() if one.name not in UNSEEN]
    piece = world.encoder_piece("encoder", 0, concepts=trained, **ENCODER)
    config = EncoderConfig(shape_of(world.base), text_dim=384, **ENCODER["encoder"])
    encoder = TrainedEncoder(LoraWeightEncoder(config), world.text.fingerprint)
    world.run.store("encoders", EncoderForm()).keep(piece, encoder)
    fusion = GatedFusion(world.base.transformer, dict(list(zoos[0].items())[:2]), everywhere=True)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    fusion.save_gates(root / "made.safetensors")
    piece = world.run.piece("gates", 0, start=world.zoo_digest, learning_rate=0.01)
    world.run.store("gates", GatesForm()).keep(piece, load_file(root / "made.safetensors"))
    write_relevance_gate(world, dict(list(zoos[0].items())[:2]))


def write_relevance_gate(world, adapters):
    """Write a relevance gate that opens all, the more the higher their cosines."""
    fusion = GatedFusion(world.base.transformer, adapters, mode="relevance", everywhere=True)
    fusion.context.width.fill_(1.0)
    run = world.beside("retrieved")
    piece = run.piece("relevance gate", 0, start=world.zoo_digest)
    run.store("gates", GatesForm()).keep(piece, gate_tensors(fusion.gate_states()))
