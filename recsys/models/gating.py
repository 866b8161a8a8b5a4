"""Gates over the experts of a network: linear ones, small networks, or any routing gates.

B rows, D inputs, S gates, E experts, F features of an expert.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor

import core_gates.gates as gates_of_the_core
from core_gates.errors import check_at_least, check_option
from core_gates.gates.mixture import MaskedMixture, MultiGate
from core_gates.moe.normed_experts import NormedExperts
from core_gates.routing.base import Gate
from core_gates.training.sync_batch_norm import SyncBatchNorm


class GateNetworks(MaskedMixture):
    """Softmax gates with hidden layers or normalized logits, as implementations of MMoE have them.

    Args:
        dim: Features of the gates' input.
        mask: True where a gate sees an expert (S, E).
        hidden_dims: Features of hidden layers, those of each gate its own.
        norm: ``batch``: normalize every layer over the batch, the logits included; None for none.
        activation: Of hidden layers.
        own_inputs: Whether the input is (B, S, D), one row per gate, rather than (B, D). What has
            more rows ends in some that no gate reads.
        device: Device of parameters and statistics.
        dtype: Floating dtype of parameters and statistics.

    Shape:
        ``x`` (B, D) or (B, S, D), experts (B, E, F); result (B, S, F).

    Raises:
        ValueError: A size is below 1, a name is unknown, the mask is not a boolean table, or a gate
            sees no expert.
    """

    def __init__(
        self,
        dim: int,
        mask: Tensor,
        *,
        hidden_dims: Sequence[int] = (),
        norm: str | None = None,
        activation: str = "relu",
        own_inputs: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_at_least(1, dim=dim)
        check_option("norm", norm or "none", ("batch", "none"))
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            hidden_dims[-1] if hidden_dims else dim,
            mask,
            reads=range(len(mask)) if own_inputs or hidden_dims else None,
            **where,
        )
        self.hidden = (
            NormedExperts(len(mask), dim, hidden_dims, norm=norm, activation=activation, **where)
            if hidden_dims
            else None
        )
        self.norm = SyncBatchNorm(len(self.weight), **where) if norm else None

    def reset_parameters(self) -> None:
        """Reset the last layer as gates are, hidden ones as ``nn.Linear`` is."""
        super().reset_parameters()
        for part in (getattr(self, "hidden", None), getattr(self, "norm", None)):
            if part is not None:
                part.reset_parameters()

    @torch.no_grad()
    def fold(self) -> "GateNetworks":
        """Return a copy for inference whose normalization is folded into its weights."""
        folded = deepcopy(self).eval()
        if self.hidden is not None:
            folded.hidden = self.hidden.fold()
        if self.norm is not None:
            norm, bias = self.norm, cast(Tensor, self.bias)
            mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
            scale = norm.weight * (variance + norm.eps).rsqrt()
            folded.weight.copy_(scale.unsqueeze(1) * self.weight)
            cast(Tensor, folded.bias).copy_(norm.bias + scale * (bias - mean))
            folded.norm = None
        return folded

    def _packed(self, x: Tensor) -> Tensor:
        if self.hidden is not None:
            x = self.hidden(x if x.ndim == 2 else x[:, : len(self._tables[0])])
        packed = super()._packed(x)
        return packed if self.norm is None else cast(Tensor, self.norm(packed))


def mixture(
    dim: int,
    mask: Tensor,
    *,
    hidden_dims: Sequence[int] = (),
    norm: str | None = None,
    own_inputs: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> MaskedMixture:
    """Return softmax gates over the experts that they see: linear ones, or small networks.

    Args:
        dim: Features of the gates' input.
        mask: True where a gate sees an expert (S, E).
        hidden_dims: Features of hidden layers.
        norm: ``batch``: normalize every layer of a gate, its logits included; None for none.
        own_inputs: Whether every gate reads its own input.
        device: Device of parameters and statistics.
        dtype: Floating dtype of parameters and statistics.
    """
    where: dict[str, Any] = {"device": device, "dtype": dtype}
    if hidden_dims or norm:
        options: dict[str, Any] = {"hidden_dims": hidden_dims, "norm": norm, **where}
        return GateNetworks(dim, mask, own_inputs=own_inputs, **options)
    return MaskedMixture(dim, mask, reads=range(len(mask)) if own_inputs else None, **where)


def routed_mixture(
    name: str,
    options: Mapping[str, Any],
    dim: int,
    mask: Tensor,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> MultiGate:
    """Return routing gates of ``core_gates.gates``, one for each row of the mask.

    Args:
        name: Class, such as ``DSelectKGate``.
        options: Options of the class.
        dim: Features of the gates' input.
        mask: True where a gate sees an expert (S, E).
        device: Device of parameters and buffers.
        dtype: Floating dtype of the parameters.

    Raises:
        ValueError: There is no such gate, or it has no such option.
    """
    found = {name: getattr(gates_of_the_core, name) for name in dir(gates_of_the_core)}
    kinds: dict[str, Any] = {
        name: kind
        for name, kind in found.items()
        if isinstance(kind, type) and issubclass(kind, Gate)
    }
    check_option("gate", name, ["softmax", *kinds])
    try:
        gates = [
            kinds[name](dim, int(row.sum()), **options, device=device, dtype=dtype) for row in mask
        ]
    except TypeError as error:
        raise ValueError(f"gate_options of {name}: {error}") from error
    if any(gate.couples_tokens for gate in gates):
        raise ValueError(
            f"gate {name} with these options routes a row by the others of its batch, but a score "
            "must not depend on them; choose another gate"
        )
    return MultiGate(gates, mask)
