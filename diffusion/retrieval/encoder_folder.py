"""Folders of trained encoders, the files of AutoLoRA and DiffSynth-Studio, and their use."""

import dataclasses
import hashlib
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from diffusion.lora_file import (
    ContainerError,
    FluxShape,
    LoraBundle,
    LoraFileError,
    SafetensorsFile,
)
from diffusion.lora_file.container import clean, label, listed, parse_json
from diffusion.retrieval.encoder import LoraWeightEncoder, collate
from diffusion.retrieval.encoder_config import EncoderConfig, family_of, refusal_of
from harness.files.atomic import replacing, write_json


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


WEIGHTS, SETTINGS = "encoder.safetensors", "config.json"
FORMAT = 1
LARGEST_SETTINGS = 2**20  # bytes of `config.json`


def save_encoder(
    folder: str | Path,
    encoder: LoraWeightEncoder,
    *,
    text_fingerprint: str = "",
    dtype: torch.dtype | None = None,
    notes: dict[str, Any] | None = None,
) -> Path:
    """Write an encoder, whole or not at all.

    Args:
        folder: Is replaced if it exists.
        encoder: With its trained weights.
        text_fingerprint: Of the text encoder that it was trained with.
        dtype: Of the stored weights, such as bfloat16; as they are if None.
        notes: Plain values that are kept with the settings, such as what it was trained on.
    """
    folder = Path(folder)
    weights = {
        name: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        for name, tensor in encoder.state_dict().items()
    }
    settings = {
        "format": FORMAT,
        "text_encoder": text_fingerprint,
        "encoder": encoder.config.state(),
        "notes": notes or {},
    }
    with replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        save_file(weights, temporary / WEIGHTS)
        write_json(temporary / SETTINGS, settings)
    return folder


def load_encoder(folder: str | Path, *, text_fingerprint: str | None = None) -> TrainedEncoder:
    """Read an encoder; its weights become float32.

    Args:
        folder: See `save_encoder`.
        text_fingerprint: Of the text encoder that prompts are embedded with; None for no check.

    Raises:
        LoraFileError: A file is missing, damaged, does not fit, or belongs to another text encoder.
    """
    folder = Path(folder)
    settings = _settings(folder / SETTINGS)
    config = EncoderConfig.from_state(settings.get("encoder"))
    text = str(settings.get("text_encoder") or "")
    if text_fingerprint is not None and text != text_fingerprint:
        raise LoraFileError(
            f"{label(folder)} was trained with the text encoder {clean(text, 40) or 'unknown'}, "
            f"found {text_fingerprint}: use that one, or train the retriever again"
        )
    return TrainedEncoder(_filled(config, SafetensorsFile(folder / WEIGHTS)), text)


def load_published(path: str | Path, *, head_dim: int | None = None) -> TrainedEncoder:
    """Read an encoder file of AutoLoRA or DiffSynth-Studio; sizes follow from its tensors.

    Args:
        path: A ``.safetensors`` file.
        head_dim: Features of an attention head, which no tensor tells; 64 for AutoLoRA and 128 for
            DiffSynth-Studio if None.

    Raises:
        LoraFileError: It is not such a file, or is damaged.
    """
    file = SafetensorsFile(Path(path))
    marks = [name for name in file.tensors if "embedder.model_dict." in name]
    prefix = marks[0].partition("embedder.model_dict.")[0] if marks else ""
    shapes = {
        name.removeprefix(prefix): tuple(entry.shape)
        for name, entry in file.tensors.items()
        if name.startswith(prefix)
    }
    try:
        config = _published_config(shapes, head_dim)
    except (KeyError, IndexError, ValueError, LoraFileError) as error:
        raise LoraFileError(
            f"{file.label} is not an encoder of AutoLoRA or DiffSynth-Studio: "
            f"{clean(str(error), 120)} is missing or has another size"
        ) from error
    return TrainedEncoder(_filled(config, file, prefix))


def _published_config(shapes: dict[str, tuple[int, ...]], head_dim: int | None) -> EncoderConfig:
    """Return the configuration that fits the tensors of a published file.

    Raises:
        KeyError: A tensor is missing.
        ValueError: A size makes no sense.
    """
    counts = [
        len({m[1] for name in shapes if (m := re.match(pattern, name))})
        for pattern in (
            r"embedder\.model_dict\.blocks___(\d+)___",
            r"embedder\.model_dict\.single_blocks___(\d+)___",
            r"encoders\.(\d+)\.",
        )
    ]
    _, probes, width = shapes["embedder.model_dict.blocks___0___attn___a_to_qkv.x"]
    hidden, dim = shapes["encoders.0.fc1.weight"]
    inner = shapes["encoders.0.attn.to_q.weight"][0]
    token = "special_embeds" in shapes
    shape = FluxShape(counts[0], counts[1], num_heads=1, head_dim=width)
    if (width, *counts[:2]) == (3072, 19, 38):
        shape = FluxShape()
    head_dim = head_dim or (128 if token else 64)
    base = EncoderConfig.prompt_token(shape) if token else EncoderConfig.published(shape)
    if inner % head_dim:
        raise ValueError(f"head_dim {head_dim}")
    return dataclasses.replace(
        base, dim=dim, hidden_dim=hidden, depth=counts[2], probes=probes,
        heads=inner // head_dim, head_dim=head_dim,
        text_dim=shapes["final_linear.weight"][0] if token else None,
    )  # fmt: skip


def _filled(config: EncoderConfig, file: SafetensorsFile, prefix: str = "") -> LoraWeightEncoder:
    """Return an encoder with the weights of a file, in float32.

    Raises:
        LoraFileError: A weight is missing, unknown, of another size, or not finite.
    """
    with torch.device("meta"):
        encoder = LoraWeightEncoder(config)
    expected = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    stored = {
        name.removeprefix(prefix): tuple(entry.shape)
        for name, entry in file.tensors.items()
        if name.startswith(prefix)
    }
    wrong = [
        f"{name} is {_sizes(stored[name])}, expected {_sizes(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name] != shape
    ]
    wrong += [f"{name} is missing" for name in expected if name not in stored]
    wrong += [f"{name} is unknown" for name in stored if name not in expected]
    if wrong:
        raise LoraFileError(f"{file.label} does not fit its settings: {listed(wrong, 2)}")
    weights: dict[str, Tensor] = {}
    for name in expected:
        weights[name] = file.tensor(prefix + name).float()
        if not torch.isfinite(weights[name]).all():
            raise LoraFileError(f"{file.label}: {name} is not finite; get the file again")
    encoder.load_state_dict(weights, strict=True, assign=True)
    return encoder


def _settings(path: Path) -> dict[str, Any]:
    """Return the settings of a folder.

    Raises:
        LoraFileError: They are missing or damaged, or of a later version.
    """
    try:
        if path.stat().st_size > LARGEST_SETTINGS:
            raise ContainerError(f"{label(path)} is too large to be the settings of an encoder")
        settings = parse_json(path.read_bytes(), label(path))
    except OSError as error:
        raise LoraFileError(
            f"{label(path)} cannot be read: {error.strerror}; give a folder that an encoder was "
            "saved in"
        ) from error
    if settings.get("format") != FORMAT:
        raise LoraFileError(
            f"{label(path)} is not of format {FORMAT} of encoders: use the version that wrote it"
        )
    return settings


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"
