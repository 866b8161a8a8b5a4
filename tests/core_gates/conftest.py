import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from core_gates.errors import GatesError
from core_gates.moe import experts
from core_gates.ops import _native, kernels
from core_gates.ops.grouped_linear import segments

GOLDEN = Path(__file__).parents[1] / "golden" / "moe_gates"


@pytest.fixture
def golden():
    """``golden(name)``: the arrays of a file of golden vectors as tensors; strings are left out."""

    def load(name):
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            return {
                key: torch.from_numpy(arrays[key])
                for key in arrays
                if arrays[key].dtype.kind != "U"
            }

    return load


@pytest.fixture
def inputs():
    """``inputs(shape, dtype, count=2)``: seeded tensors that require gradients."""

    def make(shape, dtype=torch.float32, count=2):
        generator = torch.Generator().manual_seed(0)
        return tuple(
            torch.randn(shape, generator=generator, dtype=torch.float64)
            .mul(2)
            .to(dtype)
            .requires_grad_()
            for _ in range(count)
        )

    return make


@pytest.fixture(scope="session")
def compiler_tables():
    """Let the compiler list the functions of torch before any of them is replaced."""
    torch.compile(lambda x: torch.empty_like(x).copy_(x), backend="eager")(torch.ones(1))


@pytest.fixture
def poisoned_empty(monkeypatch, compiler_tables):
    """Fill what ``torch.empty`` and ``torch.empty_like`` return: unwritten elements show."""

    def poisoned(allocate):
        def filled(*args, **kwargs):
            out = allocate(*args, **kwargs)
            if out.is_floating_point():
                return out.fill_(torch.nan)
            return out if out.dtype == torch.bool else out.fill_(torch.iinfo(out.dtype).max)

        return filled

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


@pytest.fixture
def kernel_device():
    """Where Triton kernels run: interpreted on the CPU, or natively under TRITON_INTERPRET=0."""
    pytest.importorskip("triton")
    if os.environ["TRITON_INTERPRET"] == "1":
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("native kernels need a CUDA device")
    return "cuda"


@pytest.fixture
def cpp():
    """The mode of C++ kernels, compiled into the user's cache as they are elsewhere."""
    try:
        _native.compiler()
    except GatesError:
        pytest.skip("there is no C++ compiler")
    with kernels("cpp"):
        yield


@pytest.fixture
def inductor():
    """For tests of what ``torch.compile`` generates for the CPU, which needs a C++ compiler."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("there is no C++ compiler for Inductor")


@pytest.fixture
def relayouts():
    """Name -> function that gives a tensor other strides and keeps its values."""

    def sliced(t):
        return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]

    return {
        "transposed": lambda t: t.mT.contiguous().mT,
        "sliced": sliced,
        "offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
        "expanded": lambda t: t[:1].expand(t.shape),
    }


@pytest.fixture(params=[True, False], ids=["weight first", "rows first"])
def weight_first(request, monkeypatch):
    """Multiply few rows as one kind of processor does it, then as another."""
    for module in (experts, segments):
        monkeypatch.setattr(module, "WEIGHT_FIRST", request.param)
    return request.param
