"""Experts with batch normalization, all on the same rows, as multi-task networks have them."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from core_gates.activations import activate, check_activation
from core_gates.collectives import Group
from core_gates.training.sync_batch_norm import SyncBatchNorm


class NormedExperts(nn.Module):
    """E networks of layers ``act(BN(W x + b))`` side by side, the last layer included.

    Without the normalization experts differ widely in scale, or have units that are zero nearly
    everywhere, and no gate can weigh them fairly (HoME, arXiv 2408.05430, section 3.1). The mean
    and variance are those of the batch, over all ranks; every expert has its own.

    Args:
        num_experts: Number of experts E.
        dim: Features D of the input.
        hidden_dims: Features of the layers, the last of which are those of the output F.
        activation: ``silu`` (Swish), ``gelu``, ``gelu_tanh``, ``relu`` or ``identity``.
        eps: Added to the variance.
        momentum: Weight of a new batch in the running statistics.
        group: Ranks that share statistics; all ranks if None.
        device: Device of parameters and statistics.
        dtype: Floating dtype of parameters and statistics.

    Shape:
        ``x`` (N, D), which all experts see, or (N, E, D); to (N, E, F).

    Raises:
        ValueError: A size is below 1, or the activation is unknown.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dims: Sequence[int],
        *,
        activation: str = "silu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        group: Group = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = (num_experts, dim, *hidden_dims)
        if min(sizes) < 1 or not hidden_dims:
            raise ValueError(f"num_experts, dim and hidden_dims must be at least 1, got {sizes}")
        check_activation(activation)
        self.num_experts, self.dim, self.activation = num_experts, dim, activation
        self.hidden_dims = tuple(hidden_dims)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        pairs = list(zip((dim, *hidden_dims[:-1]), hidden_dims, strict=True))
        self.weights = nn.ParameterList(parameter(outputs, inputs) for inputs, outputs in pairs)
        self.biases = nn.ParameterList(parameter(outputs) for _, outputs in pairs)
        options = {"num_experts": num_experts, "group": group, "device": device, "dtype": dtype}
        self.norms = nn.ModuleList(
            SyncBatchNorm(outputs, eps, momentum, **options)  # type: ignore[arg-type]
            for _, outputs in pairs
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and biases as ``nn.Linear`` does; the affine map starts as the identity."""
        for weight, bias, norm in zip(self.weights, self.biases, self.norms, strict=True):
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)
            cast(SyncBatchNorm, norm).reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of all experts (N, E, F).

        Raises:
            ValueError: The shape of ``x`` does not fit, or a single row is to be normalized by
                itself.
        """
        if x.shape[1:] not in ((self.dim,), (self.num_experts, self.dim)):
            raise ValueError(
                f"x {tuple(x.shape)} must be (N, {self.dim}) or (N, {self.num_experts}, {self.dim})"
            )
        for weight, bias, norm in zip(self.weights, self.biases, self.norms, strict=True):
            if x.ndim == 2:  # one matmul for all experts
                x = x @ weight.flatten(0, 1).mT
                x = x.view(-1, self.num_experts, weight.shape[1])
            else:
                x = torch.einsum("nei,eoi->neo", x, weight)
            x = activate(norm(x + bias), self.activation, gated=False)
        return x

    def extra_repr(self) -> str:
        """Show the sizes in ``print(experts)``."""
        return (
            f"num_experts={self.num_experts}, dim={self.dim}, hidden_dims={self.hidden_dims},"
            f" activation={self.activation}"
        )
