"""The op: against the stacked formula and golden vectors, then blocks, memory and kernels."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.nn import functional as F
from torch.testing import assert_close

from core_gates.adapters.lora_gate import LoraGate
from core_gates.ops import kernels
from core_gates.ops.gated_lora import native, op, reference, streamed
from core_gates.ops.gated_lora.op import gated_lora

GOLDEN = Path(__file__).parents[2] / "golden" / "autolora"
VARIANTS = ["full", "no_base", "no_cross", "no_lora"]
CASES = [(0, 8, [2]), (1, 5, [1]), (3, 63, [4, 1, 2]), (70, 200, [3, 17])]
OF_DTYPES = [  # the largest in half precision once a day
    pytest.param(
        *case, dtype, marks=[pytest.mark.slow] * (case[0] == 70 and dtype != torch.float32)
    )
    for case in CASES
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
]
NAMES = ("base", "hidden", "up", "coefficients")


def operands(tokens, dim, ranks, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    rank = sum(ranks)
    shapes = [(tokens, dim), (tokens, rank), (rank, dim), (5, dim)]
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for s in shapes
    ]


def stacked(base, hidden, up, coefficients, ranks, eps=1e-5):
    """The formula with every output of an adapter in full, statistics by LayerNorm."""
    constant, slope, lora, cross, out = coefficients
    factors = zip(hidden.split(ranks, -1), up.split(ranks), strict=True)
    loras = torch.stack([h @ u for h, u in factors])
    n, z = (F.layer_norm(t, t.shape[-1:], eps=eps) for t in (base, loras))
    gates = torch.sigmoid(constant + slope * n + (lora + cross * n) * z)
    return base + out * (gates * loras).sum(0)


def gradients(function, tensors, grad, *arguments):
    return torch.autograd.grad(function(*tensors, *arguments), tensors, grad)


@pytest.fixture
def small_blocks(monkeypatch):
    """Four tokens of eight features a block."""
    monkeypatch.setattr(streamed, "_CPU_ELEMENTS", 32)


@pytest.fixture
def kernel(kernel_device):
    from core_gates.ops.gated_lora import kernel

    return kernel


@pytest.mark.parametrize("file", ["gate_a", "gate_b"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_gates_through_the_op(file, variant):
    """Adapters of one-hot hidden activations have any given outputs: the rows of ``up``."""
    with np.load(GOLDEN / f"{file}.npz") as arrays:
        golden = {key: torch.from_numpy(arrays[key]) for key in arrays}
    gate = LoraGate(golden["base"].shape[-1], variant=variant, dtype=torch.float64)
    for name, parameter in gate.named_parameters():
        parameter.data.copy_(golden[f"{variant}.w.{name}"])
    base = golden["base"].clone().requires_grad_()
    up = golden["loras"].flatten(0, 2).requires_grad_()
    tokens, adapters = base.shape[:2].numel(), len(golden["loras"])
    hidden = torch.eye(tokens, dtype=torch.float64).repeat(1, adapters)
    hidden = hidden.view(*base.shape[:2], -1)
    out = gated_lora(base, hidden, up, gate.coefficients(), [tokens] * adapters)
    assert_close(out, golden[f"{variant}.out"], rtol=1e-9, atol=1e-12)
    out.backward(golden["cotangent"])
    assert_close(base.grad, golden[f"{variant}.dbase"], rtol=1e-9, atol=1e-12)
    assert_close(up.grad, golden[f"{variant}.dloras"].flatten(0, 2), rtol=1e-9, atol=1e-12)
    for name, parameter in gate.named_parameters():
        assert_close(parameter.grad, golden[f"{variant}.g.{name}"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("tokens", "dim", "ranks"), CASES)
def test_formula(tokens, dim, ranks):
    tensors = operands(tokens, dim, ranks, torch.float64)
    grad = torch.randn(tokens, dim, dtype=torch.float64)
    assert_close(gated_lora(*tensors, ranks), stacked(*tensors, ranks), rtol=1e-9, atol=1e-12)
    expected = gradients(stacked, tensors, grad, ranks)
    assert_close(gradients(gated_lora, tensors, grad, ranks), expected, rtol=1e-8, atol=1e-11)


def test_statistics_follow_from_the_gram_matrix_in_float32():
    """Wide layers and outputs with a large mean, where E[y²] - E[y]² would cancel."""
    tensors = operands(32, 3072, [16, 16, 16])
    with torch.no_grad():
        tensors[2] += 30
        tensors[3] *= 0.3
    expected = stacked(*(t.double() for t in tensors), [16] * 3)
    assert_close(gated_lora(*tensors, [16] * 3).double(), expected, rtol=1e-5, atol=1e-2)
    mean, rstd = reference.statistics(tensors[1], tensors[2], [16] * 3, 1e-5)
    y = (tensors[1].double().view(32, 3, 1, 16) @ tensors[2].double().view(3, 16, -1)).squeeze(2)
    assert_close(mean.double(), y.mean(-1), rtol=1e-5, atol=1e-4)
    assert_close(rstd.double(), y.var(-1, correction=0).add(1e-5).rsqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("ranks", [[3], [3, 4]])
def test_an_adapter_whose_components_cancel_is_finite(ranks):
    tensors = [t.detach() for t in operands(200, 64, ranks)]
    tensors[2][1:3] = tensors[2][0] * torch.tensor([[3.0], [0.1]])
    tensors[1][:, 0] = -3 * tensors[1][:, 1] - 0.1 * tensors[1][:, 2]
    tensors[1][:, :3] *= 1e4
    assert gated_lora(*tensors, ranks).isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 1e-20])
def test_an_adapter_without_output_has_finite_gradients(scale):
    tensors = operands(3, 8, [2, 2])
    with torch.no_grad():
        tensors[2][:2] *= scale
    for result in gradients(gated_lora, tensors, torch.ones(3, 8), [2, 2]):
        assert result.isfinite().all()


def test_leading_dimensions_and_layouts_are_free(relayouts):
    tensors = [t.detach() for t in operands(12, 8, [2, 3], torch.float64)]
    expected = gated_lora(*tensors, [2, 3])
    base, hidden = (t.view(3, 4, -1) for t in tensors[:2])
    assert_close(gated_lora(base, hidden, *tensors[2:], [2, 3]).view(12, 8), expected)
    for name in ("transposed", "sliced", "offset"):
        assert_close(gated_lora(*map(relayouts[name], tensors), [2, 3]), expected)
    same_tokens = [relayouts["expanded"](t) for t in tensors[:2]]
    assert_close(gated_lora(*same_tokens, *tensors[2:], [2, 3]), expected[:1].expand(12, 8))


@pytest.mark.parametrize("compiling", [False, True])
def test_gradients(compiling, small_blocks):
    def function(*tensors):
        if compiling:
            return torch.ops.core_gates.gated_lora(*tensors, [1, 2], 1e-5, False)
        return gated_lora(*tensors, [1, 2])

    assert gradcheck(function, operands(5, 8, [1, 2], torch.float64))


def test_second_derivatives(small_blocks):
    def function(*tensors):
        return gated_lora(*tensors, [1, 2])

    assert gradgradcheck(function, operands(5, 6, [1, 2], torch.float64))


@pytest.mark.parametrize("tokens", [1, 4, 8, 9])
def test_blocks_change_nothing(tokens, small_blocks):
    tensors = operands(tokens, 8, [2, 3], torch.float64)
    assert streamed.block_size(tensors[0]) == 4
    grad = torch.randn(tokens, 8, dtype=torch.float64)
    assert_close(gated_lora(*tensors, [2, 3]), reference.forward(*tensors, [2, 3], 1e-5))
    expected = reference.backward(grad, *tensors, [2, 3], 1e-5)
    assert_close(gradients(gated_lora, tensors, grad, [2, 3]), expected)


def test_no_tensor_grows_with_the_adapters(small_blocks, largest):
    tokens, dim, adapters = 40, 8, 12
    tensors, saved = operands(tokens, dim, [1] * adapters), []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        largest() as seen,
    ):
        gated_lora(*tensors, [1] * adapters).sum().backward()
    assert seen.elements == tokens * max(dim, adapters)  # the output and the hidden activations
    assert sum(t.numel() for t in saved) == sum(t.numel() for t in tensors)
    with largest() as seen:
        stacked(*tensors, [1] * adapters)
    assert seen.elements == tokens * dim * adapters


def test_half_precision_is_computed_in_float32():
    tensors = operands(5, 40, [2, 3], torch.bfloat16)
    out = gated_lora(*tensors, [2, 3])
    assert_close(out, gated_lora(*(t.float() for t in tensors), [2, 3]).bfloat16(), rtol=0, atol=0)
    grads = gradients(gated_lora, tensors, torch.ones_like(out), [2, 3])
    exact = [t.detach().float().requires_grad_() for t in tensors]
    expected = gradients(gated_lora, exact, torch.ones(5, 40), [2, 3])
    assert [g.dtype for g in grads] == [torch.bfloat16] * 4
    assert_close(grads, tuple(g.bfloat16() for g in expected), rtol=0, atol=0)


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_the_base_can_be_overwritten_where_there_are_no_gradients(tokens, small_blocks):
    base, *others = (t.detach() for t in operands(tokens, 8, [2, 3]))
    expected, before = gated_lora(base, *others, [2, 3]), base.clone()
    with pytest.raises(ValueError, match=r"overwritten under torch.no_grad\(\) only"):
        gated_lora(base, *others, [2, 3], overwrite_base=True)
    with torch.no_grad():
        wide = torch.stack([base, base], -1)[..., 0]
        assert_close(gated_lora(wide, *others, [2, 3], overwrite_base=True), expected)
        assert torch.equal(base, before)
        out = gated_lora(base, *others, [2, 3], overwrite_base=True)
    assert_close(out, expected, rtol=0, atol=0)
    assert out.data_ptr() == base.data_ptr()


@pytest.mark.parametrize("name", NAMES[1:])
def test_shapes_are_checked(name):
    tensors = dict(zip(NAMES, operands(3, 8, [2, 3]), strict=True))
    tensors[name] = tensors[name][..., :-1]
    with pytest.raises(ValueError, match=rf"{name} \(\d, \d\) must have the shape"):
        gated_lora(**tensors, ranks=[2, 3])


@pytest.mark.parametrize("ranks", [[], [5, 0]])
def test_there_must_be_adapters(ranks):
    with pytest.raises(ValueError, match="at least one adapter, each of rank >= 1"):
        gated_lora(*operands(3, 8, [2, 3]), ranks)


@pytest.mark.parametrize(("tokens", "dim", "ranks", "dtype"), OF_DTYPES)
@pytest.mark.ends("shapes are registered alike")
def test_registration(tokens, dim, ranks, dtype):
    arguments = *operands(tokens, dim, ranks, dtype), ranks, 1e-5, False
    opcheck(torch.ops.core_gates.gated_lora.default, arguments)


def test_inside_a_compiled_region_it_is_one_node(small_blocks):
    graphs = []

    def backend(graph, _example):
        graphs.append(graph)
        return graph

    def layer(*tensors):
        return gated_lora(*tensors, [2, 3]) * 2

    tensors = operands(9, 8, [2, 3], torch.float64)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    assert_close(compiled(*tensors), layer(*tensors))
    grad = torch.randn(9, 8, dtype=torch.float64)
    assert_close(gradients(compiled, tensors, grad), gradients(layer, tensors, grad))
    names = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("gated_lora" in name for name in names) == 1
    assert len(names) < 10


def test_mode_compile_compiles_a_block_for_both_passes(monkeypatch, small_blocks):
    from core_gates.ops import _select

    asked = []

    def compiled(function):
        asked.append(function)
        return function

    monkeypatch.setattr(_select, "_compiled", compiled)
    tensors = operands(9, 8, [2, 3])
    with kernels("compile"):
        out = gated_lora(*tensors, [2, 3])
    out.sum().backward()  # outside the block: a backward pass follows its forward pass
    assert set(asked) == {reference.mix, reference.mix_backward}


@pytest.mark.parametrize(("tokens", "dim", "ranks", "dtype"), OF_DTYPES)
def test_kernel_matches_definition(
    tokens, dim, ranks, dtype, kernel, kernel_device, poisoned_empty, monkeypatch
):
    monkeypatch.setattr(kernel, "TOKENS_OF_A_PARTIAL_SUM", 64)
    tensors = [t.detach().to(kernel_device) for t in operands(tokens, dim, ranks, dtype)]
    grad = torch.randn(tokens, dim, generator=torch.Generator().manual_seed(3)).to(
        kernel_device, dtype
    )
    terms = max(tokens, dim, 16)  # of a sum: rounding in another order grows like their root
    before = [t.clone() for t in tensors]
    arguments = *tensors, ranks, 1e-5
    assert_close(kernel.forward(*arguments), reference.forward(*arguments))
    actual, expected = kernel.backward(grad, *arguments), reference.backward(grad, *arguments)
    for a, b in zip(actual, expected, strict=True):
        scale = b.abs().max().item() if b.numel() else 1.0
        assert_close(a, b, rtol=0, atol=terms**0.5 * torch.finfo(dtype).eps * scale)
    assert_close(tensors, before, rtol=0, atol=0)


@pytest.mark.parametrize(("first", "second"), list(product(["transposed", "sliced"], repeat=2)))
def test_kernel_takes_any_layout(first, second, relayouts, kernel, kernel_device, poisoned_empty):
    tensors = [t.detach().to(kernel_device) for t in operands(6, 10, [2, 3])]
    base, hidden, up, coefficients = tensors
    given_ = (
        relayouts[first](base), relayouts[second](hidden), relayouts[first](up),
        relayouts[second](coefficients),
    )  # fmt: skip
    grad = relayouts[second](torch.randn(6, 10).to(kernel_device))
    assert_close(kernel.forward(*given_, [2, 3], 1e-5), reference.forward(*tensors, [2, 3], 1e-5))
    expected = reference.backward(grad.contiguous(), *tensors, [2, 3], 1e-5)
    assert_close(kernel.backward(grad, *given_, [2, 3], 1e-5), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rank", "kernel_runs"), [(128, True), (129, False)])
def test_ranks_whose_tiles_do_not_fit_run_the_definition(rank, kernel_runs, monkeypatch):
    asked = []
    monkeypatch.setattr(op, "use_kernel", lambda *tensors: True)
    monkeypatch.setattr(op, "_forward", lambda *given_: asked.append(given_[-1]) or given_[0])
    tensors = operands(3, 8, [2, rank])
    out = gated_lora(*tensors, [2, rank])
    assert asked == [True] * kernel_runs
    if not kernel_runs:
        assert_close(out, reference.forward(*tensors, [2, rank], 1e-5))


@pytest.mark.gpu
def test_triton_mode_on_cuda():
    tensors = [t.detach().cuda().requires_grad_() for t in operands(70, 200, [3, 17])]
    results = {}
    for mode in ("reference", "triton"):
        with kernels(mode):
            out = gated_lora(*tensors, [3, 17])
        results[mode] = out, *torch.autograd.grad(out.square().sum(), tensors)
    assert_close(results["triton"], results["reference"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("tokens", [0, 1, 5, 40])
@pytest.mark.parametrize("ranks", [[1], [4, 1, 2], [16] * 8], ids=str)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_cpp_matches_the_definition(tokens, ranks, scale, cpp, poisoned_empty):
    tensors = operands(tokens, 192, ranks)
    with torch.no_grad():
        tensors[3][:4] *= scale  # gates that are all but closed or open
    exact = [t.detach().double() for t in tensors]
    out = gated_lora(*tensors, ranks)
    assert_close(out.double(), gated_lora(*exact, ranks), rtol=1e-4, atol=1e-4)
    grad = torch.randn(tokens, 192, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad(out, tensors, grad)
    with kernels("reference"):
        assert_close(found, gradients(gated_lora, tensors, grad, ranks), rtol=0, atol=0)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, -1], ids=hex)
def test_cpp_passes_on_what_is_not_a_number(bits, cpp):
    tensors = [t.detach() for t in operands(8, 64, [2, 3])]
    tensors[0].view(torch.int32)[5, 7] = bits
    found = gated_lora(*tensors, [2, 3])
    assert found[5].isnan().all()
    assert found[[0, 1, 2, 3, 4, 6, 7]].isfinite().all()


@pytest.mark.parametrize(("dim", "dtype"), [(63, torch.float32), (64, torch.bfloat16)])
def test_what_cpp_does_not_compute_is_left_to_the_definition(dim, dtype, cpp, monkeypatch):
    monkeypatch.setattr(native, "library", lambda _: pytest.fail("was called"))
    tensors = operands(3, dim, [2, 3], dtype)
    found = gated_lora(*tensors, [2, 3])
    with kernels("reference"):
        assert torch.equal(found, gated_lora(*tensors, [2, 3]))


def frozen_gradients(tensors, ranks, grad, dtype=torch.float32, half=None):
    """Gradients of all but the second factors of the adapters."""
    given = [t.detach().to(dtype) for t in tensors]
    if half is not None:
        given[:2] = [t.to(half) for t in given[:2]]
    wanted = [given[i].requires_grad_() for i in (0, 1, 3)]
    out = gated_lora(*given, ranks)
    return torch.autograd.grad(out, wanted, grad.to(out.dtype))


@pytest.mark.parametrize("tokens", [0, 1, 6, 300])
@pytest.mark.parametrize("ranks", [[1], [4, 1, 2], [16] * 8], ids=str)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_cpp_gradients_of_frozen_adapters(tokens, ranks, scale, cpp, poisoned_empty, monkeypatch):
    tensors = operands(tokens, 192, ranks)
    with torch.no_grad():
        tensors[3][:4] *= scale
    grad = torch.randn(tokens, 192, generator=torch.Generator().manual_seed(3))
    expected = frozen_gradients(tensors, ranks, grad, torch.float64)
    monkeypatch.setattr(streamed, "backward", lambda *_: pytest.fail("the definition was called"))
    for one, other in zip(frozen_gradients(tensors, ranks, grad), expected, strict=True):
        assert_close(
            one.double(),
            other,
            rtol=1e-4,
            atol=1e-4 * max(1.0, float(other.abs().amax()) if tokens else 0.0),
        )


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_cpp_activations_of_half_precision_are_computed_in_float32(half, cpp):
    ranks, tensors = [2, 3], operands(9, 64, [2, 3])
    grad = torch.randn(9, 64, generator=torch.Generator().manual_seed(3)).to(half)
    found = frozen_gradients(tensors, ranks, grad, half=half)
    assert [t.dtype for t in found] == [half, half, torch.float32]
    with kernels("reference"):
        expected = frozen_gradients(tensors, ranks, grad, half=half)
    assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("mode", ["reference", "cpp"])
@pytest.mark.parametrize("shape", [(3, 5), (4, 2, 3), (6,), (0, 3), (2, 0)], ids=str)
def test_coefficients_of_samples(shape, mode, cpp, small_blocks, poisoned_empty):
    ranks, dim = [2, 3], 64
    draw = torch.Generator().manual_seed(0)
    base, hidden = (torch.randn(*shape, size, generator=draw) for size in (dim, 5))
    up, coefficients = (
        torch.randn(5, dim, generator=draw),
        torch.randn(shape[0], 5, dim, generator=draw),
    )
    grad = torch.randn(base.shape, generator=draw)
    given = [t.requires_grad_() for t in (base, hidden, coefficients)]

    def gradients_of(function):
        out = function()
        return out, *torch.autograd.grad(out, given, grad)

    def one_by_one():
        samples = zip(base, hidden, coefficients, strict=True)
        found = [gated_lora(o, h, up, c, ranks) for o, h, c in samples]
        return torch.stack(found) if found else base + 0 * (hidden.sum() + coefficients.sum())

    with kernels("reference"):
        expected = gradients_of(one_by_one)
    with kernels(mode):
        found = gradients_of(lambda: gated_lora(base, hidden, up, coefficients, ranks))
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_coefficients_of_another_number_of_samples():
    base, hidden, up, coefficients = (t.detach() for t in operands(3, 8, [2]))
    with pytest.raises(
        ValueError, match=r"coefficients \(2, 5, 8\) must have the shape \(3, 5, 8\)"
    ):
        gated_lora(base, hidden, up, coefficients.expand(2, -1, -1), [2])
