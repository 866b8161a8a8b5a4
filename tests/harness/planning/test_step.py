import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from harness.step_cost import MemoryTrace, cost_of_step

B, D = 64, 128  # 32 KiB of a float32 (B, D)
SIZE = 4 * B * D


class Layers(nn.Module):
    """Linear layers with a sine after each."""

    def __init__(self, depth, device, *, recompute=False):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(D, D, bias=False, device=device) for _ in range(depth)
        )
        self.recompute = recompute

    def forward(self, x):
        for layer in self.layers:
            step = lambda x, layer=layer: layer(x).sin()  # noqa: E731
            x = checkpoint(step, x, use_reentrant=False) if self.recompute else step(x)
        return x.sum()


def cost(depth=3, device="meta", rows=B, **options):
    module = Layers(depth, device, **options)
    x = torch.zeros(rows, D, device=device)
    return cost_of_step(lambda: module(x), module.parameters(), [x])


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_closed_forms(device):
    found = cost(device=device)
    matmul = 2 * B * D * D
    assert (found.forward, found.training) == (3 * matmul, 3 * matmul + 3 * matmul + 2 * matmul)
    assert found.inference == 3 * SIZE  # input and output of a layer, and its sine
    kept = 6 * SIZE  # of each layer the input of the sine, and its output for the next
    assert kept <= found.activations <= kept + 3 * SIZE
    assert found.with_gradients >= found.activations


def test_computing_again_costs_arithmetic_and_saves_memory():
    plain, again = cost(depth=8), cost(depth=8, recompute=True)
    assert (again.forward, again.training) == (plain.forward, plain.training + plain.forward)
    assert again.activations < 0.75 * plain.activations


def test_gradients_count_once_they_are_there():
    weight = 4 * D * D
    few, many = cost(depth=12, rows=1), cost(depth=12)
    assert 12 * weight <= few.with_gradients <= 13 * weight  # all of them, at the end
    assert few.activations < weight
    assert many.with_gradients < many.activations + 3 * weight  # none at the fullest moment


def test_memory_is_followed_until_it_is_freed():
    with MemoryTrace([]) as trace:
        first = torch.zeros(100, device="meta")
        second = first + 1
        number = trace.number(second)
        view = second[10:]
        del first
        third = torch.zeros(50, device="meta")
    assert (trace.peak(), trace.peak({number}), trace.number(view)) == (800, 400, number)
    del second
    assert trace.number(view) == number  # the view keeps it
    del view
    assert trace.number(third) != number
    known = torch.zeros(100, device="meta")
    with MemoryTrace([known]) as trace:
        known.add_(1)
    assert trace.peak() == 0


def test_gradients_of_weights_are_left_as_none():
    module = Layers(2, "cpu")
    x = torch.randn(B, D)
    module(x).backward()
    found = cost_of_step(lambda: module(x), module.parameters(), [x])
    assert all(weight.grad is None for weight in module.parameters())
    assert found == cost(depth=2, device="cpu")


@pytest.mark.parametrize("causal", [False, True])
def test_attention_keeps_no_probabilities(causal):
    """What a fused kernel keeps: its output, and per query the logarithm of the sum (fp32)."""
    shape = batch, heads, length, dim = 2, 4, 256, 16
    rows = [torch.zeros(shape, device="meta", dtype=torch.bfloat16) for _ in range(3)]
    for row in rows:
        row.requires_grad_()
    found = cost_of_step(
        lambda: F.scaled_dot_product_attention(*rows, is_causal=causal).sum(), rows
    )
    output, sums = 2 * batch * heads * length * dim, 4 * batch * heads * length
    seeds = 64  # of the random numbers of dropout, and scalars
    assert output + sums <= found.inference <= output + sums + seeds
    assert output + sums <= found.activations <= 2 * output + sums + seeds
    matmul = 2 * batch * heads * length**2 * dim
    assert (found.forward, found.training) == (2 * matmul, 7 * matmul)  # the scores once again
    mask = torch.zeros(length, length, device="meta", dtype=torch.bfloat16)
    masked = cost_of_step(lambda: F.scaled_dot_product_attention(*rows, mask).sum(), rows, [mask])
    assert masked.training == 6 * matmul  # of matmuls, as PyTorch has it
