"""Our files in the loader of diffusers."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
from diffusers.utils import logging
from torch import Tensor, nn

from diffusion.evaluation.parity.worst import Check, worst
from diffusion.lora_file import Factors, LoraBundle, save_lora

SCALES = (1.0, 0.5, 1 / 3, 2.0)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of a model by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def small_flux() -> Any:
    """Return a FLUX.1 of width 32 with every kind of layer."""
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=20,
        guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def small_sd3() -> Any:
    """Return an SD3 of width 32 with every kind of layer."""
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, num_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=32,
        pooled_projection_dim=20, out_channels=16, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip


def drawn(family: str, model: nn.Module, names: Sequence[str], *, dora: bool = False) -> LoraBundle:
    """Return a random adapter of some layers, of mixed ranks and scales."""
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for number, name in enumerate(names):
        outputs, inputs = linears(model)[name].weight.shape
        rank, scale = 1 + number % 4, SCALES[number // 3 % 4]
        magnitude = torch.rand(outputs, 1, generator=generator) + 1 if dora else None
        down = torch.randn(rank, inputs, generator=generator) / 4
        up = torch.randn(outputs, rank, generator=generator) / 4
        modules[name] = Factors(down, up, scale, magnitude)
    return LoraBundle(family, modules)


def pipeline_around(model: nn.Module, family: str) -> Any:
    """Return a pipeline that has nothing but a transformer."""
    parts: dict[str, Any] = dict.fromkeys(
        ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    )
    kind: Any = diffusers.FluxPipeline
    if family == "sd3":
        kind = diffusers.StableDiffusion3Pipeline
        parts |= {"text_encoder_3": None, "tokenizer_3": None}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return kind(transformer=model, scheduler=scheduler, **parts)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence what diffusers and PEFT warn of, such as a file without parts of text encoders."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def merged_by_diffusers(model: nn.Module, family: str, path: Path) -> dict[str, Tensor]:
    """Return the weights of a copy of the model with a file merged by diffusers."""
    model = copy.deepcopy(model)
    pipe = pipeline_around(model, family)
    with quiet_libraries():
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, use_safetensors=True)
        pipe.fuse_lora(components=["transformer"])
    return {
        name.removesuffix(".base_layer"): layer.weight
        for name, layer in linears(model).items()
        if ".lora_" not in name
    }


def weight_errors(
    weights: dict[str, Tensor], model: nn.Module, bundle: LoraBundle
) -> Iterator[tuple[str, float]]:
    """Yield the relative error, by its norm, of each change of a weight."""
    for name, layer in linears(model).items():
        change = (weights[name] - layer.weight).detach()
        if name not in bundle.modules:
            yield name, math.inf if change.any() else 0.0
            continue
        expected = bundle.delta_weight(name, layer.weight.detach())
        error = torch.linalg.matrix_norm(change - expected)
        yield name, float(error / torch.linalg.matrix_norm(expected))


def exports() -> Iterator[tuple[str, float]]:
    """Yield the errors of files of FLUX.1, some layers of it, DoRA, and SD3, by layer."""
    flux, sd3 = small_flux(), small_sd3()
    cases: list[tuple[str, Any, str, bool, str]] = [
        ("flux", flux, "", False, "diffusers"),
        ("flux", flux, "blocks.", False, "diffusers"),
        ("flux", flux, "attn.to_q", False, "diffusers"),
        ("flux", flux, "blocks.", True, "diffusers"),
        ("sd3", sd3, "", False, "diffusers"),
        ("flux", flux, "transformer_blocks.", False, "kohya"),
    ]
    with TemporaryDirectory() as folder:
        for number, (family, model, chosen, dora, format) in enumerate(cases):
            names = [n for n in linears(model) if chosen in n]
            if format == "kohya":  # of which diffusers reads single blocks at one width only
                names = [n for n in names if n.startswith(chosen)]
            bundle = drawn(family, model, names, dora=dora)
            path = save_lora(bundle, Path(folder) / f"{number}.safetensors", format)
            weights = merged_by_diffusers(model, family, path)
            for name, error in weight_errors(weights, model, bundle):
                yield f"{family} {chosen or 'all'} {format} {number}: {name}", error


def check_exports(folder: str | Path) -> dict[str, Check]:
    """Compare the weights that diffusers makes of our files."""
    del folder
    return {"diffusers' own loader on our export": worst(exports())}
