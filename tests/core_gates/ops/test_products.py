"""Products by oneDNN are those of PyTorch, whatever the strides; small ones are left to it."""

import pytest
import torch
from torch.testing import assert_close

from core_gates.ops import _native

PADDED = 5


@pytest.fixture(autouse=True)
def one_dnn(monkeypatch):
    if not torch.backends.mkldnn.is_available() or not hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    ):
        pytest.skip("PyTorch without oneDNN")
    monkeypatch.setattr(_native, "is_faster", lambda: True)
    monkeypatch.setattr(_native, "LEAST_WORK", 1)


def matrices(number, rows, columns, kind):
    shape = (number, columns, rows) if "transposed" in kind else (number, rows, columns)
    gap = PADDED if "gaps" in kind else 0
    made = torch.randn(*shape[:2], shape[2] + gap)[..., : shape[2]]
    return made.mT if "transposed" in kind else made


KINDS = ["plain", "transposed", "gaps", "transposed, gaps"]


@pytest.mark.parametrize("of_left", KINDS)
@pytest.mark.parametrize("of_right", KINDS)
def test_products_do_not_depend_on_strides(of_left, of_right):
    left, right = matrices(3, 24, 20, of_left), matrices(3, 20, 16, of_right)
    bias, out = torch.randn(3, 16), torch.empty(3, 24, 16)
    exact = (left.double() @ right.double()).float()
    _native.products(left, right, out, cpp=True)
    assert_close(out, exact, rtol=1e-5, atol=1e-5)
    _native.add_products(out, left, right, cpp=True)
    assert_close(out, 2 * exact, rtol=1e-5, atol=1e-5)
    _native.add_products(out[0], left[0], right[0], cpp=True)
    assert_close(out[0], 3 * exact[0], rtol=1e-5, atol=1e-5)
    _native.products(left, right, out, bias, cpp=True)
    assert_close(out, exact + bias.unsqueeze(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cpp", [True, False])
def test_one_dnn_computes_large_products_of_the_cpp_mode(cpp, monkeypatch):
    monkeypatch.setattr(_native, "LEAST_WORK", 1000)
    called = []
    function = torch.ops.mkldnn._linear_pointwise

    class Counted:
        @staticmethod
        def _linear_pointwise(*arguments):
            called.append(arguments[0].shape)
            return function(*arguments)

    class Ops:
        mkldnn = Counted

    monkeypatch.setattr(_native, "_ops", Ops)
    _native.product(torch.randn(200, 20), torch.randn(20, 20), cpp=cpp)
    _native.product(torch.randn(2, 20), torch.randn(20, 20), cpp=cpp)
    _native.product(torch.randn(0, 20), torch.randn(20, 20), cpp=cpp)
    assert called == ([(200, 20)] if cpp else [])
