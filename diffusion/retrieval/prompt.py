"""Vectors of adapters as tokens of a prompt, which switch an adapter on without trigger words."""

import torch
from torch import Tensor

from diffusion.lora_file.container import LoraFileError


def with_adapters(prompt: Tensor, tokens: Tensor, strength: float = 1.0) -> Tensor:
    """Append one token per adapter to an embedded prompt.

    Pipelines of diffusers give all text tokens the position zero, so it needs no other change.

    Args:
        prompt: Embedded prompt (B, S, D).
        tokens: (K, D), see :meth:`diffusion.retrieval.TrainedEncoder.token`.
        strength: Factor of the tokens.

    Returns:
        (B, S + K, D)

    Raises:
        LoraFileError: The features differ.
    """
    if prompt.shape[-1] != tokens.shape[-1]:
        raise LoraFileError(
            f"the token of the adapter has {tokens.shape[-1]} features and the prompt "
            f"{prompt.shape[-1]}: use an encoder of this base"
        )
    added = (strength * tokens).to(prompt).expand(len(prompt), -1, -1)
    return torch.cat([prompt, added], 1)
