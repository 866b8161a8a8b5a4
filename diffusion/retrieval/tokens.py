"""One token per layer of the base and probe: what the adapter answers to a learned probe.

With a probe q the token of a layer is v = P u + c of u = (q Aᵀ) Bᵀ · scale, which is q ΔWᵀ without
ΔW (arXiv 2508.02107). It depends on the product BA alone, so neither on the choice of the factors
nor on a rank padded with zeros.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion.lora_file.family import Placed
from diffusion.retrieval.batch import AdapterBatch
from diffusion.retrieval.config import Normalization

DOT = "___"
"""Stands for a dot in the name of a layer or a type."""


def escaped(name: str) -> str:
    """Return a name as published files write it."""
    return name.replace(".", DOT)


class Probe(nn.Module):
    """The probes of one layer.

    Args:
        probes: Their number L.
        in_features: Inputs of the layer.
        out_features: Outputs, which the LayerNorm is over.
        layer_norm: Whether there is one.
    """

    def __init__(
        self, probes: int, in_features: int, out_features: int, *, layer_norm: bool
    ) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.randn(1, probes, in_features))
        if layer_norm:
            self.layer_norm = nn.LayerNorm(out_features)


class ModuleTokens(nn.Module):
    """Tokens of adapters; published files name its parameters in the same way.

    Args:
        modules: M fused layers of the base, in order.
        dim: Features e of a token.
        probes: Probes L per layer.
        normalization: See :class:`diffusion.retrieval.config.EncoderConfig`.

    Shape:
        Result (n, M · L, e): the probes of a layer are neighbours.
    """

    def __init__(
        self, modules: Sequence[Placed], dim: int, probes: int, normalization: Normalization
    ) -> None:
        super().__init__()
        self.modules_read, self.probes, self.dim = tuple(modules), probes, dim
        self.normalization = normalization
        layer_norm = normalization == "layer"
        self.model_dict = nn.ModuleDict(
            {
                escaped(m.name): Probe(probes, m.in_features, m.out_features, layer_norm=layer_norm)
                for m in modules
            }
        )
        outputs = {module.type: module.out_features for module in modules}
        self.proj_dict = nn.ModuleDict(
            {escaped(kind): nn.Linear(size, dim) for kind, size in outputs.items()}
        )

    def forward(self, batch: AdapterBatch) -> Tensor:
        """Return the tokens; those of layers that are not changed have no meaning."""
        responses = [self.response(module, batch) for module in self.modules_read]
        if self.normalization == "file":
            responses = _by_file(responses, batch.present)
        tokens = []
        for module, u in zip(self.modules_read, responses, strict=True):
            projection = self.proj_dict[escaped(module.type)]
            tokens.append(projection(self._normalized(module, u)))
        return torch.cat(tokens, 1)

    def response(self, module: Placed, batch: AdapterBatch) -> Tensor:
        """Return u (n, L, out_features) of a layer, zero where it is not changed."""
        probe = cast(Probe, self.model_dict[escaped(module.name)]).x[0]
        zero = 0 * probe.sum()  # DDP wants every parameter to take part
        parts = []
        for part, size in zip(module.parts, module.sizes, strict=True):
            if part in batch.down:
                inner = torch.matmul(batch.down[part], probe.mT)  # (n, r, L)
                parts.append(torch.matmul(batch.up[part], inner).mT)
            else:
                parts.append(zero.expand(len(batch.present), self.probes, size))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _normalized(self, module: Placed, u: Tensor) -> Tensor:
        if self.normalization == "layer":
            norm: Tensor = cast(Probe, self.model_dict[escaped(module.name)]).layer_norm(u)
            return norm
        if self.normalization == "token":
            return F.normalize(u, dim=-1, eps=torch.finfo(u.dtype).tiny) * u.shape[-1] ** 0.5
        return u


def _by_file(responses: list[Tensor], present: Tensor) -> list[Tensor]:
    """Return responses whose mean square over the changed layers of an adapter is 1."""
    squares = torch.stack([u.square().mean((1, 2)) for u in responses], 1)
    mean = squares.sum(1) / present.sum(1).clamp_min(1)
    scale = mean.clamp_min(torch.finfo(mean.dtype).tiny).rsqrt()[:, None, None]
    return [u * scale for u in responses]
