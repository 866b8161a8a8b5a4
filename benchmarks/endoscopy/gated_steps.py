"""Steps of gradient routing, and the seam of a gated transformer, against plain ones."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.comparison import Call, Comparison, Load, Work

PLAIN = "plain step"
JOINT_BAR = 1.05


class Case(NamedTuple):
    """A network and how long its step may take.

    Attributes:
        preset: Function of `endoscopy.models`.
        stream: What it reads.
        channels: Channels of the stream.
        size: Pixels of a side.
        batch: Frames of a step.
        bar: Highest time of a dual step over a plain one.
    """

    preset: str
    stream: str
    channels: int
    size: int
    batch: int
    bar: float


CASES = (
    Case("tiny_resnet", "rgb_mask", 4, 64, 32, 1.75),
    Case("tiny_vit", "rgb_mask", 4, 64, 32, 1.75),
    Case("fsg_vit_tiny_patch16_384", "rgb", 3, 384, 2, 1.85),
)


def comparisons() -> Iterator[Comparison]:
    """The seam of a block, then training steps; on one CPU thread."""
    yield gated_residual_norm()
    yield from map(gradient_routing, CASES)


def gradient_routing(case: Case) -> Comparison:
    """Return one step of the weights and gates in every mode.

    The plain step is a loop without gradient routing: one forward and backward pass and one AdamW
    over all parameters of the gated network.
    """

    def build(load: Load) -> Mapping[str, Call]:
        steps = {PLAIN: _plain(_Training(load, case))}
        for mode in ("joint", "dual", "reference"):
            steps[mode] = _routed(_Training(load, case), mode)
        steps["plain step without gates"] = _plain(_Training(load, case, gates="none"))
        return steps

    return Comparison(
        name=f"training step of {case.preset}, batch {case.batch}x{case.size}x{case.size}",
        op="gradient_routing",
        build=build,
        baseline=PLAIN,
        bars={"dual": case.bar, "joint": JOINT_BAR},
    )


class _Training:
    """A fresh network with a batch; ``load`` imports it, of this or another revision."""

    def __init__(self, load: Load, case: Case, gates: str = "fsg") -> None:
        torch.manual_seed(0)
        self.load = load
        preset = getattr(load("endoscopy.models"), case.preset)
        self.model: Any = preset((case.stream,), gates=gates)
        images = torch.randn(case.batch, case.channels, case.size, case.size)
        self.streams = {case.stream: images}
        self.mm = torch.linspace(2, 20, case.batch)
        self.target = load("endoscopy.training.targets").LogSize()

    def loss(self, model: Callable[..., Tensor]) -> Tensor:
        return cast(Tensor, self.target.loss(model(self.streams), self.mm))


def _plain(training: _Training) -> Call:
    optimizer = torch.optim.AdamW(training.model.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        training.loss(training.model).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _routed(training: _Training, mode: str) -> Call:
    kinds = training.load("endoscopy.models.trunks")
    weights = torch.optim.AdamW(kinds.weight_parameters(training.model).values(), 1e-3)
    gates = torch.optim.AdamW(kinds.gate_parameters(training.model).values(), 1e-2, weight_decay=0)
    routing = training.load("core_gates.training.gradient_routing").GradientRouting(
        weights, gates, mode=mode
    )
    return lambda: routing.step(training.model, training.loss)


SHAPE = (32, 577, 192)
"""Batch, tokens and features of ViT-Ti/16 at 384 pixels."""

EAGER, OURS = "eager", "gated_residual_norm"
COMPILED, CPP = f"{OURS}, compiled", f"{OURS}, C++"
BAR = 1 / 1.5
EPS = 1e-6
Operation = Callable[..., tuple[Tensor, Tensor]]


def gated_residual_norm(shape: tuple[int, int, int] = SHAPE) -> Comparison:
    """Return forward and backward; the op in its fastest form may take two thirds of eager."""

    def build(load: Load) -> Mapping[str, Call]:
        op = load("core_gates.ops.gated_residual_norm.op").gated_residual_norm
        kernels = load("core_gates.ops").kernels
        generator = torch.Generator().manual_seed(0)
        x, branch, *grads = (torch.randn(shape, generator=generator) for _ in range(4))
        vectors = [torch.rand(shape[-1], generator=generator) for _ in range(3)]
        inputs = [tensor.requires_grad_() for tensor in (x, branch, *vectors)]

        def in_mode(mode: str) -> Operation:
            def call(*arguments: Tensor) -> tuple[Tensor, Tensor]:
                with kernels(mode):
                    return cast(tuple[Tensor, Tensor], op(*arguments, EPS))

            return call

        def gradients(function: Operation) -> Call:
            return lambda: torch.autograd.grad(function(*inputs), inputs, grads)

        return {
            EAGER: gradients(_eager),
            OURS: gradients(in_mode("reference")),
            COMPILED: gradients(in_mode("compile")),
            CPP: gradients(in_mode("cpp")),
        }

    return Comparison(
        name=f"gate + residual + LayerNorm forward+backward {'x'.join(map(str, shape))}",
        op="gated_residual_norm",
        build=build,
        baseline=EAGER,
        bars={CPP: BAR},
        work=Work(bytes=4.0 * math.prod(shape) * 10),  # reads 2 and 4 arrays, writes 2 and 2
        first_calls=(COMPILED, CPP),
    )


def _eager(
    x: Tensor, branch: Tensor, scores: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    total = x + scores * branch
    return total, F.layer_norm(total, total.shape[-1:], weight, bias, EPS)
