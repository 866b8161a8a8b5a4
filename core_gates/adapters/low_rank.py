"""Low-rank matrices, and adapters given by their factors, in any layout."""

import math
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from core_gates.numerics import content_version
from core_gates.routing.repeated import probing

ROWS = 512
"""Inputs at a time of which the weight of a layer of any kind is read."""


class LowRank(NamedTuple):
    """A LoRA of one linear layer: it adds ``scale * up @ down`` to the weight (Hu et al., 2022).

    With a magnitude it is a DoRA (Liu et al., 2024): the rows of the weight, with this added, get
    the magnitude as their norm.

    Attributes:
        down: First factor A (r, in_features).
        up: Second factor B (out_features, r).
        scale: α/r, or α/√r for rank-stabilized adapters.
        magnitude: Norms of the rows of the weight (out_features,); NaN leaves a row as it is, None
            all of them.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Number of components r."""
        return self.down.shape[0]

    def delta_weight(self, weight: Tensor | None = None) -> Tensor:
        """Return the change (out_features, in_features) that the adapter adds to the weight.

        Args:
            weight: That of the layer, which an adapter with a magnitude needs.

        Raises:
            ValueError: There is a magnitude, but no weight.
        """
        delta = self.scale * (self.up @ self.down)
        if self.magnitude is None:
            return delta
        if weight is None:
            raise ValueError("an adapter with a magnitude changes a weight by its rows: give it")
        return self.row_gains(weight).unsqueeze(-1) * (weight + delta) - weight

    def row_gains(self, weight: Tensor) -> Tensor:
        """Return the factors (out_features,) of the rows of the changed weight."""
        assert self.magnitude is not None
        changed = torch.addmm(weight.to(self.up.dtype), self.up, self.down, alpha=self.scale)
        norms = torch.linalg.vector_norm(changed, dim=-1)
        gains = self.magnitude / norms.clamp(min=torch.finfo(norms.dtype).tiny)
        return torch.where(self.magnitude.isnan(), torch.ones_like(gains), gains)

    def check(self, in_features: int, out_features: int) -> None:
        """Refuse factors that do not belong to a layer of these sizes or to each other.

        Raises:
            ValueError: A shape does not fit.
        """
        rank = self.down.shape[0]
        if self.down.shape != (rank, in_features) or self.up.shape != (out_features, rank):
            raise ValueError(
                f"factors {tuple(self.down.shape)} and {tuple(self.up.shape)} do not fit a layer of"
                f" {in_features} inputs and {out_features} outputs: expected (r, {in_features}) and"
                f" ({out_features}, r)"
            )
        if self.magnitude is not None and self.magnitude.shape != (out_features,):
            raise ValueError(
                f"magnitude {tuple(self.magnitude.shape)} does not fit a layer of {out_features}"
                f" outputs: expected ({out_features},)"
            )


def side_by_side(parts: Sequence[LowRank | None], sizes: Sequence[int]) -> LowRank:
    """Return one adapter of layers that share their input, for their outputs side by side.

    Args:
        parts: The adapter of each layer, None where it has none. Where all have the same ``down``,
            the rank stays; else ranks add up and ``up`` is block-diagonal. A scale that all have
            stays, too.
        sizes: Outputs of each layer.

    Raises:
        ValueError: No layer has an adapter, or factors do not fit.
    """
    given = [part for part in parts if part is not None]
    if not given:
        raise ValueError("none of the layers has factors of this adapter")
    for part, size in zip(parts, sizes, strict=True):
        if part is not None:
            part.check(given[0].down.shape[1], size)
    first = given[0].down
    shared = all(part.down is first or torch.equal(part.down, first) for part in given)
    down = first if shared else torch.cat([part.down for part in given])
    scale = given[0].scale if len({part.scale for part in given}) == 1 else 1.0
    rows, start = [], 0
    for part, size in zip(parts, sizes, strict=True):
        row = given[0].up.new_zeros(size, len(down))
        if part is not None:
            begin = 0 if shared else start
            up = part.up if part.scale == scale else part.scale / scale * part.up
            row[:, begin : begin + part.rank] = up
            start += part.rank
        rows.append(row)
    magnitude = None
    if any(part.magnitude is not None for part in given):
        magnitude = torch.cat(
            [
                rows[k].new_full((size,), math.nan)
                if part is None or part.magnitude is None
                else part.magnitude
                for k, (part, size) in enumerate(zip(parts, sizes, strict=True))
            ]
        )
    return LowRank(down, torch.cat(rows), scale, magnitude)


def is_unwatched(layer: nn.Module) -> bool:
    """Return whether nothing but its caller sees the outputs of a plain linear layer."""
    hooks = layer._forward_hooks or nn.modules.module._global_forward_hooks
    return type(layer) is nn.Linear and "forward" not in vars(layer) and not hooks


def is_plain(layer: nn.Module) -> bool:
    """Return whether a layer is a plain linear one, which neither hooks nor others change."""
    hooks = layer._forward_pre_hooks or nn.modules.module._global_forward_pre_hooks
    return is_unwatched(layer) and not hooks


@torch.no_grad()
def place_of(layer: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device of a layer, quantized or not, and the dtype of what it computes.

    Args:
        layer: Any module. A dtype of eight bits is one of storage and does not count.
    """
    tensors = [*layer.parameters(), *layer.buffers()]
    wide = (t.dtype for t in tensors if t.is_floating_point() and t.dtype.itemsize > 1)
    return (
        next((t.device for t in tensors), torch.device("cpu")),
        next(wide, torch.get_default_dtype()),
    )


def weight_of(layer: nn.Module) -> Tensor:
    """Return the weight (out_features, in_features) of a linear layer of any kind.

    What any other than a plain ``nn.Linear`` computes with is read from its outputs for unit
    vectors, in evaluation mode and without a trace of the calls.

    Args:
        layer: A module with ``in_features``.

    Raises:
        ValueError: It has no memory, or is not called with inputs alone, or is not linear but for a
            bias.
    """
    name, tensors = type(layer).__name__, [*layer.parameters(), *layer.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError(
            f"{name} is on the device meta, where an adapter with a magnitude (DoRA) finds no"
            " weight: attach it after loading"
        )
    weight = getattr(layer, "weight", None)
    if is_plain(layer) and type(weight) in (Tensor, nn.Parameter):
        stored = cast(Tensor, weight).detach()
        if stored.is_floating_point():
            return stored
    (device, dtype), size = place_of(layer), int(layer.in_features)  # type: ignore[arg-type]
    units = torch.eye(size, device=device, dtype=dtype)
    generator = torch.Generator("cpu").manual_seed(0)
    x = 8 * torch.randn(2, size, generator=generator, device="cpu").to(units)
    try:
        with probing(layer, device):
            bias, y = layer(units.new_zeros(1, size)), layer(x)
            columns = torch.cat([layer(rows) - bias for rows in torch.split(units, ROWS)])
    except Exception as failure:
        reason = " ".join(f"{type(failure).__name__}: {failure}".split())
        raise ValueError(f"{name} cannot be called with inputs (N, {size}): {reason}") from failure
    eps, linear = torch.finfo(y.dtype).eps, x @ columns
    error, least, most = (t.float().norm() for t in (y - bias - linear, linear, y))
    if not error <= least / 4 + 16 * eps * most:  # inputs may be rounded to few bits
        raise ValueError(
            f"{name} does not compute a weight times its input plus a bias, which an adapter with a"
            " magnitude (DoRA) needs: give it the linear layer alone"
        )
    return columns.mT.contiguous()


def bias_of(layer: nn.Module, x: Tensor) -> Tensor | None:
    """Return the bias (..., out_features) of a linear layer of any kind, as it is at this call.

    That of any other than a plain ``nn.Linear`` is its output for zeros, whatever its name.

    Args:
        layer: The layer.
        x: Inputs (..., in_features) of it.
    """
    if is_plain(layer):
        return cast(Tensor | None, layer.bias)
    return cast(Tensor, layer(x.new_zeros(*[1] * (x.ndim - 1), x.shape[-1])))


def by_sample(weights: Tensor, x: Tensor) -> Tensor:
    """Return weights (K,), or (B, K) of samples, as they multiply what is of an input.

    Args:
        weights: Of adapters.
        x: Inputs (..., D), or (B, ..., D).

    Returns:
        (K,), or (B, 1, ..., K) with as many axes as ``x``.
    """
    if weights.ndim < 2:
        return weights
    return weights.view(len(weights), *[1] * (x.ndim - 2), weights.shape[-1])


BUFFERS = "adapter_ranks", "down", "up", "strengths"


class AdapterCapacity(NamedTuple):
    """Memory for adapters that are exchanged later, without another shape of any tensor.

    Attributes:
        adapters: Largest number of adapters K.
        rank: Largest rank of one.
    """

    adapters: int
    rank: int


class AdapterFactors(nn.Module):
    """Hold the factors of K adapters from D to D' features, side by side.

    They are buffers, and loading a state dict brings those that were saved. They move with the
    module in device and dtype, but not to the device ``meta``, where they would be lost.

    Args:
        in_features: Inputs D.
        out_features: Outputs D'.
        capacity: Memory to keep for other adapters; by default exactly that of those that are set.

    Attributes:
        down: First factors (R, D).
        up: Second factors (R, D'), with scales.
        strengths: Factor of the output of each adapter (K,), see `set_strengths`.
        places: Place (K,) of each among those that were set; 0 where room is left.
        base_gains: What adapters with magnitudes add of the layer's own output without bias
            (K, D'); None if none has one.
    """

    adapter_ranks: Tensor
    down: Tensor
    up: Tensor
    strengths: Tensor
    places: Tensor
    base_gains: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, capacity: AdapterCapacity | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.capacity = in_features, out_features, capacity

    def _set(
        self,
        adapters: Sequence[LowRank],
        device: torch.device | None,
        weight: Callable[[], Tensor],
    ) -> None:
        """Exchange the adapters.

        Args:
            adapters: The new ones, which are copied; those of rank 0 are left out.
            device: Where to, if not where they are.
            weight: Returns the weight of the layer, which magnitudes need.

        Raises:
            ValueError: The factors of one do not fit, or there is no room for them.
        """
        for adapter in adapters:
            adapter.check(self.in_features, self.out_features)
        self._places = [k for k, adapter in enumerate(adapters) if adapter.rank > 0]
        given = [adapters[k] for k in self._places]
        gains: list[Tensor | None] = [None] * len(given)
        if any(adapter.magnitude is not None for adapter in given):
            dense = weight()
            gains = [a.row_gains(dense) if a.magnitude is not None else None for a in given]
        sizes = {"down": self.in_features, "up": self.out_features}
        empty = [getattr(self, n, torch.empty(0, size))[:0] for n, size in sizes.items()]
        ups = [
            a.scale * a.up.detach().mT * (1.0 if g is None else g)
            for a, g in zip(given, gains, strict=True)
        ]
        downs = [a.down.detach() for a in given]
        ranks = [adapter.rank for adapter in given]
        if self.capacity is not None:
            ranks, downs, ups = self._padded(ranks, downs, ups, empty)
        stacked = [torch.cat(f) if f else e for f, e in zip((downs, ups), empty, strict=True)]
        self._put(ranks, *(tensor.to(device) for tensor in stacked))
        self._put_gains(gains)

    def _padded(
        self, ranks: list[int], downs: list[Tensor], ups: list[Tensor], empty: Sequence[Tensor]
    ) -> tuple[list[int], list[Tensor], list[Tensor]]:
        assert self.capacity is not None
        most, rank = self.capacity
        if len(ranks) > most or max(ranks, default=0) > rank:
            raise ValueError(
                f"there is room for {most} adapters of rank {rank}, found {len(ranks)} of ranks"
                f" {ranks}: attach with a larger capacity"
            )
        like = (downs[0], ups[0]) if ranks else empty
        padded = [
            [self._rows(factor, rank, shape) for factor, _ in zip_longest(factors, range(most))]
            for factors, shape in zip((downs, ups), like, strict=True)
        ]
        return [rank] * most, padded[0], padded[1]

    @staticmethod
    def _rows(factor: Tensor | None, rank: int, like: Tensor) -> Tensor:
        """Return a factor with rows of zeros up to a rank."""
        rows = like.new_zeros(rank, like.shape[-1])
        if factor is not None:
            rows[: len(factor)] = factor
        return rows

    def _put(self, ranks: list[int], down: Tensor, up: Tensor) -> None:
        strengths = torch.ones(len(ranks), dtype=up.dtype, device=up.device)
        free = [0] * (len(ranks) - len(self._places))
        places = torch.tensor([*self._places, *free], dtype=torch.int64, device=up.device)
        given = {"down": down, "up": up, "strengths": strengths, "places": places}
        for name, tensor in given.items():
            old: Tensor | None = getattr(self, name, None)
            if self.capacity is not None and old is not None and _alike(old, tensor):
                old.copy_(tensor)
            else:
                self.register_buffer(name, tensor, persistent=name != "places")
        if self.capacity is None or getattr(self, "_ranks", None) != ranks:
            counts = torch.tensor(ranks, dtype=torch.int64)
            self.register_buffer("adapter_ranks", counts)  # (K,)
        self._ranks, self._known_version = ranks, content_version(self.adapter_ranks)

    def _put_gains(self, gains: Sequence[Tensor | None]) -> None:
        gained = None
        if any(gain is not None for gain in gains):
            gained = self.up.new_zeros(len(self._ranks), self.out_features)
            for k, gain in enumerate(gains):
                if gain is not None:
                    gained[k] = gain - 1
        self.register_buffer("base_gains", gained)

    def set_strengths(self, strengths: Sequence[float] | Tensor) -> None:
        """Weigh the outputs of the adapters before the gate sees them; 0 switches one off.

        Nothing is copied, and a compiled layer stays as it is.

        Args:
            strengths: One number for each of the adapters that were set, also for those that have
                no factors for this layer.

        Raises:
            ValueError: There is another number of them, or one is not finite.
        """
        given = torch.as_tensor(strengths, dtype=torch.float64).flatten()
        if len(given) <= max(self._places, default=-1) or not given.isfinite().all():
            raise ValueError(
                f"strengths {given.tolist()} must be finite numbers, one for each adapter"
            )
        kept = given[self._places].to(self.strengths)
        self.strengths[: len(kept)].copy_(kept)

    @property
    def ranks(self) -> list[int]:
        """Ranks of the adapters: those of the buffer, which may be loaded in place."""
        if self.adapter_ranks.is_meta or torch.jit.is_tracing():  # type: ignore[no-untyped-call]
            return self._ranks
        if torch.compiler.is_compiling():
            if not torch.compiler.is_exporting():
                compiled = torch.tensor(self._ranks, device=self.adapter_ranks.device)
                torch._assert_async(
                    (self.adapter_ranks == compiled).all(),
                    "the ranks of the adapters have changed since this graph was compiled; read"
                    " layer.ranks once, outside of torch.compile, and call again",
                )
            return self._ranks
        version = content_version(self.adapter_ranks)
        if version is None or version != self._known_version:
            self._ranks, self._known_version = self.adapter_ranks.tolist(), version
        return self._ranks

    def hidden(self, x: Tensor) -> Tensor:
        """Return the weighted inputs of the second factors (..., R)."""
        return self._hidden(x, self.ranks)

    def _hidden(self, x: Tensor, ranks: Sequence[int]) -> Tensor:
        strengths = by_sample(self._weights(), x).to(x.device, x.dtype)
        hidden = nn.functional.linear(x, self.down.to(x.device, x.dtype))
        if len(set(ranks)) == 1:
            each = hidden.reshape(*hidden.shape[:-1], len(ranks), ranks[0])
            return (each * strengths.unsqueeze(-1)).flatten(-2)
        pairs = zip(strengths.unsqueeze(-1).unbind(-2), ranks, strict=True)
        return hidden * torch.cat([s.expand(*s.shape[:-1], rank) for s, rank in pairs], -1)

    def _weights(self) -> Tensor:
        """Return the factor of each adapter, (K,) or one a sample (B, K)."""
        return self.strengths

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the factors with the module, unless that would drop their values."""
        kept = {name: self._buffers.pop(name) for name in (*BUFFERS, "places", "base_gains")}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            for name, tensor in kept.items():
                self._buffers[name] = None if tensor is None else _moved(tensor, fn)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Replace the attached adapters by those of the state dict."""
        saved = [state_dict.get(prefix + name) for name in BUFFERS[:3]]
        if all(isinstance(tensor, Tensor) for tensor in saved):
            ranks, down, up = cast(list[Tensor], saved)
            if int(ranks.sum()) == len(down) == len(up):
                self._places = list(range(len(ranks)))
                self._put(ranks.tolist(), torch.empty_like(down), torch.empty_like(up))
                state_dict.setdefault(f"{prefix}strengths", self.strengths)
                gains = state_dict.get(f"{prefix}base_gains")
                self.register_buffer(
                    "base_gains", None if gains is None else torch.empty_like(gains)
                )
            else:
                error_msgs.append(
                    f"{prefix or 'layer'}: the ranks of its adapters sum to {int(ranks.sum())}, its"
                    f" factors to {len(down)}: the checkpoint is damaged, save it again"
                )
                return
        elif strict:
            error_msgs.append(
                f"{prefix or 'layer'}: the state dict holds no adapters: load the plain layer into"
                " .base or a gate into .gate, or attach adapters after loading"
            )
        super()._load_from_state_dict(  # type: ignore[no-untyped-call]
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )


def _alike(left: Tensor, other: Tensor) -> bool:
    return (left.shape, left.device, left.dtype) == (other.shape, other.device, other.dtype)


def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a tensor where and in which dtype ``fn`` puts one, with its own values."""
    probe = fn(tensor.new_empty(0))
    return tensor.to(tensor.device if probe.is_meta else probe.device, probe.dtype)
