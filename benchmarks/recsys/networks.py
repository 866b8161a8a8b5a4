"""HoME at two sizes, against its own matmuls and against a loop over its parts."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.recsys.looped import LoopedHome
from benchmarks.recsys.products import alone, products_of
from benchmarks.registry import Call, Comparison, Load

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
