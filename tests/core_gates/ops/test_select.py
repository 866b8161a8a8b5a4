import runpy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from core_gates import MissingExtraError
from core_gates.ops import _select, kernels, silu_gate
from core_gates.ops._select import definition, use_kernel
from core_gates.ops.elementwise import _silu_gate

ON_CUDA = SimpleNamespace(is_cuda=True, dtype=torch.float16)
DOUBLE_ON_CUDA = SimpleNamespace(is_cuda=True, dtype=torch.float64)


def test_the_definition_is_the_default():
    assert not use_kernel(ON_CUDA)
    assert definition(_silu_gate) is _silu_gate


def test_triton_is_used_for_cuda_tensors_that_are_not_double(monkeypatch):
    monkeypatch.setattr(_select, "_HAS_TRITON", True)
    with kernels("triton"):
        assert use_kernel(ON_CUDA, ON_CUDA)
        assert not use_kernel(ON_CUDA, DOUBLE_ON_CUDA)
        assert not use_kernel(ON_CUDA, torch.zeros(1))
    assert not use_kernel(ON_CUDA)


def test_asking_for_triton_without_triton_names_the_extra(monkeypatch):
    monkeypatch.setattr(_select, "_HAS_TRITON", False)
    line = r"pip install 'gatesuite\[gpu\]'"
    with kernels("triton"), pytest.raises(MissingExtraError, match=line):
        use_kernel(ON_CUDA)


def test_modes_nest_and_survive_errors(refuses):
    def fail_in_compile_mode():
        with kernels("compile"):
            raise RuntimeError(_select._mode)

    with kernels("triton"):
        refuses(RuntimeError, ("compile", lambda: fail_in_compile_mode()))
        assert _select._mode == "triton"
    assert _select._mode == "reference"


def test_unknown_mode_is_refused_and_changes_nothing():
    with (
        pytest.raises(ValueError, match=r"mode is 'cuda'; choose one of .*, triton, cpp"),
        kernels("cuda"),
    ):
        pytest.fail("the block must not run")
    assert _select._mode == "reference"


@pytest.mark.parametrize(
    ("value", "mode", "expected"),
    [
        ("compile", "compile", nullcontext()),
        ("", "reference", nullcontext()),
        (
            "fast",
            None,
            pytest.raises(
                ValueError,
                match=r"CORE_GATES_KERNELS is 'fast'; choose one"
                " of reference, compile, triton, cpp",
            ),
        ),
    ],
)
def test_environment_sets_the_default(value, mode, expected, monkeypatch):
    monkeypatch.setenv("CORE_GATES_KERNELS", value)
    with expected:
        assert runpy.run_path(_select.__file__)["_mode"] == mode


def test_ops_are_traced_without_graph_breaks_and_follow_the_mode():
    graphs = []

    def record(graph_module, _):
        graphs.append(str(graph_module.graph))
        return graph_module.forward

    traced = torch.compile(lambda a, g: silu_gate(a, g)[0], backend=record, fullgraph=True)
    a, g = torch.randn(2, 3, 4).unbind()
    expected = silu_gate(a, g)[0]
    assert_close(traced(a, g), expected)
    with kernels("compile"):
        assert_close(traced(a, g), expected)
    assert len(graphs) == 2
    assert all("sigmoid" in graph for graph in graphs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # Inductor's own imports
def test_compile_mode_matches_the_definition_and_is_cached(inputs, inductor):
    a, g, grad_product, grad_gate = inputs((3, 63), count=4)
    with kernels("compile"):
        compiled = definition(_silu_gate)
        assert definition(_silu_gate) is compiled is not _silu_gate
        outputs = silu_gate(a, g)
    gradients = torch.autograd.grad(outputs, (a, g), (grad_product, grad_gate))
    expected = silu_gate(a, g)
    assert_close(outputs, expected)
    assert_close(gradients, torch.autograd.grad(expected, (a, g), (grad_product, grad_gate)))
