"""Gates of features: by what is known beforehand (PEPNet), between tasks (AITM), of a group."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.errors import check_at_least
from core_gates.numerics import linear_fp32


class SelfGate(nn.Module):
    """Weigh the experts of a group for the residual path of that group (arXiv 2408.05430).

    The weights are the softmax of ``x W + b``, or its sigmoid if there is exactly one expert, so
    that a lone expert can still be closed.

    Args:
        dim: Features of the gate's input.
        num_experts: Experts E of the group.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters; the weights are computed in float32.

    Shape:
        ``x`` (..., dim) and experts (..., E, D) to (..., D).

    Raises:
        ValueError: A size is below 1.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, dim=dim, num_experts=num_experts)
        self.dim, self.num_experts = dim, num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, 0.02²) and zero the bias."""
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def weights(self, x: Tensor) -> Tensor:
        """Return the weights (..., E) in float32 at least."""
        logits = linear_fp32(x, self.weight, self.bias)
        return logits.sigmoid() if self.num_experts == 1 else logits.softmax(-1)

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        """Return the weighted sum (..., D) of the outputs of the experts (..., E, D).

        Raises:
            ValueError: ``x`` or ``experts`` has another shape.
        """
        weights = self.weights(x)
        if experts.shape[:-1] != weights.shape:
            raise ValueError(
                f"experts {tuple(experts.shape)} must be {tuple(weights.shape)} and their features"
            )
        return torch.einsum("...e,...ed->...d", weights.to(experts.dtype), experts)

    def gate_values(self, x: Tensor, experts: Tensor) -> Tensor:  # noqa: ARG002
        """Return the weights (..., E)."""
        return self.weights(x)

    def extra_repr(self) -> str:
        """Show the sizes in ``print(gate)``."""
        return f"dim={self.dim}, num_experts={self.num_experts}"


class TransferGate(nn.Module):
    """Weigh what a task knows against what the task before it passes on (AITM, KDD 2021).

    ``z = Σ_x∈{p, q} softmax_x(⟨h_1 x, h_2 x⟩ / √k) h_3 x`` with linear maps h of width k, for the
    transferred information p and the task's own representation q.

    Args:
        dim: Features D of both.
        hidden_dim: Width k of the maps; D if None.
        bias: Whether the maps have biases.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``p`` and ``q`` (..., D) to (..., k).

    Raises:
        ValueError: A size is below 1.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int | None = None,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, dim=dim, hidden_dim=hidden_dim)
        self.dim, self.hidden_dim = dim, dim if hidden_dim is None else hidden_dim
        empty = torch.empty(3, self.hidden_dim, dim, device=device, dtype=dtype)
        self.weight = nn.Parameter(empty)
        self.bias = (
            nn.Parameter(torch.empty(3, self.hidden_dim, device=device, dtype=dtype))
            if bias
            else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the maps as ``nn.Linear`` does."""
        bound = self.dim**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def weights(self, p: Tensor, q: Tensor) -> Tensor:
        """Return the weights (..., 2) of p and q, in float32 at least."""
        return self._attention(p, q)[0]

    def forward(self, p: Tensor, q: Tensor) -> Tensor:
        """Return the mixture (..., k) of both, in the dtype of ``q``.

        Raises:
            ValueError: ``p`` and ``q`` are not of one shape, or have other features.
        """
        weights, values = self._attention(p, q)
        return (weights.unsqueeze(-1) * values).sum(-2).to(values.dtype)

    def gate_values(self, p: Tensor, q: Tensor) -> Tensor:
        """Return the weight (...) of what is transferred."""
        return self.weights(p, q)[..., 0]

    def extra_repr(self) -> str:
        """Show the sizes in ``print(gate)``."""
        return f"dim={self.dim}, hidden_dim={self.hidden_dim}"

    def _attention(self, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights (..., 2) and the values (..., 2, k)."""
        if p.shape != q.shape or q.shape[-1:] != (self.dim,):
            raise ValueError(
                f"p {tuple(p.shape)} and q {tuple(q.shape)} must be of one shape that ends in the"
                f" {self.dim} features of the gate"
            )
        bias = None if self.bias is None else self.bias.flatten()
        maps = F.linear(torch.stack([p, q], -2), self.weight.flatten(0, 1), bias)
        key, query, value = maps.view(*maps.shape[:-1], 3, self.hidden_dim).unbind(-2)
        scores = (key * query).sum(-1, dtype=torch.promote_types(key.dtype, torch.float32))
        return (scores * self.hidden_dim**-0.5).softmax(-1), value


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
        """Return the factors (..., D) in (0, 2), of the prior and ``seen``, or ``x`` if None.

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
