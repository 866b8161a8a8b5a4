"""How alike adapters are, without any training."""

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion.lora_file.family import Placed
from diffusion.retrieval.batch import AdapterBatch


def delta_cosine(adapters: AdapterBatch, others: AdapterBatch) -> Tensor:
    """Return the cosines of the changes ΔW of all layers, without forming them.

    Args:
        adapters: n adapters.
        others: m adapters, of the same base.

    Returns:
        (n, m); 0 for an adapter that changes nothing.
    """
    inner = _inner(adapters, others)
    norms = [_inner(batch, batch).diagonal().sqrt() for batch in (adapters, others)]
    tiny = torch.finfo(inner.dtype).tiny
    return inner / (norms[0][:, None] * norms[1]).clamp_min(tiny)


def _inner(adapters: AdapterBatch, others: AdapterBatch) -> Tensor:
    """Return the sums of ⟨ΔW, ΔW'⟩ = ⟨BᵀB', AA'ᵀ⟩ over layers (n, m)."""
    like = next(iter(adapters.down.values()))
    total = like.new_zeros(len(adapters.present), len(others.present), dtype=torch.float64)
    for name in adapters.down.keys() & others.down.keys():
        a, b = adapters.down[name].double(), adapters.up[name].double()
        c, d = others.down[name].double(), others.up[name].double()
        up = torch.einsum("nor,mos->nmrs", b, d)
        total += (up * torch.einsum("nri,msi->nmrs", a, c)).sum((2, 3))
    return total


def sketches(
    adapters: AdapterBatch, modules: tuple[Placed, ...], *, probes: int = 1, seed: int = 0
) -> Tensor:
    """Return what adapters answer to random probes, an encoder that nothing was trained for.

    The cosine of two sketches estimates that of their ΔW.

    Args:
        adapters: n adapters.
        modules: Fused layers that are probed.
        probes: Probes per layer.
        seed: Of the probes.

    Returns:
        (n, L · Σ out_features), of unit length.
    """
    generator = torch.Generator().manual_seed(seed)
    answers = []
    for module in modules:
        probe = torch.randn(probes, module.in_features, generator=generator)
        for part, size in zip(module.parts, module.sizes, strict=True):
            if part in adapters.down:
                inner = adapters.down[part] @ probe.to(adapters.down[part]).mT
                answers.append((adapters.up[part] @ inner).flatten(1))
            else:
                answers.append(probe.new_zeros(len(adapters.present), size * probes))
    return F.normalize(torch.cat([answer.double() for answer in answers], 1), dim=1)
