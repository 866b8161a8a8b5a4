"""The gate of AutoLoRA (arXiv 2508.02107), and the diffusion time that it may see."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from core_gates.errors import check_option
from core_gates.numerics import accumulation_dtype


class DiffusionTime:
    """What a model was last told as its time, for all gates in it.

    Gates read it in the forward pass, and again where activations are recomputed in the backward
    pass: there it is that of the forward pass whose output is differentiated.

    Args:
        model: The model.
        argument: Name of the argument of its forward pass that holds the time.
        scale: Times of the gates, which count from 0 to 1000, by those of the model.

    Attributes:
        time: (B,) or one number; None before the first forward pass.

    Raises:
        ValueError: The model has no such argument.
    """

    def __init__(self, model: nn.Module, argument: str = "timestep", scale: float = 1.0) -> None:
        self.time: Tensor | None = None
        self.argument, self.scale = argument, scale
        self._signature = inspect.signature(model.forward)
        if argument not in self._signature.parameters:
            raise ValueError(
                f"{type(model).__name__}.forward has no argument {argument!r}: it takes "
                f"{', '.join(self._signature.parameters)}"
            )
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._read, with_kwargs=True),
            model.register_forward_hook(self._return_to, with_kwargs=True),
        ]

    def stop(self) -> None:
        """Leave the model as it was."""
        while self._handles:
            self._handles.pop().remove()

    def _told(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        given = self._signature.bind_partial(*args, **kwargs).arguments.get(self.argument)
        return None if given is None else torch.as_tensor(given) * self.scale

    def _read(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.time = self._told(args, kwargs)

    def _return_to(
        self, _model: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any
    ) -> None:
        time = self.time

        def set_back(_grad: Tensor) -> None:
            self.time = time

        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(set_back)  # type: ignore[no-untyped-call]


def _tensors(output: Any) -> Iterable[Tensor]:
    """Return the tensors in what a model returns."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


Variant = Literal["full", "no_base", "no_cross", "no_lora"]
Initialization = Literal["sum", "published"]
Time = Literal["implicit", "film"]

TIME_FEATURES = 16


class LoraGate(nn.Module):
    """Weigh K adapter outputs by the layer's output and their own (AutoLoRA, 2025, section 3.3).

    With LayerNorms ``n_b`` and ``n_l`` over the features, base output ``o`` and adapter outputs
    ``y_k``, the gate and the mixed output are::

        g_k = sigmoid(n_b(o) w_base + n_l(y_k) w_lora + n_b(o) n_l(y_k) w_cross + bias)
        out = o + w_out Σ_k g_k y_k

    All parameters are vectors over the features that the adapters share: a trained gate serves any
    number of adapters in any order. Each adapter has its own sigmoid, they do not compete.

    Args:
        dim: Output features of the layer.
        variant: Terms of the gate: ``full``; ``no_base`` without that of ``w_base``; ``no_lora``
            without that of ``w_lora``; ``no_cross`` with ``w_lora`` and the bias only.
        initialization: ``sum`` starts as the plain sum of all adapters; ``published`` draws the
            weights and the bias from N(0, 1) and scales by 0.512.
        time: ``film`` adds ``w_time φ(t)`` to the bias, with 16 sinusoids φ of the diffusion time,
            zero at the start; ``implicit`` (published) knows the time by the activations alone.
        kinds: Kinds of adapters that have factors before the gate, see `AdapterContext`;
            none as published.
        eps: What is added to the variances of the LayerNorms.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``base`` (..., D) and ``loras`` (..., K, D) to (..., D).

    Raises:
        ValueError: An option is unknown.
    """

    def __init__(
        self,
        dim: int,
        *,
        variant: Variant = "full",
        initialization: Initialization = "sum",
        time: Time = "implicit",
        kinds: int = 0,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_option("variant", variant, get_args(Variant))
        check_option("initialization", initialization, get_args(Initialization))
        check_option("time", time, get_args(Time))
        self.dim = dim
        self.variant = variant
        self.initialization = initialization
        self.time = time
        self.eps = eps

        def vector(wanted: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(dim, device=device, dtype=dtype)) if wanted else None

        self.weight_base = vector(variant in ("full", "no_lora"))
        self.weight_lora = vector(variant != "no_lora")
        self.weight_cross = vector(variant != "no_cross")
        self.weight_out = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.weight_time = (
            nn.Parameter(torch.empty(dim, TIME_FEATURES, device=device, dtype=dtype))
            if time == "film"
            else None
        )
        self.norm_base = (
            None if variant == "no_cross" else nn.LayerNorm(dim, eps, device=device, dtype=dtype)
        )
        self.norm_lora = nn.LayerNorm(dim, eps, device=device, dtype=dtype)
        self.factors = _factors(kinds, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the parameters according to ``initialization``, the norms to the identity."""
        weights = [
            w for w in (self.weight_base, self.weight_lora, self.weight_cross) if w is not None
        ]
        if self.initialization == "published":
            for parameter in (*weights, self.bias):
                nn.init.normal_(parameter)
            nn.init.constant_(self.weight_out, 0.512)
        else:
            for parameter in weights:
                nn.init.zeros_(parameter)
            nn.init.constant_(self.bias, 2.0)
            nn.init.constant_(self.weight_out, 1 + math.exp(-2.0))  # 1 / sigmoid(2)
        if self.weight_time is not None:
            nn.init.zeros_(self.weight_time)
        _open(self.factors)
        for norm in (self.norm_base, self.norm_lora):
            if norm is not None:
                norm.reset_parameters()

    def forward(self, base: Tensor, loras: Tensor, *, time: Tensor | None = None) -> Tensor:
        """Mix adapter outputs that exist in full.

        `GatedLoraLinear` computes the same without them.

        Args:
            base: Output of the layer (..., D).
            loras: Outputs of the adapters, scaled (..., K, D).
            time: Diffusion time between 0 and 1000 for ``film``: one number, or one a sample (B,)
                of ``base`` (B, ..., D).

        Raises:
            ValueError: The gate needs the time and gets none, or gets times that fit no batch.
        """
        gates = self.gate_values(base, loras, time=time)
        mixed = (gates * loras.to(gates.dtype)).sum(-2) * self.weight_out.to(gates.dtype)
        return (base.to(gates.dtype) + mixed).to(base.dtype)

    def gate_values(self, base: Tensor, loras: Tensor, *, time: Tensor | None = None) -> Tensor:
        """Return the gates ``g_k`` (..., K, D); arguments as in `forward`."""
        bias = self._bias(self.checked_time(time, base))
        if bias.ndim == 2:  # one row per sample
            bias = bias.view(len(bias), *[1] * (base.ndim - 1), self.dim)
        acc = torch.promote_types(bias.dtype, base.dtype)
        z = _normalize(loras.to(acc), self.norm_lora)
        logits = bias.expand_as(z)
        if self.weight_lora is not None:
            logits = logits + z * self.weight_lora
        if self.norm_base is not None:
            n = _normalize(base.to(acc), self.norm_base).unsqueeze(-2)
            if self.weight_base is not None:
                logits = logits + n * self.weight_base
            if self.weight_cross is not None:
                logits = logits + n * z * self.weight_cross
        return logits.sigmoid()

    def coefficients(self, time: Tensor | None = None) -> Tensor:
        """Fold the parameters into the rows that the op ``gated_lora`` takes.

        Args:
            time: Diffusion time for ``film``: one number, or one a sample (B,).

        Returns:
            Rows (5, D), or (B, 5, D) for times of samples.

        Raises:
            ValueError: The gate needs the time and gets none.
        """
        constant = self._bias(time)
        acc = constant.dtype
        gain, offset = self.norm_lora.weight.to(acc), self.norm_lora.bias.to(acc)
        along, slope = (
            None if w is None else w.to(acc) for w in (self.weight_lora, self.weight_base)
        )
        # Each term as a multiple of n and z before their affine maps.
        cross = None
        if self.norm_base is not None:
            base_gain, base_offset = self.norm_base.weight.to(acc), self.norm_base.bias.to(acc)
            if slope is not None:
                constant = torch.addcmul(constant, base_offset, slope)
            if self.weight_cross is not None:
                both = self.weight_cross.to(acc)
                cross = base_gain * gain * both
                along = _plus_product(along, base_offset, both)
                slope = _plus_product(slope, offset, both)
            slope = None if slope is None else base_gain * slope
        if along is not None:
            constant = torch.addcmul(constant, offset, along)
            along = gain * along
        zero = torch.zeros_like(gain)
        terms = [zero if term is None else term for term in (slope, along, cross)]
        rows = *terms, self.weight_out.to(acc)
        return torch.stack([constant, *(row.expand_as(constant) for row in rows)], -2)

    def checked_time(self, time: Tensor | None, x: Tensor) -> Tensor | None:
        """Return the time of a batch: None if the gate takes none, one number, or one a sample.

        Args:
            time: Diffusion time, one number (also in a list of one), or one a sample (B,).
            x: Batch (B, ..., D), of which nothing but the shape is read.

        Raises:
            ValueError: The gate needs the time and gets none, or the times do not fit the batch.
        """
        if self.weight_time is None:
            return None
        if time is None:
            raise ValueError("a gate with time='film' needs the diffusion time: pass time=")
        if time.shape in ((), (1,)) or (time.shape == (0,) == x.shape[:1] and x.ndim > 1):
            return time.sum()  # an empty batch, too, has one time: any
        if x.ndim < 2 or time.shape != x.shape[:1]:
            raise ValueError(
                f"time {tuple(time.shape)} must be one number, or one a sample:"
                f" {tuple(x.shape[: min(1, x.ndim - 1)])}"
            )
        return time

    def extra_repr(self) -> str:
        """Show the options in ``print(gate)``."""
        return f"dim={self.dim}, variant={self.variant}, time={self.time}"

    def _bias(self, time: Tensor | None) -> Tensor:
        """Return the bias (D,), or (B, D) for one time per sample, in float32 at least."""
        bias = self.bias.to(accumulation_dtype(self.bias))
        if self.weight_time is None:
            return bias
        if time is None:
            raise ValueError("a gate with time='film' needs the diffusion time: pass time=")
        return bias + time_features(time.to(bias.dtype)) @ self.weight_time.to(bias.dtype).mT


class OpenGate(nn.Module):
    """Let all adapters pass: their plain sum, without the cost of a gate.

    Args:
        dim: Output features of the layer.
        kinds: Kinds of adapters that have factors, see `AdapterContext`.
        device: Device of the factors.
        dtype: Floating dtype of the factors.
    """

    def __init__(
        self,
        dim: int,
        *,
        kinds: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.factors = dim, _factors(kinds, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the factors to 1, for every kind of adapters."""
        _open(self.factors)

    def forward(self, base: Tensor, loras: Tensor) -> Tensor:
        """Return ``base`` (..., D) plus the outputs of all adapters (..., K, D)."""
        return base + loras.sum(-2).to(base.dtype)

    def gate_values(self, base: Tensor, loras: Tensor) -> Tensor:
        """Return ones (..., K, D)."""
        del base
        return torch.ones_like(loras)


OPEN, SHARP = 4.0, 10.0  # logit of a switch at its start, and what its scores are multiplied by


class AdapterContext(nn.Module):
    """What all layers are told of K adapters: of which kind each is, and how well it suits.

    In a layer whose gate has ``factors`` (2, kinds) the output of an adapter of kind r is first
    multiplied by ``f[m, 0] + f[m, r]``, or ``f[m, 0]`` for the kind 0, which is any; m is 0 for up
    to two adapters and 1 for more. The switch, three numbers ``w`` for all layers, multiplies that
    of an adapter with a score by ``sigmoid(w_0 + 10 w_1 score + 10 w_2 (largest - score))``, where
    the largest is that of all adapters. At the start factors are 1 and the switch is open, 0.98.

    Args:
        kinds: Kinds of adapters that gates have factors for; 0 for none.
        switch: Whether there is a switch.
        most: Largest number of adapters, if layers have room for more than they are given.
    """

    roles: Tensor
    features: Tensor
    known: Tensor

    def __init__(self, kinds: int = 0, *, switch: bool = False, most: int = 0) -> None:
        super().__init__()
        self.kinds, self.most, self.version = kinds, most, 0
        self.switch = nn.Parameter(torch.tensor([OPEN, 0.0, 0.0])) if switch else None
        self.describe([])

    def describe(self, kinds: Sequence[int], scores: Sequence[float | None] = ()) -> None:
        """Replace what is known of the adapters.

        Args:
            kinds: Of each adapter, in order.
            scores: Of each adapter, such as its cosine with the prompt; None where it is unknown,
                which leaves an adapter on.
        """
        count, first = max(len(kinds), self.most), self.kinds * int(len(kinds) > 2)
        roles, features = torch.zeros(count, 2 * self.kinds), torch.zeros(count, 3)
        largest = max((score for score in scores if score is not None), default=0.0)
        for row, kind in zip(roles, kinds if self.kinds else (), strict=False):
            row[[first, first + kind]] = 1
        for row, score in zip(features, scores, strict=False):
            if score is not None:
                row.copy_(torch.tensor([1, SHARP * score, SHARP * (largest - score)]))
        for name, tensor in {
            "roles": roles, "features": features, "known": features[:, 0] > 0
        }.items():  # fmt: skip
            old: Tensor | None = getattr(self, name, None)
            if old is not None and old.shape == tensor.shape:
                old.copy_(tensor)  # a compiled graph stays as it is
            else:
                self.register_buffer(
                    name, tensor.to(old.device if old is not None else None), False
                )
        self.version += 1

    def opening(self) -> Tensor | float:
        """Return the factor (K,) of the switch for each adapter; 1 without a switch."""
        if self.switch is None:
            return 1.0
        device = self.switch.device
        logits = (self.features.to(device) * self.switch).sum(-1)
        return torch.where(self.known.to(device), logits.sigmoid(), 1.0)

    def forward(self, factors: Tensor | None) -> Tensor | float:
        """Return the factor (K,) of each adapter in a layer: the switch times the layer's gate."""
        return self.opening() if factors is None else self.opening() * self.weights(factors)

    def weights(self, factors: Tensor) -> Tensor:
        """Return the factors of adapters (K,) in a layer, the switch aside."""
        return (self.roles.to(factors.device) * factors.flatten()).sum(-1)


def _factors(
    kinds: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Parameter | None:
    return nn.Parameter(torch.empty(2, kinds, device=device, dtype=dtype)) if kinds else None


def _open(factors: Tensor | None) -> None:
    if factors is not None:
        nn.init.zeros_(factors)
        nn.init.ones_(factors[:, 0])


def time_features(time: Tensor) -> Tensor:
    """Return 8 cosines and 8 sines of a diffusion time between 0 and 1000.

    Their wavelengths rise from 2π by factors of 10000^(1/8), as those of positional encodings.

    Args:
        time: Any shape.

    Returns:
        Features (..., 16).
    """
    half = TIME_FEATURES // 2
    steps = torch.arange(half, device=time.device, dtype=time.dtype)
    angles = time.unsqueeze(-1) * torch.exp(-math.log(10000.0) / half * steps)
    return torch.cat([angles.cos(), angles.sin()], -1)


def _plus_product(total: Tensor | None, left: Tensor, other: Tensor) -> Tensor:
    return left * other if total is None else torch.addcmul(total, left, other)


def _normalize(value: Tensor, norm: nn.LayerNorm) -> Tensor:
    weight, bias = norm.weight.to(value.dtype), norm.bias.to(value.dtype)
    return F.layer_norm(value, value.shape[-1:], weight, bias, norm.eps)
