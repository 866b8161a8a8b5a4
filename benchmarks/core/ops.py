"""The ops of the core: attention by blocks and gated linear layers."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.comparison import Call, Comparison, Load, Work
from core_gates.adapters import LowRank

LENGTH, HEAD_DIM = 8192, 64
BASELINE = "causal SDPA"
SHARES = (0.1, 0.25, 0.5, 0.6, 0.75, 0.9, 1.0)
BACKWARD_SHARES = (0.1, 0.5)
DENSE_ABOVE = 0.5
SPARSE_BARS = {128: 1 / 5, 64: 1 / 3.5}
"""Time over that of plain attention with a tenth of the causal area kept, by block size."""
NEVER_SLOWER = 1 / 0.95
BLOCK_MAX_BAR = 1.5


def attention_comparisons() -> Iterator[Comparison]:
    """Every fraction of kept blocks, forward and with the backward pass; then block maxima."""
    for block_size in SPARSE_BARS:
        yield block_sparse(block_size, SHARES, backward=False)
    for block_size in SPARSE_BARS:
        yield block_sparse(block_size, BACKWARD_SHARES, backward=True)
    yield block_max()


def block_sparse(block_size: int, shares: tuple[float, ...], *, backward: bool) -> Comparison:
    """Return random masks of several fractions of the causal area, their diagonal always kept.

    Above a fraction of `DENSE_ABOVE` the op is timed with and without permission to attend
    everything.
    """

    def build(load: Load) -> Mapping[str, Call]:
        attend = load("core_gates.ops.block_sparse_attention.op").block_sparse_attention
        q, k, v = _inputs(backward)
        calls = {BASELINE: _call(_plain, (q, k, v), backward)}
        for share in shares:
            mask = random_mask(LENGTH // block_size, share)
            settings = [1.0] if share <= DENSE_ABOVE or share == 1 else [1.0, DENSE_ABOVE]
            for dense_above in settings:

                def sparse(
                    q: Tensor,
                    k: Tensor,
                    v: Tensor,
                    mask: Tensor = mask,
                    dense_above: float = dense_above,
                ) -> Tensor:
                    return cast(Tensor, attend(q, k, v, mask, block_size, dense_above=dense_above))

                calls[_variant(share, dense_above)] = _call(sparse, (q, k, v), backward)
        return calls

    bars = {_variant(s, d): NEVER_SLOWER for s in shares for d in (1.0, DENSE_ABOVE)}
    bars[_variant(0.1, 1.0)] = SPARSE_BARS[block_size]
    direction = "forward+backward" if backward else "forward"
    return Comparison(
        name=f"block_sparse_attention {direction} {LENGTH}x{HEAD_DIM}, block {block_size}",
        op="block_sparse_attention",
        build=build,
        baseline=BASELINE,
        bars={} if backward else bars,
    )


def block_max() -> Comparison:
    """Return attention with block maxima, by block and by row, against plain attention."""

    def build(load: Load) -> Mapping[str, Call]:
        attend = load("core_gates.ops.block_max_attention.op").block_max_attention
        q, k, v = _inputs(requires_grad=False)
        return {
            BASELINE: _call(_plain, (q, k, v), backward=False),
            "block 64": lambda: attend(q, k, v, 64),
            "block 128": lambda: attend(q, k, v, 128),
            "block 64, by row": lambda: attend(q, k, v, 64, per_row=True),
        }

    return Comparison(
        name=f"block_max_attention {LENGTH}x{HEAD_DIM}",
        op="block_max_attention",
        build=build,
        baseline=BASELINE,
        bars=dict.fromkeys(("block 64", "block 128", "block 64, by row"), BLOCK_MAX_BAR),
        work=Work(flops=2.0 * LENGTH**2 * HEAD_DIM),  # two matmuls over half of the map
    )


GROUPED = "SDPA over grouped rows"
DECODING_BAR = 1.5


LONG, STEP_BARS = 32_768, {0.1: 0.5, 1.0: 1.2}
"""Time of a step over that of plain attention in which query heads share keys, by kept fraction."""


def decoding_comparisons() -> Iterator[Comparison]:
    """A step of a small layer, 8 query and 2 key heads of 128 features, after `LENGTH` tokens.

    Then a step of attention to kept blocks after `LONG` tokens.
    """

    def build(load: Load) -> Mapping[str, Call]:
        room = load("core_gates.attention")
        torch.manual_seed(0)
        layer = room.GatedAttention(256, 8, 2, head_dim=128, position="none")
        cache = room.KeyValueCache()
        cache.keys, cache.values = torch.randn(2, 1, 2, LENGTH, 128).unbind()
        token, rows = torch.randn(1, 1, 256), torch.randn(1, 2, 4, 128)
        rotary = room.rotary_table(torch.tensor([LENGTH]), 128)

        def attend() -> Tensor:
            return F.scaled_dot_product_attention(rows, cache.keys, cache.values)

        def step() -> Tensor:
            with torch.no_grad():
                return cast(Tensor, layer(token, cache=cache, rotary=rotary))

        return {GROUPED: attend, "step": step}

    yield Comparison(
        name=f"gated attention, a step after {LENGTH} tokens",
        op="gated_attention",
        build=build,
        baseline=GROUPED,
        bars={"step": DECODING_BAR},
    )
    yield sparse_step()


def sparse_step(block_size: int = 64) -> Comparison:
    """Return the attention of one token to the kept blocks of a cache, the last one among them."""

    def build(load: Load) -> Mapping[str, Call]:
        attend = load("core_gates.ops.block_sparse_attention.op").block_sparse_attention
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(1, 8, 1, HEAD_DIM, generator=generator)
        k, v = torch.randn(2, 1, 2, LONG, HEAD_DIM, generator=generator).unbind()
        rows = q.view(1, 2, 4, HEAD_DIM)
        calls: dict[str, Call] = {GROUPED: lambda: F.scaled_dot_product_attention(rows, k, v)}
        order = torch.rand(1, 2, 1, LONG // block_size, generator=generator)
        order[..., -1] = -1
        for share in STEP_BARS:
            mask = order.argsort(-1).argsort(-1) < round(share * LONG / block_size)
            calls[_variant(share, 1.0)] = partial(attend, q, k, v, mask, block_size)
        return calls

    return Comparison(
        name=f"block_sparse_attention, a step after {LONG} tokens",
        op="block_sparse_attention",
        build=build,
        baseline=GROUPED,
        bars={_variant(share, 1.0): bar for share, bar in STEP_BARS.items()},
    )


def random_mask(num_blocks: int, share: float) -> Tensor:
    """Return a causal block mask (1, 1, N, N) that keeps a fraction of the causal area."""
    generator = torch.Generator().manual_seed(0)
    past = torch.ones(num_blocks, num_blocks, dtype=torch.bool).tril()
    order = torch.rand(num_blocks, num_blocks, generator=generator)
    order = order.masked_fill(~past, 2).fill_diagonal_(-1)
    kept = round(share * int(past.sum()))
    return (order <= order.flatten().sort().values[kept - 1])[None, None]


def _variant(share: float, dense_above: float) -> str:
    name = f"{100 * share:g} % kept"
    return name if dense_above == 1 else f"{name}, dense_above={dense_above:g}"


def _inputs(requires_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, LENGTH, HEAD_DIM, generator=generator) for _ in range(3))
    for tensor in (q, k, v):
        tensor.requires_grad_(requires_grad)
    return q, k, v


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _call(
    attend: Callable[..., Tensor], inputs: tuple[Tensor, Tensor, Tensor], backward: bool
) -> Call:
    if not backward:
        return lambda: attend(*inputs)
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    return lambda: torch.autograd.grad(attend(*inputs), inputs, grad)


ABSENT = "peft is not installed: pip install peft"


def gated_lora_comparisons() -> Iterator[Comparison]:
    """Three and eight adapters, forward, then forward with backward; on one CPU thread."""
    for backward in (False, True):
        for num_adapters in (3, 8):
            yield gated_lora(num_adapters, backward=backward)


def is_installed() -> bool:
    """Return whether the peer can be imported."""
    return importlib.util.find_spec("peft") is not None


@torch.no_grad()
def active_adapters(linear: nn.Linear, adapters: Sequence[LowRank]) -> nn.Module:
    """Wrap a copy of a layer so that all adapters are active at once.

    Args:
        linear: The layer; it is copied.
        adapters: Adapters of this layer.

    Returns:
        A module from (..., D) to (..., D').
    """
    peft: Any = importlib.import_module("peft")
    copy = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    copy.load_state_dict(linear.state_dict())
    configs = {
        f"adapter{k}": peft.LoraConfig(r=a.rank, lora_alpha=a.rank * a.scale, target_modules=["0"])
        for k, a in enumerate(adapters)
    }
    first = next(iter(configs))
    model = peft.get_peft_model(nn.Sequential(copy), configs[first], adapter_name=first)
    for name, config in configs.items():
        if name != first:
            model.add_adapter(name, config)
    layer = model.base_model.model[0]
    for name, adapter in zip(configs, adapters, strict=True):
        layer.lora_A[name].weight.copy_(adapter.down)
        layer.lora_B[name].weight.copy_(adapter.up)
    model.base_model.set_adapter(list(configs))
    return cast(nn.Module, layer)


TOKENS, DIM, RANK = 1024, 3072, 16
BARS = {
    3: {"reference": 1.25, "cpp": 1.15},
    8: {"reference": 1.45, "cpp": 1.30},
}
"""Of the definition, and of the fastest mode."""


def gated_lora(num_adapters: int, *, backward: bool = False) -> Comparison:
    """Compare the layer with ``num_adapters`` adapters with the layer alone.

    With ``backward``, the gate and the input have gradients, while layer and adapters are frozen;
    then there are no bars.
    """
    flops = 2.0 * TOKENS * DIM * (DIM + 2 * num_adapters * RANK)
    passes = "forward+backward" if backward else "forward"

    def build(load: Load) -> Mapping[str, Call]:
        return _variants(load, num_adapters, backward)

    return Comparison(
        name=f"gated LoRA {passes} {TOKENS}x{DIM}, rank {RANK}, K={num_adapters}",
        op="gated_lora",
        build=build,
        baseline="linear",
        bars={} if backward else BARS.get(num_adapters, {}),
        work=None if backward else Work(flops=flops),
        first_calls=("compile",) if backward else ("compile", "cpp"),
        absent={} if is_installed() else {"peft": ABSENT},
        memory=4.0 * TOKENS * DIM * (10 * num_adapters + 10),
    )


def _variants(load: Load, num_adapters: int, backward: bool) -> Mapping[str, Call]:
    torch.manual_seed(0)
    kernels = load("core_gates.ops").kernels
    adapters = [
        load("core_gates.adapters.low_rank").LowRank(
            torch.randn(RANK, DIM) / DIM**0.5, torch.randn(DIM, RANK) / RANK**0.5, 0.5
        )
        for _ in range(num_adapters)
    ]
    linear = nn.Linear(DIM, DIM).requires_grad_(False)
    module = load("core_gates.adapters.gated_lora").GatedLoraLinear(linear, adapters)
    for parameter in module.gate.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(TOKENS, DIM, requires_grad=backward)

    def published(x: Tensor) -> Tensor:
        return module.gate(linear(x), module.adapter_outputs(x))

    layers: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
        "linear": (linear, "reference"),
        "reference": (module, "reference"),
        "compile": (module, "compile"),
        "cpp": (module, "cpp"),
        "published gate": (published, "reference"),
    }
    if is_installed():
        frozen = active_adapters(linear, adapters).requires_grad_(False)
        layers["peft, without gate"] = (frozen, "reference")
    parameters = list(module.gate.parameters())

    def variant(layer: Callable[[Tensor], Tensor], mode: str) -> Call:
        def call() -> object:
            with kernels(mode), torch.set_grad_enabled(backward):
                out = layer(x)
                if not backward:
                    return out
                return torch.autograd.grad(out.sum(), (x, *parameters), allow_unused=True)

        return call

    return {name: variant(layer, mode) for name, (layer, mode) in layers.items()}
