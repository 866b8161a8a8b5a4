"""Made-up adapters of a small FLUX, and a text encoder that knows their concepts."""

import pytest
import torch
from torch.nn import functional as F

from diffusion.lora_file import Factors, FluxShape, LoraBundle
from diffusion.retrieval import EncoderConfig, Example

SHAPE = FluxShape(
    num_layers=1, num_single_layers=2, num_heads=2, head_dim=8, context_dim=16, pooled_dim=16,
    guidance=False,
)  # fmt: skip


class Words:
    """A caption ``concept number`` lies near a random direction of its concept."""

    fingerprint = "words"

    def __init__(self, dim=24):
        self.dim, self.calls = dim, []
        self._generator, self._known = torch.Generator().manual_seed(7), {}

    def direction(self, word):
        if word not in self._known:
            found = torch.randn(self.dim, generator=self._generator)
            self._known[word] = F.normalize(found, dim=0)
        return self._known[word]

    def embed(self, texts):
        self.calls += texts
        near = [self.direction(text.split()[0]) + 0.7 * self.direction(text) for text in texts]
        return F.normalize(torch.stack(near), dim=1)


def random_adapter(seed, shape=SHAPE, rank=2, types=None, dtype=torch.float32, family="flux"):
    """An adapter of all layers of blocks, or of those of some types."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for module in shape.fused():
        for part, size in zip(module.parts, module.sizes, strict=True):
            down = torch.randn(rank, module.in_features, generator=generator, dtype=dtype)
            up = torch.randn(size, rank, generator=generator, dtype=dtype)
            if types is None or module.type in types:
                layers[part] = Factors(down, up, 0.5)
    return LoraBundle(family, layers)


def concept_adapters(concepts, seeds, signal=0.75, shape=SHAPE):
    """Adapters ``[seed][concept]``: a direction per concept and layer, plus noise."""
    directions = [random_adapter(100 + c, shape) for c in range(concepts)]
    found = []
    for seed in range(seeds):
        row = []
        for number, own in enumerate(directions):
            noise = random_adapter(10_000 * (seed + 1) + number, shape)
            layers = {
                name: Factors(
                    torch.cat([signal**0.5 * own.modules[name].down,
                               (1 - signal) ** 0.5 * noise.modules[name].down]),
                    torch.cat([own.modules[name].up, noise.modules[name].up], 1),
                    0.3,
                )
                for name in own.modules
            }  # fmt: skip
            row.append(LoraBundle("flux", layers))
        found.append(row)
    return found


def small_config(**changes):
    options = {"text_dim": 24, "dim": 16, "heads": 2, "head_dim": 8, "hidden_dim": 32, **changes}
    return EncoderConfig(options.pop("shape", SHAPE), **options)


@pytest.fixture
def adapter():
    """``adapter(seed, shape=, rank=, types=, dtype=)``: a random one."""
    return random_adapter


@pytest.fixture
def config():
    """``config(**changes)``: of a small encoder."""
    return small_config


@pytest.fixture
def words():
    return Words()


@pytest.fixture(scope="session")
def zoo():
    """``zoo(concepts, seeds)``: see `concept_adapters`."""
    return concept_adapters


@pytest.fixture
def examples(zoo):
    """Eight adapters with six captions each."""
    captions = [[f"c{c} {k}" for k in range(6)] for c in range(8)]
    return [Example(bundle, captions[c], f"c{c}") for c, bundle in enumerate(zoo(8, 1)[0])]
