"""Parts of gated attention: gates of heads, fused queries, rotary positions, key-value caches."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core_gates.activations import GATE_ACTIVATIONS, GateActivation
from core_gates.errors import check_at_least, check_finite, check_option
from core_gates.numerics import accumulation_dtype
from core_gates.ops._select import is_transformed
from core_gates.ops.elementwise import gate_multiply

INIT_STD = 0.02
NORM_EPS = 1e-6


RotaryTable = tuple[Tensor, Tensor]
"""Cosines and sines (..., D / 2) of the angles of a rotary embedding."""


def rotary_table(
    positions: Tensor,
    head_dim: int,
    theta: float = 10000.0,
    *,
    frequencies: Tensor | Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> RotaryTable:
    """Return cosines and sines that rotate feature pair i by ``position * theta ** (-2 i / D)``.

    All layers of a model with the same heads and base use the same table: compute it once a pass.

    Args:
        positions: Positions (...).
        head_dim: Features D of a head.
        theta: Base of the wavelengths.
        frequencies: Angles per position (D / 2) in place of those of ``theta``, see `rotate`.
        dtype: That of what is rotated; the table has float32 at least.

    Returns:
        Cosines and sines (..., D / 2).

    Raises:
        ValueError: D is odd, or the frequencies do not fit.
    """
    if head_dim % 2:
        raise ValueError(f"rotary embedding needs an even number of features, got {head_dim}")
    acc = torch.promote_types(torch.float32, dtype)
    if frequencies is None:
        exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=acc) / head_dim
        frequencies = theta**-exponents
    frequencies = torch.as_tensor(frequencies, dtype=acc, device=positions.device)
    check_frequencies(frequencies.shape, head_dim)
    angles = positions.to(acc).unsqueeze(-1) * frequencies
    return angles.cos(), angles.sin()


def check_frequencies(shape: Sequence[int], head_dim: int) -> None:
    """Refuse frequencies that are not one per pair of features."""
    if tuple(shape) != (head_dim // 2,):
        raise ValueError(
            f"frequencies {tuple(shape)} must be ({head_dim // 2},), one per pair of {head_dim}"
            " features"
        )


def rotate(
    x: Tensor,
    positions: Tensor,
    theta: float = 10000.0,
    *,
    frequencies: Tensor | Sequence[float] | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Rotate pair i of the features of ``x`` by ``position * theta ** (-2 i / D)``.

    The dot product of a rotated query and a rotated key depends on the distance of their positions
    alone (RoFormer, Su et al., 2021, arXiv 2104.09864).

    Args:
        x: Queries or keys (..., D).
        positions: Positions, broadcastable to (...): (T,) for heads before tokens
            (B, H, T, D), (T, 1) for tokens before heads (B, T, H, D).
        theta: Base of the wavelengths.
        frequencies: Angles per position (D / 2) in place of those of ``theta``, such as
            ``inv_freq`` of a model of transformers, which holds linear, Llama 3 or YaRN scaling.
            The factor by which YaRN multiplies what is rotated is not applied.
        interleaved: Whether pair i is features 2 i and 2 i + 1, as in RoFormer and GPT-J, rather
            than i and i + D / 2 (rotate-half), as in Llama and Qwen.

    Returns:
        Rotated values of the shape and dtype of ``x``, computed in float32 at least.

    Raises:
        ValueError: D is odd, or the frequencies do not fit.
    """
    table = rotary_table(positions, x.shape[-1], theta, frequencies=frequencies, dtype=x.dtype)
    return rotate_by(x, table, interleaved=interleaved)


def rotate_by(x: Tensor, table: RotaryTable, *, interleaved: bool = False) -> Tensor:
    """Rotate ``x`` (..., D) by a table whose parts broadcast to (..., D / 2); see `rotate`."""
    cos, sin = table
    exact = x.to(accumulation_dtype(x))
    halves = (*x.shape[:-1], x.shape[-1] // 2, 2)
    pairs = exact.reshape(halves).unbind(-1) if interleaved else exact.chunk(2, -1)
    first, second = pairs
    turned = [first * cos - second * sin, second * cos + first * sin]
    joined = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return joined.to(x.dtype)


class _Memory:
    """Memory for keys or values, with room for half as many tokens again.

    Attributes:
        whole: All of it (B, K, more than S, D).
        written: Its first S tokens, the only tensor that may be continued here: what is a copy, cut
            short or reordered is another tensor.
    """

    def __init__(self, tokens: Tensor, length: int) -> None:
        batch, heads, before, dim = tokens.shape
        self.whole = tokens.new_empty(batch, heads, length + length // 2, dim)
        self.whole[:, :, :before] = tokens
        self.written = tokens

    def has_room(self, tokens: Tensor, length: int) -> bool:
        fits = self.written is tokens and length <= self.whole.shape[2]
        return fits and (torch.is_inference_mode_enabled() or not self.whole.is_inference())

    def write(self, new: Tensor) -> Tensor:
        start, length = self.written.shape[2], self.written.shape[2] + new.shape[2]
        self.whole[:, :, start:length] = new
        self.written = self.whole[:, :, :length]
        return self.written


@dataclass
class KeyValueCache:
    """Keys and values of the tokens that one attention layer has seen; it grows with every call.

    Start with an empty one for every layer and every batch of sequences. Without gradients, new
    tokens are written next to the old ones, which are copied only when their memory is full; it
    then gets room for half as many again.

    Attributes:
        keys: Keys (B, K, S, D), gated and rotated; None before the first token.
        values: Values (B, K, S, D), gated.
        padding_mask: True (B, S) at tokens to ignore; None while there are none.
    """

    keys: Tensor | None = None
    values: Tensor | None = None
    padding_mask: Tensor | None = None
    _memory: dict[str, _Memory] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        """Return the number of tokens S, padding included."""
        return 0 if self.keys is None else self.keys.shape[2]

    def extend(
        self, keys: Tensor, values: Tensor, *, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add T tokens and return all keys, values and padding.

        Args:
            keys: New keys (B, K, T, D).
            values: New values (B, K, T, D).
            padding_mask: True (B, T) at tokens to ignore.

        Raises:
            ValueError: The tokens belong to another batch, or to other heads.
        """
        num_before = len(self)
        if self.keys is not None and self.values is not None:
            before, now = ((t.shape[0], t.shape[1], t.shape[3]) for t in (self.keys, keys))
            if before != now:
                raise ValueError(
                    f"the cache holds (batch, heads, features) {before}, got tokens of {now};"
                    " start with an empty cache for every layer and batch"
                )
            keys = self._append("keys", self.keys, keys)
            values = self._append("values", self.values, values)
        if padding_mask is not None or self.padding_mask is not None:
            batch, length = keys.shape[0], keys.shape[2]
            parts = (
                (self.padding_mask, num_before),
                (padding_mask, length - num_before),
            )
            padding_mask = torch.cat(
                [
                    torch.zeros(batch, size, dtype=torch.bool, device=keys.device)
                    if part is None
                    else part
                    for part, size in parts
                ],
                1,
            )
        self.keys, self.values, self.padding_mask = keys, values, padding_mask
        return keys, values, padding_mask

    def _append(self, name: str, before: Tensor, new: Tensor) -> Tensor:
        differentiable = torch.is_grad_enabled() or is_transformed()
        if differentiable or torch.compiler.is_compiling() or before.dtype != new.dtype:
            return torch.cat([before, new], 2)
        length = before.shape[2] + new.shape[2]
        if name not in self._memory or not self._memory[name].has_room(before, length):
            self._memory = {**self._memory, name: _Memory(before, length)}  # not that of a copy
        return self._memory[name].write(new)


def split_fused_q_proj(
    fused: Tensor, num_heads: int, num_kv_heads: int, head_dim: int
) -> tuple[Tensor, Tensor]:
    """Cut a fused projection into that of the queries and that of the gates.

    The rows of a fused projection are grouped by key head: the query rows of the heads of its
    group, then their gate rows, one a head (headwise) or one a feature (elementwise).

    Args:
        fused: Weight (R, dim) or bias (R,), where R is H * (D + 1) or H * 2 D.
        num_heads: Query heads H.
        num_kv_heads: Key heads K.
        head_dim: Features D of a head.

    Returns:
        Query rows (H * D, ...) and gate rows (H, ...) or (H * D, ...), both ordered by head.

    Raises:
        ValueError: The rows are not those of such a projection.
    """
    gated = num_heads * head_dim
    row_counts = (gated + num_heads, 2 * gated)
    if num_kv_heads < 1 or num_heads % num_kv_heads or fused.shape[0] not in row_counts:
        raise ValueError(
            f"{fused.shape[0]} rows are not a fused projection of {num_heads} heads of {head_dim}"
            f" features in {num_kv_heads} groups: expected {row_counts[0]} or {row_counts[1]}"
        )
    by_group = _grouped(fused, num_kv_heads)
    queries = gated // num_kv_heads
    return by_group[:, :queries].flatten(0, 1), by_group[:, queries:].flatten(0, 1)


def fuse_q_proj(queries: Tensor, gates: Tensor, num_kv_heads: int) -> Tensor:
    """Undo `split_fused_q_proj`.

    Args:
        queries: Query rows (H * D, ...).
        gates: Gate rows (H, ...) or (H * D, ...).
        num_kv_heads: Key heads K.

    Raises:
        ValueError: K does not divide the rows.
    """
    if num_kv_heads < 1 or queries.shape[0] % num_kv_heads or gates.shape[0] % num_kv_heads:
        raise ValueError(
            f"{queries.shape[0]} query rows and {gates.shape[0]} gate rows do not fall into"
            f" {num_kv_heads} groups"
        )
    grouped = [_grouped(t, num_kv_heads) for t in (queries, gates)]
    return torch.cat(grouped, 1).flatten(0, 1)


def _grouped(rows: Tensor, num_groups: int) -> Tensor:
    return rows.reshape(num_groups, rows.shape[0] // num_groups, *rows.shape[1:])


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
        ValueError: A size is below 1, an option is unknown, or the bias is not finite.
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
        check_finite(bias_init=bias_init)
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
