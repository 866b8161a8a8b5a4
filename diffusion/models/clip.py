"""The text encoder that the published retriever puts adapters into the space of."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from core_gates.errors import GatesError
from diffusion.models.states import BATCH, TextStates


class ClipText:
    """The text tower of CLIP in the folder of a pipeline, such as that of FLUX.1 (ViT-L/14).

    The state of the last layer at the end of the text is of length 1, without projection, as the
    published retriever takes it.

    Args:
        folder: Of the pipeline, with ``text_encoder`` and ``tokenizer``.

    Raises:
        GatesError: They are missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        from transformers import CLIPTextModel, CLIPTokenizer

        place = Path(folder)
        try:
            self.tokenizer = CLIPTokenizer.from_pretrained(
                place / "tokenizer", local_files_only=True
            )
            self.model = CLIPTextModel.from_pretrained(
                place / "text_encoder", local_files_only=True, use_safetensors=True
            ).float()
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:120]
            raise GatesError(
                f"{place} holds no text encoder of CLIP ({type(error).__name__}: {reason}): give "
                "the folder of a pipeline with text_encoder and tokenizer"
            ) from error
        self.model.eval().requires_grad_(False)
        self.dim = int(self.model.config.hidden_size)
        digest = hashlib.sha256(b"ClipText")
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        self.fingerprint = digest.hexdigest()[:16]

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> TextStates:
        """Return the states of captions."""
        tokens, pooled = [], []
        for start in range(0, len(captions), BATCH):
            words = self.tokenizer(
                list(captions[start : start + BATCH]),
                padding="max_length",
                truncation=True,
                max_length=self.tokenizer.model_max_length,
                return_tensors="pt",
            )
            found = self.model(words["input_ids"])
            tokens.append(found.last_hidden_state)
            pooled.append(found.pooler_output)
        return TextStates(
            torch.cat(tokens), torch.nn.functional.normalize(torch.cat(pooled), dim=-1)
        )

    def embed(self, captions: Sequence[str]) -> Tensor:
        """Return the pooled states (N, D) of captions, of length 1."""
        return self.encode(captions).pooled
