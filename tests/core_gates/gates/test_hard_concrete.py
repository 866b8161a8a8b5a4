import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from core_gates import HardConcreteGate, l0_loss
from tests.core_gates.drawn import identity_gate

GOLDEN = ["standard_T24_E6_k2", "standard_T32_E8_k3"]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_weights_and_l0(golden, name):
    g = golden(name)
    options = {key: float(g[f"hc_{key}"]) for key in ("beta", "gamma", "zeta")}
    gate = identity_gate(HardConcreteGate, g["logits"].shape[1], **options)
    routing = gate(g["logits"], noise=g["hc_uniform"])
    assert_close((routing.weights, routing.probs), (g["hc_train"], g["hc_l0"]), rtol=0, atol=1e-10)
    assert_close(routing.aux["l0"], g["hc_l0"].sum(-1).mean(), rtol=0, atol=1e-10)
    assert_close(gate.eval()(g["logits"]).weights, g["hc_eval"], rtol=0, atol=1e-10)


def test_open_share_of_samples_is_the_probability():
    gate = identity_gate(HardConcreteGate, 4)
    x = torch.tensor([[-2.0, -0.5, 0.5, 2.0]], dtype=torch.float64)
    torch.manual_seed(0)
    open_ = (gate(x.expand(40_000, -1)).weights > 0).double().mean(0)
    assert_close(open_, gate(x).probs[0], rtol=0, atol=0.01)


def test_weights_close_and_open_exactly():
    weights = identity_gate(HardConcreteGate, 2)(
        torch.tensor([[-30.0, 30.0]], dtype=torch.float64)
    ).weights
    assert weights.tolist() == [[0.0, 1.0]]


def test_extreme_draws_are_finite():
    gate, x = HardConcreteGate(3, 2), torch.randn(2, 3, requires_grad=True)
    routing = gate(x, noise=torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert routing.weights.isfinite().all()
    routing.weights.sum().backward()
    assert x.grad.isfinite().all()


def test_gradients():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    noise = torch.rand(5, 3, generator=generator, dtype=torch.float64)
    gate = identity_gate(HardConcreteGate, 3, bias=True)

    def outputs(x, weight, bias):
        parameters = {"weight": weight, "bias": bias}
        routing = torch.func.functional_call(gate, parameters, (x,), {"noise": noise})
        return routing.weights, routing.probs, routing.aux["l0"]

    assert gradcheck(outputs, (x.requires_grad_(), gate.weight, gate.bias))


def test_l0_excludes_padding_unless_told():
    x = torch.tensor([[1.0, 2.0], [9.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([False, True])
    alone, together = (identity_gate(HardConcreteGate, 2)(part).aux["l0"] for part in (x[:1], x))
    assert_close(identity_gate(HardConcreteGate, 2)(x, padding_mask=mask).aux["l0"], alone)
    counted = identity_gate(HardConcreteGate, 2, padding_in_loss=True)(x, padding_mask=mask)
    assert_close((counted.aux["l0"], l0_loss(counted)), (together, together))
    assert together > alone
