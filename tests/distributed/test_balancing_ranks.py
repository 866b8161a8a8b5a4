"""Tasks balanced on two processes against one: weights, what they are made from, the network."""

import pytest
import torch
from torch import nn

from recsys.balancing import balancer
from recsys.schema import Task
from recsys.validation import MultiTaskLoss

TASKS = [Task("click"), Task("like"), Task("buy")]
WAYS = ("uncertainty",)
STEPS = 7


class Balanced(nn.Module):
    """Two linear layers and the loss of a batch, as a wrapped module sees it."""

    def __init__(self, name):
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.towers = nn.Linear(6, 5).double(), nn.Linear(5, 3).double()
        self.balancer, self.loss = balancer(name, 3), MultiTaskLoss(TASKS)

    def forward(self, x, labels, mask):
        logits = self.towers(self.shared(x).tanh())
        losses, counted = self.loss.counted(logits, labels, mask, torch.ones(len(x)).double())
        last = [(self.shared.weight, slice(None))]
        return self.balancer(losses, last, counted)


def train(parallel, name):
    """Some steps on batches whose second half, the rows of rank 1, never has the second task."""
    module = Balanced(name)
    model = parallel(module)
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    for step in range(STEPS):
        g = torch.Generator().manual_seed(step)
        x = torch.randn(16, 6, generator=g).double()
        labels = (torch.rand(16, 3, generator=g) < 0.4).double()
        mask = torch.rand(16, 3, generator=g) < 0.8
        mask[8:, 1] = False
        optimizer.zero_grad()
        model(*map(parallel.share, (x, labels, mask))).backward()
        optimizer.step()
    state = {name: value.clone() for name, value in module.balancer.state_dict().items()}
    return {"state": state, "weights": module.balancer.weights, "all": list(module.parameters())}


def train_all(parallel):
    """All ways, in one start of the processes, which takes longer than their work."""
    return {name: train(parallel, name) for name in WAYS}


@pytest.mark.fault("video R3")
@pytest.mark.fault("video R4")
def test_two_ranks_equal_one_process(two_ranks):
    found = two_ranks(train_all, tolerance=1e-6)
    for result in found.values():
        assert (result["weights"] - 1).abs().max() > 1e-3
