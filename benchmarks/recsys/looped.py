"""HoME as a loop over modules: the mathematics of ``recsys.models.home``, a module per part."""

import itertools
from typing import Any

import torch
from torch import Tensor, nn


class FeatureGate(nn.Module):
    """A low-rank feature gate."""

    def __init__(self, dim: int, rank: int, num_maps: int) -> None:
        super().__init__()
        self.mixer = nn.Linear(dim, num_maps)
        self.down = nn.ModuleList(nn.Linear(dim, rank, bias=False) for _ in range(num_maps))
        self.up = nn.ModuleList(nn.Linear(rank, dim, bias=False) for _ in range(num_maps))

    def forward(self, v: Tensor) -> Tensor:
        """Return the input times its factors (N, D)."""
        mixture = self.mixer(v).softmax(-1)
        factor = torch.zeros_like(v)
        for m, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            factor = factor + mixture[:, m : m + 1] * (2 * up(down(v)).sigmoid())
        return v * factor


class Expert(nn.Sequential):
    """Layers of matmul, batch normalization and Swish."""

    def __init__(self, dims: list[int]) -> None:
        pairs = itertools.pairwise(dims)
        layers = [(nn.Linear(*pair), nn.BatchNorm1d(pair[1]), nn.SiLU()) for pair in pairs]
        super().__init__(*(layer for row in layers for layer in row))


class LoopedHome(nn.Module):
    """A HoME with the weights of another, whose parts it runs one after the other.

    Args:
        home: Network of ``recsys.models.home``.
    """

    def __init__(self, home: Any) -> None:
        super().__init__()
        self.forest = forest = home.forest
        self.owner1, self.owner2 = home.meta_layer.owner, home.task_layer.owner
        groups1, groups2 = forest.meta_groups, forest.task_groups
        self.features1 = nn.ModuleDict(
            {f"g {g}": _feature_gate(home.meta_layer, i) for i, g in enumerate(groups1)}
        )
        self.features2 = nn.ModuleDict(
            {f"g {g}": _feature_gate(home.task_layer, i) for i, g in enumerate(groups2)}
        )
        self.experts1 = nn.ModuleList(_expert(home.meta_layer, e) for e in range(len(self.owner1)))
        self.experts2 = nn.ModuleList(_expert(home.task_layer, e) for e in range(len(self.owner2)))
        self.mixtures1 = _gates(home.meta_layer.mixture)
        self.mixtures2 = _gates(home.task_layer.mixture)
        self.towers = nn.ModuleList(_tower(home.towers, t) for t in range(len(home.tasks)))
        self.order = home._order
        self.outputs = home.task_layer.experts.expert_of_output

    def forward(self, v: Tensor) -> Tensor:
        """Return the logits (B, T)."""
        inputs = {g: self.features1[f"g {g}"](v) for g in self.forest.meta_groups}
        pairs = zip(self.experts1, self.owner1, strict=True)
        experts = [expert(inputs[g]) for expert, g in pairs]
        z = [gates(v, experts) for gates in self.mixtures1]
        u = [torch.cat([one, z[-1]], -1) for one in z[:-1]]
        found: list[Tensor] = []
        for e, g in enumerate(self.owner2):
            gate = self.features2[f"g {g}"]
            if self.outputs.count(e) == 1:
                found.append(self.experts2[e](gate(u[self.forest.category_of(g)])))
            else:
                stacked = torch.cat([gate(one) for one in u])
                found += self.experts2[e](stacked).chunk(len(u))
        logits = []
        for t, task in enumerate(self.forest.task_names):
            h = self.mixtures2[t](u[self.forest.category_of(task)], found)
            logits.append(self.towers[t](h))
        return torch.cat([logits[t] for t in self.order], 1)


class Gates(nn.Module):
    """A gate over the experts that it sees, and a self gate over some of them."""

    def __init__(self, seen: list[int], own: list[int], dim: int) -> None:
        super().__init__()
        self.seen, self.own = seen, own
        self.gate = nn.Linear(dim, len(seen))
        self.self_gate = nn.Linear(dim, len(own))

    def forward(self, x: Tensor, experts: list[Tensor]) -> Tensor:
        """Return the mixture (N, D)."""
        weights = self.gate(x).softmax(-1)
        logits = self.self_gate(x)
        selfs = logits.sigmoid() if len(self.own) == 1 else logits.softmax(-1)
        stacked = torch.stack([experts[e] for e in self.seen], 1)
        mixed = (weights.unsqueeze(-1) * stacked).sum(1)
        stacked = torch.stack([experts[e] for e in self.own], 1)
        return mixed + (selfs.unsqueeze(-1) * stacked).sum(1)


@torch.no_grad()
def _feature_gate(layer: Any, g: int) -> FeatureGate:
    gates = layer.feature_gates
    made = FeatureGate(gates.dim, gates.rank, gates.num_maps)
    made.mixer.weight.copy_(gates.mixer_weight[g])
    made.mixer.bias.copy_(gates.mixer_bias[g])
    for m, (down, up) in enumerate(zip(made.down, made.up, strict=True)):
        down.weight.copy_(gates.down[g, m])  # type: ignore[operator, union-attr]
        up.weight.copy_(gates.up[g, m].mT)  # type: ignore[operator, union-attr]
    return made


@torch.no_grad()
def _expert(layer: Any, e: int) -> Expert:
    experts = layer.experts
    made = Expert([experts.dim, *experts.hidden_dims])
    for j, norm in enumerate(experts.norms):
        linear, batch_norm = made[3 * j], made[3 * j + 1]
        linear.weight.copy_(experts.weights[j][e])  # type: ignore[operator]
        linear.bias.copy_(experts.biases[j][e])  # type: ignore[operator]
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(batch_norm, name).copy_(getattr(norm, name)[e])
    return made


@torch.no_grad()
def _gates(mixture: Any) -> nn.ModuleList:
    seen, own = (table.tolist() for table in mixture.tables)
    start, made = 0, []
    for row, self_row in zip(seen, own, strict=True):
        experts = [[e for e, visible in enumerate(r) if visible] for r in (row, self_row)]
        made.append(Gates(experts[0], experts[1], mixture.dim))
    for name in ("gate", "self_gate"):
        for gates in made:
            linear = getattr(gates, name)
            rows = slice(start, start := start + linear.out_features)
            linear.weight.copy_(mixture.weight[rows])
            linear.bias.copy_(mixture.bias[rows])
    return nn.ModuleList(made)


@torch.no_grad()
def _tower(towers: Any, t: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for weight, bias in zip(towers.hidden.weights, towers.hidden.biases, strict=True):
        linear = nn.Linear(weight.shape[2], weight.shape[1])
        linear.weight.copy_(weight[t])
        linear.bias.copy_(bias[t])
        layers += [linear, nn.SiLU()]
    last = nn.Linear(towers.weight.shape[1], 1)
    last.weight.copy_(towers.weight[t : t + 1])
    last.bias.copy_(towers.bias[t : t + 1])
    return nn.Sequential(*layers, last)
