from itertools import product

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.testing import assert_close

from core_gates.ops import kernels
from core_gates.ops.multi_gate_mix import reference
from core_gates.ops.multi_gate_mix.op import multi_gate_mix

SIZES = [(0, 2, 3, 4), (1, 1, 1, 1), (7, 3, 5, 130), (3, 2, 9, 33)]  # B S E D
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = [1, 2]
OP = torch.ops.core_gates.multi_gate_mix.default


def arguments(sizes, dtype=torch.float32, kinds=2):
    """Experts, logits and mask of the op; masks hold full, lone and empty rows."""
    B, S, E, D = sizes
    generator = torch.Generator().manual_seed(B + S + E + D)

    def normal(*shape):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.mul(2).to(dtype).requires_grad_()

    mask = torch.rand(kinds, S, E, generator=generator) < 0.5
    mask[0, 0] = True
    mask[-1, -1] = torch.arange(E) == E - 1
    mask[-1, 0] &= S == 1
    return normal(B, E, D), normal(B, kinds, S, E), mask


CASES = [  # all sizes in float32, one in half precision; the rest once a day
    pytest.param(
        (sizes, dtype, kinds),
        marks=[pytest.mark.slow] * (dtype != torch.float32 and sizes != SIZES[3]),
    )
    for sizes, dtype, kinds in product(SIZES, DTYPES, KINDS)
]


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return arguments(*request.param)


@pytest.fixture
def kernel(kernel_device):
    from core_gates.ops.multi_gate_mix import kernel

    return kernel


def test_formula():
    experts, logits, _ = arguments((4, 3, 5, 6), torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    self_mask = torch.tensor([[0] * 5, [1, 0, 1, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    mixed = multi_gate_mix(experts, logits[:, 0], mask, logits[:, 1], self_mask)
    gates, self_gates = logits.unbind(1)
    pair = [0, 2]
    expected = [
        torch.einsum("be,bed->bd", gates[:, 0].softmax(-1), experts),
        torch.einsum(
            "be,bed->bd",
            gates[:, 1, pair].softmax(-1) + self_gates[:, 1, pair].softmax(-1),
            experts[:, pair],
        ),
        (1 + self_gates[:, 2, 4:].sigmoid()) * experts[:, 4],
    ]
    assert_close(mixed, torch.stack(expected, 1), rtol=0, atol=1e-14)


def test_only_a_self_gate_closes_a_lone_expert():
    experts = torch.ones(1, 2, 1)
    logits, lone = torch.full((1, 1, 2), -3.0), torch.tensor([[True, False]])
    nothing = torch.zeros(1, 2, dtype=torch.bool)
    assert multi_gate_mix(experts, logits, lone).item() == 1
    mixed = multi_gate_mix(experts, logits, nothing, logits, lone)
    assert_close(mixed.item(), torch.tensor(-3.0).sigmoid().item())
    assert multi_gate_mix(experts, logits, nothing, logits, nothing).item() == 0


def test_any_leading_shape():
    experts, logits, mask = arguments((6, 3, 5, 4))
    flat = multi_gate_mix(experts, logits[:, 0], mask[0])
    grid = multi_gate_mix(experts.view(2, 3, 5, 4), logits[:, 0].view(2, 3, 3, 5), mask[0])
    assert_close(grid, flat.view(2, 3, 3, 4))
    one = multi_gate_mix(experts[0], logits[0, 0], mask[0])
    assert_close(one, flat[0])


def test_what_is_hidden_has_no_influence_and_no_gradient():
    experts, logits, _ = arguments((4, 2, 3, 5), torch.float64, kinds=1)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    poisoned = logits.detach()[:, 0].masked_fill(~mask, torch.nan).requires_grad_()
    mixed = multi_gate_mix(experts, poisoned, mask)
    assert_close(mixed, multi_gate_mix(experts, logits[:, 0], mask))
    grad_experts, grad_logits = torch.autograd.grad(mixed[:, 0].sum(), (experts, poisoned))
    assert (grad_experts[:, 2] == 0).all()
    assert (grad_logits[:, 0, 2] == 0).all()
    assert (grad_logits[:, 1] == 0).all()


def test_large_logits_do_not_overflow(kernel, kernel_device):
    experts = torch.tensor([[[1.0], [2.0]]], device=kernel_device)
    mask = torch.ones(2, 1, 2, dtype=torch.bool, device=kernel_device)
    logits = torch.tensor([[[[1e4, -1e4]], [[-1e4, 1e4]]]], device=kernel_device)
    for function in (reference.forward, kernel.forward):
        assert function(experts, logits, mask).item() == 3


def test_half_precision_rounds_once():
    experts, logits, mask = arguments((7, 3, 5, 13), torch.bfloat16)
    out = reference.forward(experts, logits, mask)
    assert_close(
        out, reference.forward(experts.float(), logits.float(), mask).bfloat16(), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 3), r"boolean table \(gates, experts\), got torch.float32 \(2, 3\)"),
        (torch.ones(2, 4, dtype=torch.bool), r"logits \(5, 2, 3\) must have the leading shape"),
    ],
)
def test_masks_are_checked(mask, message):
    with pytest.raises(ValueError, match=message):
        multi_gate_mix(torch.zeros(5, 3, 4), torch.zeros(5, 2, 3), mask)


def test_self_gates_need_both_arguments(refuses):
    mask = torch.ones(2, 3, dtype=torch.bool)
    refuses(
        ValueError,
        (
            "one of them is missing",
            lambda: multi_gate_mix(
                torch.zeros(5, 3, 4), torch.zeros(5, 2, 3), mask, self_mask=mask
            ),
        ),
        (
            "the mask is for 3 experts, found 6",
            lambda: multi_gate_mix(torch.zeros(5, 6, 4), torch.zeros(5, 2, 3), mask),
        ),
    )


@pytest.mark.parametrize("function", [reference.forward, OP])
@pytest.mark.parametrize("kinds", KINDS)
def test_gradients(function, kinds):
    experts, logits, mask = arguments((2, 3, 4, 3), torch.float64, kinds)
    assert gradcheck(lambda e, z: function(e, z, mask), (experts, logits))


def test_second_derivatives_of_the_definition():
    experts, logits, mask = arguments((2, 2, 3, 2), torch.float64)
    assert gradgradcheck(lambda e, z: reference.forward(e, z, mask), (experts, logits))


@pytest.mark.ends("shapes are registered alike")
def test_registration(case):
    opcheck(OP, case)


def test_kernel_matches_definition(case, kernel, kernel_device, poisoned_empty):
    experts, logits, mask = (t.detach().to(kernel_device) for t in case)
    before = experts.clone(), logits.clone()
    out = kernel.forward(experts, logits, mask)
    assert_close(out, reference.forward(experts, logits, mask))
    grad = torch.linspace(-1, 1, out.numel()).to(out).view(out.shape)
    gradients = kernel.backward(grad, experts, logits, mask)
    assert_close(gradients, reference.backward(grad, experts, logits, mask))
    assert_close((experts, logits), before, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset", "expanded"])
def test_kernel_takes_any_layout(layout, relayouts, kernel, kernel_device, poisoned_empty):
    tensors = [t.detach().to(kernel_device) for t in arguments((3, 2, 5, 7))]
    experts, logits = (relayouts[layout](t) for t in tensors[:2])
    mask = tensors[2]
    out = kernel.forward(experts, logits, mask)
    assert_close(out, reference.forward(experts, logits, mask))
    grad = relayouts[layout](torch.ones_like(out))
    gradients = kernel.backward(grad, experts, logits, mask)
    assert_close(gradients, reference.backward(grad, experts, logits, mask))


@pytest.mark.gpu
def test_triton_mode_on_cuda():
    experts, logits, mask = (t.detach().cuda() for t in arguments((64, 4, 7, 130)))
    leaves = experts.requires_grad_(), logits.requires_grad_()
    results = {}
    for mode in ("reference", "triton"):
        with kernels(mode):
            out = multi_gate_mix(experts, logits[:, 0], mask[0], logits[:, 1], mask[1])
        results[mode] = out, *torch.autograd.grad(out.square().sum(), leaves)
    assert_close(results["triton"], results["reference"])
