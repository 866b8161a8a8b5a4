"""A trained encoder, as a library of adapters uses it."""

import hashlib
import json
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion.lora_file import LoraBundle, LoraFileError
from diffusion.retrieval.batch import collate
from diffusion.retrieval.encoder import LoraWeightEncoder
from diffusion.retrieval.modules import family_of
from diffusion.retrieval.refusal import refusal_of


class TrainedEncoder:
    """Vectors of adapters in the space of a text encoder.

    Args:
        encoder: With its trained weights.
        text_fingerprint: Of the text encoder that it was trained with; empty if unknown.

    Attributes:
        family: Of the bases whose adapters it reads, such as ``flux``.
        dim: Features of a vector.
    """

    def __init__(self, encoder: LoraWeightEncoder, text_fingerprint: str = "") -> None:
        self.encoder = encoder.eval().requires_grad_(False)
        self.config = encoder.config
        self.text_fingerprint = text_fingerprint
        self.family = family_of(self.config.shape)
        self.dim = self.config.out_dim

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the weights and the configuration."""
        settings = json.dumps([self.config.state(), self.text_fingerprint], sort_keys=True)
        digest = hashlib.sha256(settings.encode())
        for name, tensor in sorted(self.encoder.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def refusal(self, bundle: LoraBundle) -> str | None:
        """Return one line about why an adapter cannot be encoded; None if its layers fit."""
        return refusal_of(bundle, self.config)

    def encode(self, bundle: LoraBundle) -> Tensor:
        """Return the vector (dim,) of an adapter, of unit length, in float32.

        Raises:
            LoraFileError: It does not fit, is not finite, or changes nothing.
        """
        return F.normalize(self.token(bundle), dim=0)

    @torch.no_grad()
    def token(self, bundle: LoraBundle) -> Tensor:
        """Return the vector (dim,) as it is, of any length.

        Raises:
            LoraFileError: The adapter does not fit, is not finite, or changes nothing.
        """
        reason = self.refusal(bundle)
        if reason:
            raise LoraFileError(f"the adapter cannot be encoded: {reason}")
        batch = collate([bundle], self.encoder.modules_read)
        if not batch.present.any():
            raise LoraFileError("the adapter cannot be encoded: all of its changes are zero")
        vector = self.encoder(batch.like(self.encoder.final_layer_norm.weight))[0].float().cpu()
        if not torch.isfinite(vector).all():
            raise LoraFileError("the adapter cannot be encoded: its values are too large")
        return vector
