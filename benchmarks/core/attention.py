"""Block-sparse and block-max attention against plain attention of the same causality."""

from collections.abc import Callable, Iterator, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.comparison import Call, Comparison, Load, Work

LENGTH, HEAD_DIM = 8192, 64
BASELINE = "causal SDPA"
SHARES = (0.1, 0.25, 0.5, 0.6, 0.75, 0.9, 1.0)
BACKWARD_SHARES = (0.1, 0.5)
DENSE_ABOVE = 0.5
SPARSE_BARS = {128: 1 / 5, 64: 1 / 3.5}
"""Time over that of plain attention with a tenth of the causal area kept, by block size."""
NEVER_SLOWER = 1 / 0.95
BLOCK_MAX_BAR = 1.5


def comparisons() -> Iterator[Comparison]:
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
