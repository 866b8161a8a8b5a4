"""A gate on what the heads of an attention layer hold."""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core_gates.activations import GATE_ACTIVATIONS, GateActivation
from core_gates.attention.constants import INIT_STD
from core_gates.errors import check_at_least, check_option
from core_gates.numerics import accumulation_dtype
from core_gates.ops.gate_multiply.op import gate_multiply

Granularity = Literal["elementwise", "headwise"]
Sharing = Literal["head_specific", "head_shared"]
Form = Literal["multiplicative", "additive"]


class HeadGate(nn.Module):
    """Gate the heads by the input of their layer: ``y * act(x W)`` or ``y + act(x W)``.

    From *Gated Attention for Large Language Models* (arXiv 2505.06708), equation 5 and its
    variants. The activation is computed in float32.

    Args:
        dim: Features of the normed input of the layer.
        num_heads: Heads of the gated tensor.
        head_dim: Features of a head.
        granularity: One gate per feature or one per head.
        sharing: Whether every head has its own gates or all heads share those of one.
        form: Whether the gate multiplies or is added.
        activation: ``ns_sigmoid`` is ``0.5 + 0.5 sigmoid(z)``, which cannot close.
        input_dependent: False for learned gates that are the same for all tokens, a control.
        bias_init: Value of a bias (+3 opens a sigmoid to 0.95, to gate a trained model); no bias if
            None.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``x`` (..., dim) and ``y`` (..., num_heads, head_dim) to the shape of ``y``.

    Raises:
        ValueError: A size is below 1 or an option is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        *,
        granularity: Granularity = "elementwise",
        sharing: Sharing = "head_specific",
        form: Form = "multiplicative",
        activation: GateActivation = "sigmoid",
        input_dependent: bool = True,
        bias_init: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, dim=dim, num_heads=num_heads, head_dim=head_dim)
        check_option("granularity", granularity, get_args(Granularity))
        check_option("sharing", sharing, get_args(Sharing))
        check_option("form", form, get_args(Form))
        check_option("activation", activation, get_args(GateActivation))
        self.form, self.activation, self.bias_init = form, activation, bias_init
        self.gate_shape = (
            1 if sharing == "head_shared" else num_heads,
            1 if granularity == "headwise" else head_dim,
        )
        width = self.gate_shape[0] * self.gate_shape[1]
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(width, dim, **options)) if input_dependent else None
        has_bias = bias_init is not None or not input_dependent
        self.bias = nn.Parameter(torch.empty(width, **options)) if has_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, 0.02²), so that a sigmoid starts half open."""
        if self.weight is not None:
            nn.init.normal_(self.weight, std=INIT_STD)
        if self.bias is not None:
            nn.init.constant_(self.bias, self.bias_init or 0.0)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the gated ``y``, in its dtype."""
        logits = self._logits(x)
        multiplies = self.form == "multiplicative"
        if multiplies and self.activation == "sigmoid" and logits.shape == y.shape:
            return gate_multiply(y, logits)
        gate = self._activate(logits)
        value = y.to(gate.dtype)
        return (value * gate if multiplies else value + gate).to(y.dtype)

    def gate_values(self, x: Tensor, y: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Return the gates (..., num_heads or 1, head_dim or 1) in float32 at least."""
        return self._activate(self._logits(x))

    def _activate(self, logits: Tensor) -> Tensor:
        acc = accumulation_dtype(logits)
        return GATE_ACTIVATIONS[self.activation](logits.to(acc))

    def _logits(self, x: Tensor) -> Tensor:
        if self.weight is None:
            assert self.bias is not None
            logits = self.bias.expand(*x.shape[:-1], -1)
        else:
            logits = F.linear(x, self.weight, self.bias)
        return logits.reshape(*x.shape[:-1], *self.gate_shape)

    def extra_repr(self) -> str:
        """Show the shape of the gates and how they act."""
        return f"gates={self.gate_shape}, form={self.form}, activation={self.activation}"
