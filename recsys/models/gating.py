"""Gates over experts that are small networks, or read an input each.

B rows, D inputs, S gates, E experts, F features of an expert, N visible pairs of gate and expert.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import core_gates.gates as gates_of_the_core
from core_gates.activations import check_activation
from core_gates.errors import check_at_least, check_option
from core_gates.gates.mixture import MaskedMixture, MultiGate
from core_gates.routing.base import Gate
from core_gates.training.sync_batch_norm import SyncBatchNorm
from recsys.models.experts import Experts


class GateNetworks(nn.Module):
    """Mix one set of experts by softmax gates with hidden layers, or with an input each.

    Without hidden layers, norm and own inputs it is
    :class:`~core_gates.gates.mixture.MaskedMixture`.

    Args:
        dim: Features of the gates' input.
        mask: True where a gate sees an expert (S, E).
        hidden_dims: Features of hidden layers, those of each gate its own.
        norm: ``batch``: normalize every layer over the batch, the logits included; None for none.
        activation: Of hidden layers.
        own_inputs: Whether the input is (B, S, D), one row per gate, rather than (B, D).
        taught: True where the gradient of a gate's mixture reaches an expert (S, E); everywhere if
            None.
        device: Device of parameters and statistics.
        dtype: Floating dtype of parameters and statistics.

    Shape:
        ``x`` (B, D) or (B, S, D), experts (B, E, F); result (B, S, F).

    Raises:
        ValueError: A size is below 1, the mask is not a boolean table, or a gate sees no expert.
    """

    places: Tensor
    taught: Tensor | None

    def __init__(
        self,
        dim: int,
        mask: Tensor,
        *,
        hidden_dims: Sequence[int] = (),
        norm: str | None = None,
        activation: str = "relu",
        own_inputs: bool = False,
        taught: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, dim=dim)
        check_option("norm", norm or "none", ("batch", "none"))
        check_activation(activation)
        if mask.dtype != torch.bool or mask.ndim != 2 or not mask.any(-1).all():
            raise ValueError(
                "the mask must be a boolean table (gates, experts) with a True in every row, got "
                f"{mask.dtype} {tuple(mask.shape)}"
            )
        self.mask, self.own_inputs = mask.cpu(), own_inputs
        self.widths = mask.sum(-1).tolist()
        options = {"norm": norm, "activation": activation, "device": device, "dtype": dtype}
        self.hidden = (
            Experts([1] * len(mask), dim, hidden_dims, **options)  # type: ignore[arg-type]
            if hidden_dims
            else None
        )
        width, inputs = sum(self.widths), hidden_dims[-1] if hidden_dims else dim
        self.weight = nn.Parameter(torch.empty(width, inputs, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.norm = SyncBatchNorm(width, device=device, dtype=dtype) if norm else None
        places = torch.empty(width, device=device, dtype=torch.int64)
        self.register_buffer("places", places, persistent=False)
        self._taught = None if taught is None else taught.cpu()
        table = None if taught is None else torch.empty_like(taught, device=device)
        self.register_buffer("taught", table, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, 0.02²), so that the gates start near uniform; zero the bias."""
        if self.hidden is not None:
            self.hidden.reset_parameters()
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)
        if self.norm is not None:
            self.norm.reset_parameters()  # type: ignore[no-untyped-call]
        self.places.copy_(self.mask.flatten().nonzero().flatten())
        if self.taught is not None and self._taught is not None:
            self.taught.copy_(self._taught)

    def weights(self, x: Tensor) -> Tensor:
        """Return the weights (B, S, E), exactly zero where a gate does not see an expert."""
        h = x if self.hidden is None else self.hidden(x)
        packed = self._packed(h)
        packed = packed if self.norm is None else self.norm(packed)
        if len(self.places) == self.mask.numel():
            return packed.view(x.shape[0], *self.mask.shape).softmax(-1)
        logits = packed.new_full((x.shape[0], self.mask.numel()), -torch.inf)
        return logits.index_copy(1, self.places, packed).view(-1, *self.mask.shape).softmax(-1)

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        """Return the mixtures (B, S, F) of the outputs of the experts (B, E, F)."""
        weights = self.weights(x)
        if self.taught is None:
            return weights @ experts
        taught = weights.masked_fill(~self.taught, 0) @ experts
        return taught + weights.masked_fill(self.taught, 0) @ experts.detach()

    def extra_repr(self) -> str:
        """Show the sizes in ``print(gates)``."""
        gates, experts = self.mask.shape
        return f"gates={gates}, experts={experts}, own_inputs={self.own_inputs}"

    def _packed(self, h: Tensor) -> Tensor:
        """Return the logits (B, N) of the visible pairs."""
        if h.ndim == 2:
            return h @ self.weight.mT + self.bias
        if len(set(self.widths)) == 1:
            weight = self.weight.view(len(self.widths), self.widths[0], -1)
            return torch.einsum("bsd,skd->bsk", h, weight).flatten(1) + self.bias
        parts = zip(h.unbind(1), self.weight.split(self.widths), strict=True)
        return torch.cat([x @ weight.mT for x, weight in parts], -1) + self.bias


def mixture(
    dim: int,
    mask: Tensor,
    *,
    hidden_dims: Sequence[int] = (),
    norm: str | None = None,
    own_inputs: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> MaskedMixture | GateNetworks:
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
    if hidden_dims or norm or own_inputs:
        return GateNetworks(
            dim,
            mask,
            hidden_dims=hidden_dims,
            norm=norm,
            own_inputs=own_inputs,
            device=device,
            dtype=dtype,
        )
    return MaskedMixture(dim, mask, device=device, dtype=dtype)


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
