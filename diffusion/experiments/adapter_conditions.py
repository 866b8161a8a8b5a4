"""What gates are told of adapters: roles by their tags, and how well they suit captions."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffusion.fusion.fusion_tasks import FusionTask
from diffusion.fusion.protocol import role_of
from diffusion.fusion.retrieved import retrieve
from diffusion.library.prompts import UNRELATED, least_cosine
from diffusion.lora_file import LoraBundle
from diffusion.models.text_encoders import TextEncoder, TextStates
from diffusion.retrieval.encoder_folder import load_encoder


def roles_of(settings: Mapping[str, Any], library: Mapping[str, LoraBundle]) -> dict[str, str]:
    """Return the roles of adapters from their tags; none unless the settings give them to gates.

    Args:
        settings: ``told``: whether roles are.
        library: Name -> adapter, whose tags name its role.
    """
    told = settings.get("told")
    return {name: role_of(bundle) for name, bundle in library.items()} if told else {}


class CaptionScores:
    """How well adapters suit captions: cosines of their vectors.

    Args:
        encoder: Folder of an encoder of adapters.
        library: Name -> adapter.
    """

    def __init__(self, encoder: Path, library: Mapping[str, LoraBundle]) -> None:
        read = load_encoder(encoder)
        self.vectors = {name: read.encode(bundle) for name, bundle in library.items()}
        self.fingerprint = read.fingerprint

    def scores(self, names: Sequence[str], text: TextStates) -> Tensor:
        """Return the cosines (N, K) of adapters with captions."""
        vectors = torch.stack([self.vectors[name] for name in names])
        return normalize(text.pooled.float(), dim=-1) @ vectors.mT

    def floor(self, text: TextEncoder) -> float:
        """Return the smallest cosine that a search by weights finds."""
        vectors = torch.stack([*self.vectors.values()]).numpy()
        return least_cosine(vectors, text.embed(UNRELATED).numpy())

    def scored(self, tasks: Sequence[FusionTask]) -> list[FusionTask]:
        """Return tasks with the cosines of their adapters and captions as ``scores``."""
        return [replace(task, scores=self.scores(task.adapters, task.text)) for task in tasks]

    def retrieved(self, tasks: Sequence[FusionTask]) -> list[FusionTask]:
        """Return tasks with the adapters that a search retrieves for their captions."""
        found = [retrieve(t.text.pooled, self.vectors, encoder=self.fingerprint) for t in tasks]
        return [
            replace(task, adapters=one.names, found=one)
            for task, one in zip(tasks, found, strict=True)
        ]
