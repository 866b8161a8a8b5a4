"""The gate of PEPNet."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.errors import check_at_least


class PriorGate(nn.Module):
    """Rescale features by a factor in (0, 2) that depends on a prior (PEPNet, KDD 2023).

    ``y = x * 2σ(ReLU([prior, x] W_1 + b_1) W_2 + b_2)``, where no gradient goes through the ``x``
    inside the gate. The prior says for whom or where the network works: embeddings of the user, the
    item or the domain. With W_2 = 0 and b_2 = 0, the start, the factor is exactly one.

    Args:
        dim: Number of features D that are rescaled.
        prior_dim: Features P of the prior.
        hidden_dim: Features of the hidden layer; D if None.
        input_dim: Features I that the gate reads besides the prior; D if None.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``x`` (..., D) and ``prior`` (..., P) to (..., D). Where the gate reads something else than
        what it rescales, ``seen`` (..., I).

    Raises:
        ValueError: A size is below 1.
    """

    def __init__(
        self,
        dim: int,
        prior_dim: int,
        hidden_dim: int | None = None,
        *,
        input_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, dim=dim, prior_dim=prior_dim, hidden_dim=hidden_dim, input_dim=input_dim)
        self.dim, self.prior_dim = dim, prior_dim
        self.input_dim = dim if input_dim is None else input_dim
        hidden_dim = dim if hidden_dim is None else hidden_dim

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.hidden_weight = parameter(hidden_dim, prior_dim + self.input_dim)
        self.hidden_bias = parameter(hidden_dim)
        self.weight = parameter(dim, hidden_dim)
        self.bias = parameter(dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with a factor of one; draw the hidden layer as ``nn.Linear`` does."""
        bound = self.hidden_weight.shape[1] ** -0.5
        nn.init.uniform_(self.hidden_weight, -bound, bound)
        nn.init.uniform_(self.hidden_bias, -bound, bound)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def factors(self, x: Tensor, prior: Tensor, *, seen: Tensor | None = None) -> Tensor:
        """Return the factors (..., D) in (0, 2).

        Args:
            x: Features (..., D), also read by the gate where ``seen`` is None.
            prior: Prior (..., P).
            seen: What the gate reads in place of ``x`` (..., I).

        Raises:
            ValueError: A shape does not fit.
        """
        read = x if seen is None else seen
        named = {"x": x, "prior": prior, "seen": read}
        sizes = self.dim, self.prior_dim, self.input_dim
        for (name, tensor), size in zip(named.items(), sizes, strict=True):
            if tensor.shape[-1:] != (size,) or tensor.shape[:-1] != x.shape[:-1]:
                raise ValueError(
                    f"{name} {tuple(tensor.shape)} must be {(*x.shape[:-1], size)}, as x is"
                    f" {tuple(x.shape)}"
                )
        inputs = torch.cat([prior, read.detach()], -1)
        hidden = F.linear(inputs, self.hidden_weight, self.hidden_bias).relu()
        return 2 * F.linear(hidden, self.weight, self.bias).sigmoid()

    def forward(self, x: Tensor, prior: Tensor, *, seen: Tensor | None = None) -> Tensor:
        """Return ``x`` times its factors (..., D)."""
        return x * self.factors(x, prior, seen=seen)

    def gate_values(self, x: Tensor, prior: Tensor, *, seen: Tensor | None = None) -> Tensor:
        """Return half the factors (..., D), between 0 and 1."""
        return self.factors(x, prior, seen=seen) / 2

    def extra_repr(self) -> str:
        """Show the sizes in ``print(gate)``."""
        return f"dim={self.dim}, prior_dim={self.prior_dim}, input_dim={self.input_dim}"
