"""HoME at two sizes, against its own matmuls and against a loop over its parts."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.comparison import Call, Comparison, Load

_aten: Any = torch.ops.aten
_OPERANDS = {
    _aten.mm.default: 0,
    _aten.mm.out: 0,
    _aten.bmm.default: 0,
    _aten.bmm.out: 0,
    _aten.addmm.default: 1,
    _aten.addmm.out: 1,
    _aten.addmm_.default: 1,
    _aten.baddbmm.default: 1,
    _aten.baddbmm.out: 1,
    _aten.baddbmm_.default: 1,
}
"""Operators that multiply matrices, and the position of the first factor."""

_ONE_DNN = "mkldnn::_linear_pointwise"
"""Operator of oneDNN, whose factors are the first two arguments, the second one transposed."""


class Layout(NamedTuple):
    """Shape and strides of a factor, transposed or not, as the product was called."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Layout":
        """Return the layout of a tensor."""
        return cls(tuple(tensor.shape), tensor.stride())


class Product(NamedTuple):
    """A matmul of two matrices, or of two batches of matrices.

    Attributes:
        left: First factor.
        right: Second factor.
        one_dnn: Whether oneDNN computes it.
    """

    left: Layout
    right: Layout
    one_dnn: bool = False


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.products: list[Product] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _OPERANDS:
            first = _OPERANDS[func]
            self.products.append(Product(Layout.of(args[first]), Layout.of(args[first + 1])))
        elif func.name() == _ONE_DNN:
            left, right = Layout.of(args[0]), Layout.of(args[1].mT)
            self.products.append(Product(left, right, one_dnn=True))
        return func(*args, **(kwargs or {}))


def products_of(call: Callable[[], object]) -> list[Product]:
    """Return the matmuls of a call in their order, those of its backward pass included."""
    with _Recorder() as recorder:
        call()
    return recorder.products


def alone(products: list[Product]) -> Callable[[], object]:
    """Return a call of nothing but these products, with factors in memory of the same layout.

    Products of one layout share their memory, which is warmer than that of a network: what they
    take is rather less than what they take within the call.
    """
    memory: dict[tuple[Layout, int], Tensor] = {}

    def factor(layout: Layout, side: int) -> Tensor:
        if (layout, side) not in memory:
            steps = zip(layout.shape, layout.strides, strict=True)
            size = 1 + sum((length - 1) * step for length, step in steps)
            flat = torch.rand(max(size, 1))
            memory[layout, side] = flat.as_strided(layout.shape, layout.strides)
        return memory[layout, side]

    results: dict[tuple[int, ...], Tensor] = {}
    calls: list[Callable[[], object]] = []
    for product in products:
        left, right = factor(product.left, 0), factor(product.right, 1)
        if product.one_dnn:
            options: tuple[Any, ...] = (None, "none", [], "")
            call = partial(torch.ops.mkldnn._linear_pointwise, left, right.mT, *options)
            calls.append(call)
        else:
            shape = (*product.left.shape[:-1], product.right.shape[-1])
            out = results.setdefault(shape, torch.empty(shape))
            multiply = torch.mm if left.ndim == 2 else torch.bmm
            calls.append(partial(multiply, left, right, out=out))

    def run() -> None:
        with torch.no_grad():
            for call in calls:
                call()

    return run


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
        u = [torch.cat([gated, z[-1]], -1) for gated in z[:-1]]
        outputs: list[Tensor] = []
        for e, g in enumerate(self.owner2):
            gate = self.features2[f"g {g}"]
            if self.outputs.count(e) == 1:
                outputs.append(self.experts2[e](gate(u[self.forest.category_of(g)])))
            else:
                stacked = torch.cat([gate(inputs) for inputs in u])
                outputs += self.experts2[e](stacked).chunk(len(u))
        logits = []
        for t, task in enumerate(self.forest.task_names):
            h = self.mixtures2[t](u[self.forest.category_of(task)], outputs)
            logits.append(self.towers[t](h))
        return torch.cat([logits[t] for t in self.order], 1)


class Gates(nn.Module):
    """A gate over the experts that it sees, and a self gate over some of them."""

    def __init__(self, seen: list[int], self_experts: list[int], dim: int) -> None:
        super().__init__()
        self.seen, self.own = seen, self_experts
        self.gate = nn.Linear(dim, len(seen))
        self.self_gate = nn.Linear(dim, len(self_experts))

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
    seen, self_masks = (table.tolist() for table in mixture.tables)
    start, made = 0, []
    for row, self_row in zip(seen, self_masks, strict=True):
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


PRODUCTS, OURS, CPP, LOOP = "own products", "HoME", "HoME, C++", "loop over modules"
MODES = {OURS: "reference", CPP: "cpp"}
FORWARD, TRAINING = "forward", "forward+backward"


class Size(NamedTuple):
    """Sizes of a network and its batch.

    Attributes:
        inputs: Inputs of a row.
        tasks: Number of tasks, in two categories.
        rows: Rows of a batch.
        options: Those of HoME.
        loop: Lowest speed over that of a loop.
    """

    inputs: int
    tasks: int
    rows: int
    options: Mapping[str, Any]
    loop: float


SIZES = {
    "3.2 M weights": Size(
        464,
        12,
        4096,
        {"dim": 128, "hidden_dims": (256,), "rank": 32, "tower_dims": (64,)},
        1.15,
    ),
    "tiny": Size(
        64, 14, 1024, {"dim": 32, "hidden_dims": (64,), "rank": 8, "tower_dims": (32,)}, 2.0
    ),
}
SHARES = {FORWARD: 0.75, TRAINING: 0.80}
"""Fraction of a call that its own products may at least take, at the larger size."""


def comparisons() -> Iterator[Comparison]:
    """HoME against its matmuls and against a loop of networks; on one CPU thread."""
    for size in SIZES:
        for work in SHARES:
            for variant in MODES:
                yield against_products(size, work, variant)
            yield against_loop(size, work)


def against_products(size: str, work: str, variant: str) -> Comparison:
    """Return HoME and its own matmuls alone, as the mode of a variant computes them.

    The bars are those of the default mode: in C++ the matmuls take half as long on processors where
    oneDNN computes them, and everything else twice the share.
    """
    sizes = SIZES[size]

    def build(load: Load) -> Mapping[str, Call]:
        call = _calls(load, sizes, work)[0][variant]
        return {PRODUCTS: alone(products_of(call)), variant: call}

    has_bar = size == "3.2 M weights" and variant == OURS
    mode = "in C++, " if variant == CPP else ""
    return Comparison(
        name=f"HoME of {size}, {work}, {mode}against its own products",
        op="home",
        build=build,
        baseline=PRODUCTS,
        bars={variant: 1 / SHARES[work]} if has_bar else {},
        unit="row",
        units=dict.fromkeys((PRODUCTS, variant), float(sizes.rows)),
        memory=2.0e9,
    )


def against_loop(size: str, work: str) -> Comparison:
    """Return HoME and a loop over modules with the same weights."""
    sizes = SIZES[size]

    def build(load: Load) -> Mapping[str, Call]:
        calls, loop = _calls(load, sizes, work)
        return {LOOP: loop, OURS: calls[OURS], CPP: calls[CPP]}

    return Comparison(
        name=f"HoME of {size}, {work}, against a loop",
        op="home",
        build=build,
        baseline=LOOP,
        bars={CPP: 1 / sizes.loop},
        unit="row",
        units=dict.fromkeys((LOOP, OURS, CPP), float(sizes.rows)),
        memory=2.0e9,
    )


def _calls(load: Load, size: Size, work: str) -> tuple[dict[str, Call], Call]:
    """Return HoME by mode, and the loop."""
    kernels = load("core_gates.ops").kernels
    home = home_of(load, size)
    loop = LoopedHome(home)
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(size.rows, size.inputs, generator=generator)
    plain = _call(home, v, size.tasks, work)

    def in_mode(mode: str) -> Call:
        def call() -> object:
            with kernels(mode):
                return plain()

        return call

    calls = {variant: in_mode(mode) for variant, mode in MODES.items()}
    return calls, _call(loop, v, size.tasks, work)


def home_of(load: Load, size: Size) -> Any:
    """Return a HoME whose feature gates are open."""
    task = load("recsys.schema").Task
    half = size.tasks // 2
    tasks = [task(f"t{t}", category="ab"[t >= half]) for t in range(size.tasks)]
    torch.manual_seed(0)
    home = load("recsys.models.home").HoME(size.inputs, tasks, **size.options)
    with torch.no_grad():
        for parameter in home.parameters():  # feature gates start closed
            parameter.add_(0.02 * torch.randn_like(parameter))
    return home


def _call(network: nn.Module, v: Tensor, num_tasks: int, work: str) -> Callable[[], object]:
    if work == FORWARD:

        def forward() -> object:
            network.eval()
            with torch.no_grad():
                return network(v)

        return forward
    inputs = [v.clone().requires_grad_(), *network.parameters()]
    grad = torch.randn(len(v), num_tasks, generator=torch.Generator().manual_seed(2))

    def training() -> object:
        network.train()
        return torch.autograd.grad(network(inputs[0]), inputs, grad)

    return training
