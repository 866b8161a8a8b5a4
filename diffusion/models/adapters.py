"""Low-rank adapters in training: put into a transformer by PEFT, taken out in canonical form."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from core_gates.errors import GatesError
from diffusion.lora_file import Factors, LoraBundle

NAME = "trained"
DOWN, UP = f".lora_A.{NAME}.weight", f".lora_B.{NAME}.weight"
PARTS: Mapping[str, tuple[str, ...]] = {
    "attention": ("attn.",),
    "mlp": ("ff.", "ff_context.", "proj_mlp", "proj_out"),
    "modulation": ("norm.linear", "norm1.linear", "norm1_context.linear"),
}
"""Parts of a block -> what the names of their layers begin with, within the block."""


def layers_of(transformer: nn.Module, parts: Collection[str]) -> list[str]:
    """Return the linear layers in the blocks of a transformer that belong to some parts.

    Args:
        transformer: Of FLUX or SD3, by diffusers.
        parts: Of ``attention``, ``mlp`` and ``modulation``.

    Raises:
        GatesError: There is no such part.
    """
    if unknown := sorted(set(parts) - PARTS.keys()):
        raise GatesError(f"no part of a block is named {unknown[0]!r}: {', '.join(PARTS)}")
    begins = tuple(begin for part in parts for begin in PARTS[part])
    return [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
        and "transformer_blocks." in name
        and name.partition("transformer_blocks.")[2].partition(".")[2].startswith(begins)
    ]


@contextmanager
def trainable_factors(
    transformer: nn.Module, layers: Sequence[str], rank: int
) -> Iterator[dict[str, nn.Parameter]]:
    """Put a new adapter into a transformer, whose own weights are frozen meanwhile.

    Args:
        transformer: A model of diffusers.
        layers: Names of linear layers.
        rank: Of the adapter; its scale is 1.

    Yields:
        Its factors by name.
    """
    from peft import LoraConfig

    transformer.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers))
    transformer.add_adapter(config, adapter_name=NAME)  # type: ignore[operator]
    try:
        factors = {n: p for n, p in transformer.named_parameters() if n.endswith((DOWN, UP))}
        for factor in factors.values():
            factor.data = factor.data.float()  # also in a base of bfloat16
        yield factors
    finally:
        transformer.unload_lora()  # type: ignore[operator]


def bundle_of(
    factors: Mapping[str, torch.Tensor],
    family: str,
    metadata: Mapping[str, str],
    dtype: torch.dtype = torch.bfloat16,
) -> LoraBundle:
    """Return the adapter in canonical form.

    Args:
        factors: As :func:`trainable_factors` yields them.
        family: ``flux`` or ``sd3``.
        metadata: Of its file.
        dtype: In which it will be stored.
    """
    modules = {}
    for name, down in factors.items():
        if name.endswith(DOWN):
            layer = name.removesuffix(DOWN)
            up = factors[f"{layer}{UP}"]
            rounded = [t.detach().cpu().to(dtype).float() for t in (down, up)]
            modules[layer] = Factors(rounded[0], rounded[1])
    return LoraBundle(family, modules, metadata=dict(metadata), storage=dtype)
