"""The softmax gate with hidden layers."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from core_gates.activations import activate, check_activation
from core_gates.collectives import Group
from core_gates.errors import check_at_least, check_option
from core_gates.numerics import autocast_off, check_padding_mask, linear_fp32
from core_gates.routing.base import Gate
from core_gates.routing.output import RoutingOutput
from core_gates.training.batch_norm import SyncBatchNorm


class MlpGate(Gate):
    """Mix all experts with the softmax of a small network, as implementations of MMoE do.

    torch-rechub normalizes every layer over the batch, the logits included (``norm="batch"``);
    TorchEasyRec has a plain hidden layer. With batch normalization the routing of a token in
    training depends on the others, and the running statistics move in the forward pass.

    Args:
        dim: Features of a token.
        num_experts: Number of experts.
        hidden_dims: Features of the hidden layers.
        norm: ``batch``: normalize hidden layers before their activation; None: do not.
        norm_logits: Whether the logits are normalized, too; by ``norm`` if None.
        activation: Of the hidden layers: ``relu``, ``silu``, ``gelu``, ``gelu_tanh`` or
            ``identity``.
        group: Ranks that share statistics; all ranks if None.
        device: Device of the parameters and buffers.
        dtype: Floating dtype of the parameters.

    Shape:
        ``x`` (..., D); weights, probs and logits (..., E).

    Raises:
        ValueError: A size is below 1, or norm or activation are unknown.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        hidden_dims: Sequence[int] = (64,),
        norm: str | None = None,
        norm_logits: bool | None = None,
        activation: str = "relu",
        group: Group = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_experts)
        check_at_least(1, **{f"hidden_dims[{j}]": size for j, size in enumerate(hidden_dims)})
        check_option("norm", norm or "none", ("batch", "none"))
        check_activation(activation)
        self.hidden_dims, self.activation = tuple(hidden_dims), activation

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        sizes = [*self.hidden_dims, num_experts]
        inputs = [dim, *self.hidden_dims]
        pairs = list(zip(inputs, sizes, strict=True))
        self.weights = nn.ParameterList(parameter(output, size) for size, output in pairs)
        self.biases = nn.ParameterList(parameter(size) for size in sizes)
        normed = [norm is not None] * len(self.hidden_dims)
        normed.append(norm is not None if norm_logits is None else norm_logits)
        options = {"group": group, "device": device, "dtype": dtype}
        self.norms = nn.ModuleList(
            SyncBatchNorm(size, **options) if wanted else nn.Identity()  # type: ignore[arg-type]
            for size, wanted in zip(sizes, normed, strict=True)
        )
        self.couples_tokens = any(normed)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw hidden layers as ``nn.Linear`` does and the last from N(0, 0.02²) without bias."""
        for weight, bias in zip(self.weights, self.biases, strict=True):
            bound = weight.shape[1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)
        nn.init.normal_(self.weights[-1], std=0.02)
        nn.init.zeros_(self.biases[-1])
        for norm in self.norms:
            if isinstance(norm, SyncBatchNorm):
                norm.reset_parameters()  # type: ignore[no-untyped-call]

    def forward(
        self,
        x: Tensor,
        *,
        ids: Tensor | None = None,  # noqa: ARG002
        padding_mask: Tensor | None = None,
    ) -> RoutingOutput:
        """Route every token of ``x``; see `Gate`. Padding is in no statistic."""
        layers = list(zip(self.weights, self.biases, self.norms, strict=True))
        for weight, bias, norm in layers[:-1]:
            hidden = linear_fp32(x, weight, bias, padding_mask=padding_mask)
            x = activate(_normed(hidden, norm, padding_mask), self.activation, gated=False)
        weight, bias, norm = layers[-1]
        logits = linear_fp32(x, weight, bias, padding_mask=padding_mask)
        logits = _normed(logits, norm, padding_mask)
        probs = logits.softmax(-1)
        return RoutingOutput(probs, logits=logits, probs=probs).ignore(padding_mask)

    def extra_repr(self) -> str:
        """Show the sizes in ``print(gate)``."""
        return f"{super().extra_repr()}, hidden_dims={self.hidden_dims}"


def _normed(x: Tensor, norm: nn.Module, padding_mask: Tensor | None) -> Tensor:
    if not isinstance(norm, SyncBatchNorm):
        return x
    with autocast_off(x):
        if padding_mask is None:
            return cast(Tensor, norm(x.reshape(-1, x.shape[-1]))).view(x.shape)
        check_padding_mask(padding_mask, x.shape[:-1])
        normed = norm(x[~padding_mask])
        return cast(Tensor, normed.new_zeros(x.shape).index_put((~padding_mask,), normed))
