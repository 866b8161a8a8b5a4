"""A net with gates, its training by gradient routing, and what changed in it."""

import torch
from torch import nn
from torch.nn import functional as F

from core_gates import FeatureSelectionGate, GradientRouting

MODES = ["dual", "every_k", "joint", "off", "reference"]


class Net(nn.Module):
    """A gated net with everything that a second pass could disturb."""

    def __init__(self, dropout=0.0, norm=nn.LayerNorm):
        super().__init__()
        self.first, self.norm, self.gate = nn.Linear(3, 8), norm(8), FeatureSelectionGate(8)
        self.drop, self.last = nn.Dropout(dropout), nn.Linear(8, 2)
        self.last_gate = FeatureSelectionGate(2)

    def forward(self, x):
        return self.last_gate(self.last(self.drop(self.gate(self.norm(self.first(x)).relu()))))


def build(
    mode="dual", *, make=Net, seed=0, dtype=torch.float32, kind=torch.optim.Adam, lr=0.01, **options
):
    """A model and its routing; gates learn with their own rate."""
    torch.manual_seed(seed)
    model = make().to(dtype)
    gates = [p for n, p in model.named_parameters() if "gate" in n]
    weights = [p for n, p in model.named_parameters() if "gate" not in n]
    return model, GradientRouting(kind(weights, lr=lr), kind(gates, lr=0.05), mode=mode, **options)


def batch(step=0, n=8, dtype=torch.float32):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x.to(dtype), torch.stack([x.sum(-1), x.prod(-1)], -1).to(dtype)


def loss_on(x, target):
    return lambda model: F.mse_loss(model(x), target)


def train(model, routing, steps=3, dtype=torch.float32):
    return [routing.step(model, loss_on(*batch(t, dtype=dtype))) for t in range(steps)]


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


GATES = {"gate.logits", "last_gate.logits"}

WEIGHTS = {"first.weight", "first.bias", "norm.weight", "norm.bias", "last.weight", "last.bias"}
