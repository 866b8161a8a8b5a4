import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.testing import assert_close

from core_gates.ops import kernels
from core_gates.ops.router import reference
from core_gates.ops.router.op import router

SHAPES = [(0, 4), (1, 1), (33, 6), (70, 33)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def kernel(kernel_device):
    from core_gates.ops.router import kernel

    return kernel


@pytest.fixture
def cotangents(inputs):
    def make(logits, k):
        generator = torch.Generator().manual_seed(5)
        exact = torch.promote_types(logits.dtype, torch.float32)
        shapes = [(logits.shape[0], k), tuple(logits.shape), ()]
        return [torch.randn(s, generator=generator, dtype=exact) for s in shapes]

    return make


@pytest.mark.parametrize("name", ["standard_T24_E6_k2", "standard_T32_E8_k3"])
def test_golden(name, golden):
    vectors = golden(name)
    logits, k = vectors["logits"].requires_grad_(), int(vectors["k"])
    exact = {"rtol": 1e-10, "atol": 1e-10}
    for renormalize, key in ((True, "softmax_then_topk_renorm"), (False, "softmax_then_topk")):
        routed = router(logits, k, renormalize=renormalize)
        dense = torch.zeros_like(logits).scatter(-1, routed.indices, routed.weights)
        assert_close(dense, vectors[key], **exact)
        assert torch.equal(routed.indices.sort(-1).values, vectors["topk_index"].sort(-1).values)
        assert torch.equal(routed.counts, vectors["count"])
    assert_close(routed.z_loss, vectors["z_loss"], **exact)
    assert_close(torch.autograd.grad(routed.z_loss, logits)[0], vectors["grad_z_loss"], **exact)


def test_formula(inputs):
    logits = inputs((40, 7), torch.float64, count=1)[0]
    probs = logits.exp() / logits.exp().sum(-1, keepdim=True)
    top, indices = probs.topk(3, -1)  # no ties among these
    plain = router(logits, 3, renormalize=False)
    assert_close(plain.weights, top)
    assert torch.equal(plain.indices, indices)
    routed = router(logits, 3)
    assert_close((routed.weights, routed.probs), (top / top.sum(-1, keepdim=True), probs))
    assert torch.equal(routed.counts, torch.bincount(indices.flatten(), minlength=7))
    assert_close(routed.z_loss, logits.exp().sum(-1).log().square().mean())


def test_leading_shape_and_half_precision(inputs):
    logits = inputs((2, 3, 5), torch.bfloat16, count=1)[0]
    routed = router(logits, 2)
    assert routed.weights.shape == routed.indices.shape == (2, 3, 2)
    assert routed.probs.shape == (2, 3, 5)
    assert routed.weights.dtype == routed.probs.dtype == torch.float32
    assert_close(routed.weights, router(logits.float(), 2).weights, rtol=0, atol=0)


def test_ties_go_to_the_lowest_index():
    logits = torch.tensor([[1.0, 3, 3, 3], [0, 0, 0, 0], [-torch.inf, -torch.inf, 1, -torch.inf]])
    assert router(logits, 2).indices.tolist() == [[1, 2], [0, 1], [2, 0]]


@pytest.mark.parametrize("k", [0, 5])
def test_k_is_checked(k):
    with pytest.raises(ValueError, match=f"k must lie between 1 and the 4 experts, got {k}"):
        router(torch.zeros(3, 4), k)


@pytest.mark.parametrize("renormalize", [True, False])
def test_gradients(renormalize, inputs):
    logits = inputs((3, 5), torch.float64, count=1)[0]

    def outputs(op):
        def call(logits):
            found = op(logits, 2, renormalize)
            return found[0], found[2], found[4]

        return call

    def public(logits, k, renormalize):
        return router(logits, k, renormalize=renormalize)

    assert gradcheck(outputs(public), (logits,))
    assert gradcheck(outputs(torch.ops.core_gates.router.default), (logits,))
    assert gradgradcheck(outputs(public), (logits,))


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.ends("shapes are registered alike")
def test_registration(shape, renormalize, inputs):
    opcheck(torch.ops.core_gates.router.default, (inputs(shape, count=1)[0], 1, renormalize))


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_matches_definition(
    shape, dtype, renormalize, inputs, cotangents, kernel, kernel_device, poisoned_empty
):
    logits = inputs(shape, dtype, count=1)[0].detach().to(kernel_device)
    k = min(3, shape[1])
    before = logits.clone()
    found = kernel.forward(logits, k, renormalize)
    expected = reference.forward(logits, k, renormalize)
    assert_close(found, expected)
    grads = [g.to(kernel_device) for g in cotangents(logits, k)]
    saved = (logits, expected[1], expected[0], renormalize)
    assert_close(kernel.backward(*grads, *saved), reference.backward(*grads, *saved))
    assert torch.equal(logits, before)


def test_kernel_breaks_ties_like_the_definition(kernel, kernel_device):
    logits = torch.tensor([[1.0, 3, 3, 3], [0, 0, 0, 0], [-torch.inf, -torch.inf, 1, -torch.inf]])
    indices = kernel.forward(logits.to(kernel_device), 2, True)[1]
    assert indices.tolist() == [[1, 2], [0, 1], [2, 0]]


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset", "expanded"])
def test_kernel_takes_any_layout(layout, inputs, cotangents, relayouts, kernel, kernel_device):
    logits = relayouts[layout](inputs((6, 7), count=1)[0].detach().to(kernel_device))
    expected = reference.forward(logits, 2, True)
    assert_close(kernel.forward(logits, 2, True), expected)
    grads = [g.to(kernel_device).expand_as(g) for g in cotangents(logits, 2)]
    grads[0] = grads[0][:1].expand(6, 2)
    saved = (logits, expected[1], expected[0], True)
    assert_close(kernel.backward(*grads, *saved), reference.backward(*grads, *saved))


def test_compiles_into_one_graph(inputs):
    logits = inputs((33, 6), count=1)[0]
    compiled = torch.compile(router, backend="eager", fullgraph=True)
    found, expected = compiled(logits, 2), router(logits, 2)
    assert_close(found, expected)
    gradients = [
        torch.autograd.grad(r.weights.square().sum(), logits)[0] for r in (found, expected)
    ]
    assert_close(*gradients)


@pytest.mark.gpu
def test_triton_mode_on_cuda(inputs):
    logits = inputs((33, 6), count=1)[0].detach().cuda().requires_grad_()
    with kernels("triton"):
        found = router(logits, 2)
    assert_close(found, router(logits, 2))
