import pytest
import torch
from torch import nn

from harness.planning import count_weights, count_work

IN, HIDDEN, OUT = 24, 40, 3


class Ranked(nn.Module):
    """A table of 1000 rows, four looked up per row, and two layers."""

    def __init__(self, device="meta"):
        super().__init__()
        self.table = nn.Embedding(1000, IN // 4, sparse=True, device=device)
        self.first = nn.Linear(IN, HIDDEN, device=device)
        self.last = nn.Linear(HIDDEN, OUT, device=device)

    def forward(self, ids):
        return self.last(self.first(self.table(ids).flatten(1)).relu())


def work(module, device="meta"):
    def forward(rows):
        return module(torch.zeros(rows, 4, dtype=torch.int64, device=device))

    return count_work(forward, parameters=module.parameters())


def test_weights_of_tables_are_counted_apart_and_shared_ones_once():
    module = Ranked()
    module.again = module.first
    dense = (IN + 1) * HIDDEN + (HIDDEN + 1) * OUT
    assert count_weights(module) == (dense + 1000 * IN // 4, 0)
    assert count_weights(module, [module.table.weight]) == (dense, 1000 * IN // 4)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_operations_and_activations_have_their_closed_form(device):
    found = work(Ranked(device), device)
    products = 2 * (IN * HIDDEN + HIDDEN * OUT)
    assert (found.forward, found.training) == (products, 3 * products)
    # ids for the table, the input of the first layer, the hidden features once
    assert found.saved == 8 * 4 + 4 * IN + 4 * HIDDEN


def test_inputs_without_gradient_spare_a_third_of_their_layer():
    layer = nn.Linear(IN, OUT, device="meta")
    found = count_work(lambda n: layer(torch.zeros(n, IN, device="meta")))
    assert found.training == 2 * found.forward == 4 * IN * OUT


def test_constants_do_not_count():
    layer = nn.Linear(IN, OUT, device="meta")
    square = nn.Parameter(torch.zeros(100, 100, device="meta"))

    def forward(rows):
        constant = (square @ square).sum()
        return layer(torch.zeros(rows, IN, device="meta")) + constant

    assert count_work(forward).forward == 2 * IN * OUT
