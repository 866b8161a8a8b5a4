"""What adapters were called in training, read from how strongly they answer to words."""

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffusion.lora_file import LoraBundle
from diffusion.models.embedded_base import EmbeddedBase
from diffusion.models.flow_matching import velocity
from diffusion.models.text_encoders import MiniLM

LAYERS = tuple(
    f"transformer_blocks.0.{name}"
    for name in (
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "ff_context.net.0.proj",
        "norm1.linear", "norm1_context.linear",
    )
)  # fmt: skip
"""Layers of the first block that are given the words of a prompt."""

SHRINK, RIDGE = 0.1, 3.0
"""Of the variances of what layers are given, and of the regression on embeddings."""

SHORTEST, TIME, BATCH = 4, 0.7, 100  # letters of a word; time and prompts of a forward pass
TINY = 1e-5  # of what an adapter that changes nothing is divided by


def common_words(count: int) -> list[str]:
    """Return the most frequent words of four letters and more of the vocabulary of MiniLM."""
    places = MiniLM().tokenizer.get_vocab()
    frequent = sorted(places, key=places.__getitem__)[places["the"] :]
    long = (
        word for word in frequent if word.isascii() and word.isalpha() and len(word) >= SHORTEST
    )
    return list(islice(long, count))


@torch.no_grad()
def given(base: EmbeddedBase, texts: Sequence[str]) -> list[Tensor]:
    """Return the input (N, in_features) of each layer for N texts, averaged over tokens."""
    model, seen = base.transformer, {name: list[Tensor]() for name in LAYERS}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, x, inputs=inputs: inputs.append(x[0])
        )
        for name, inputs in seen.items()
    ]
    shape = (model.config.in_channels // 4, *2 * [base.size // base.vae.stride])
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for start in range(0, len(texts), BATCH):
        text = base.encoder().encode(texts[start : start + BATCH])
        count = len(text.pooled)
        velocity(model, noise.expand(count, *shape), torch.full((count,), TIME), text)
        real = text.tokens.any(-1, keepdim=True)
        for inputs in seen.values():
            if inputs[-1].ndim == 3:
                inputs[-1] = (inputs[-1] * real).sum(1) / real.sum(1)
    for hook in hooks:
        hook.remove()
    return [torch.cat(inputs) for inputs in seen.values()]


def read_vectors(
    bundles: Sequence[LoraBundle], states: Sequence[Tensor], embedded: Tensor
) -> Tensor:
    """Return vectors (n, e) of adapters in the space of a text encoder, without any training.

    An adapter answers to a word by the logarithm of ‖ΔW x‖² for what a layer is given, x, whitened.
    Answers are standardised over words, added over layers, and compared with those of the other
    adapters; their exponentials are regressed on the embeddings of the words.

    Args:
        bundles: n adapters that are told from each other.
        states: Of each of the layers, what it is given under words (W, in_features).
        embedded: The words (W, e).
    """
    answers = torch.zeros(len(bundles), len(embedded))
    for name, x in zip(LAYERS, states, strict=True):
        spread, axes = torch.linalg.eigh(torch.cov(x.T))
        spread = spread.clamp_min(0) + SHRINK * spread.clamp_min(0).mean()
        white = normalize((x - x.mean(0)) @ (axes / spread.sqrt()) @ axes.T, dim=1)
        for row, bundle in enumerate(bundles):
            if (layer := bundle.modules.get(name)) is not None:
                size = (white @ layer.down.float().T @ layer.up.float().T).square().sum(1)
                log = (size / size.mean().clamp_min(1e-30) + 1e-6).log()
                answers[row] += (log - log.mean()) / log.std().clamp_min(TINY)
    answers -= answers.mean(0)
    strength = (answers / answers.std(1, keepdim=True).clamp_min(TINY)).exp()
    words = embedded - embedded.mean(0)
    square = words.T @ words + RIDGE * torch.eye(words.shape[1])
    solved = torch.linalg.solve(square, ((strength - strength.mean(1, keepdim=True)) @ words).T)
    return normalize(solved.T, dim=1)
