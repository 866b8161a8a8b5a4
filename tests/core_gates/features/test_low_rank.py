import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.testing import assert_close

from core_gates import GateMonitor, LowRankFeatureGate, SelfGate
from core_gates.features import LowRankFeatureGates
from tests.core_gates.drawn import filled


def test_formula():
    gate = filled(LowRankFeatureGate(6, 2, num_maps=3, dtype=torch.float64))
    v = torch.randn(4, 6, dtype=torch.float64)
    mixture = (v @ gate.mixer_weight.mT + gate.mixer_bias).softmax(-1)
    expected = sum(
        mixture[:, [i]] * 2 * (v @ gate.down[i] @ gate.up[i]).sigmoid() for i in range(3)
    )
    assert_close(gate.factors(v), expected, rtol=0, atol=1e-14)
    assert_close(gate(v), v * expected, rtol=0, atol=1e-13)
    assert_close(gate.gate_values(v), expected / 2, rtol=0, atol=1e-14)


@given(st.integers(1, 7), st.integers(1, 4), st.integers(0, 5))
def test_it_starts_as_the_identity_exactly(dim, num_maps, num_rows):
    gate = LowRankFeatureGate(dim, 3, num_maps=num_maps)
    v = torch.randn(num_rows, dim) * 10
    assert torch.equal(gate(v), v)


def test_factors_stay_between_zero_and_two():
    torch.manual_seed(0)
    gate = filled(LowRankFeatureGate(5, 2))
    factors = gate.factors(torch.randn(100, 5) * 3)
    ulp = torch.finfo(factors.dtype).eps  # by which a vectorized tanh may exceed one
    assert (factors.min() >= -ulp) & (factors.max() <= 2 + ulp)
    assert factors.max() - factors.min() > 1.5


def test_gradients():
    gate = filled(LowRankFeatureGate(4, 2, dtype=torch.float64))
    names, parameters = zip(*gate.named_parameters(), strict=True)
    v = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    call = torch.func.functional_call
    assert gradcheck(
        lambda v, *p: call(gate, dict(zip(names, p, strict=True)), (v,)), (v, *parameters)
    )


def test_the_rank_of_the_paper():
    assert LowRankFeatureGate(12, "paper", num_maps=3).down.shape == (3, 12, 4)
    with pytest.raises(ValueError, match="3 does not divide 10"):
        LowRankFeatureGate(10, "paper", num_maps=3)


def test_leading_shapes_dtypes_and_the_monitor():
    gate = filled(LowRankFeatureGate(4, 2))
    v = torch.randn(2, 3, 4)
    assert_close(gate(v), gate(v.view(6, 4)).view(2, 3, 4))
    assert gate(v[0, 0]).shape == (4,)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gate.factors(v.bfloat16()).dtype == torch.float32
        assert gate(v.bfloat16()).dtype == torch.bfloat16
    monitor = GateMonitor(torch.nn.Sequential(gate))
    gate(v)
    assert 0 < monitor.compute()["0"]["mean"] < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1), "dim must be at least 1, got 0"),
        ((3, 0), "rank must be at least 1, got 0"),
    ],
)
def test_sizes_are_checked(arguments, message, refuses):
    refuses(
        ValueError,
        (message, lambda: LowRankFeatureGate(*arguments)),
        ("must end in the 3 features", lambda: LowRankFeatureGate(3, 1)(torch.zeros(2, 4))),
    )


@pytest.mark.parametrize("num_experts", [1, 3])
def test_self_gate(refuses, num_experts):
    gate = filled(SelfGate(5, num_experts, dtype=torch.float64))
    x, experts = torch.randn(4, 5).double(), torch.randn(4, num_experts, 2).double()
    logits = x @ gate.weight.mT + gate.bias
    weights = logits.softmax(-1) if num_experts > 1 else 1 / (1 + (-logits).exp())
    assert_close(gate(x, experts), (weights.unsqueeze(-1) * experts).sum(1))
    assert_close(gate.gate_values(x, experts), weights)
    assert gate(x.view(2, 2, 5), experts.view(2, 2, num_experts, 2)).shape == (2, 2, 2)
    refuses(ValueError, (r"must be \(4, .\) and their features", lambda: gate(x, experts[:, :0])))


def test_sizes_of_a_self_gate_are_checked(refuses):
    refuses(ValueError, ("num_experts must be at least 1, got 0", lambda: SelfGate(3, 0)))


def test_stacked_gates_are_single_ones():
    singles = [filled(LowRankFeatureGate(6, 2, num_maps=3)) for _ in range(4)]
    for g, single in enumerate(singles):
        single.up.data.mul_(g + 1)
    stacked = LowRankFeatureGates(6, 4, 2, num_maps=3)
    for g, single in enumerate(singles):
        for name, values in single.state_dict().items():
            target = stacked.get_parameter(name).data[g]
            target.copy_(values.mT if name == "down" else values)
    v = torch.randn(9, 6)
    expected = torch.stack([single(v) for single in singles], 1)
    assert_close(stacked(v), expected)
    assert_close(stacked.factors(v), torch.stack([single.factors(v) for single in singles], 1))
    assert not torch.allclose(expected[:, 0], expected[:, 1])


def test_stacked_gates_of_several_inputs():
    reads = [[1], [0], [0, 2]]
    stacked = filled(LowRankFeatureGates(5, 3, 2, reads=reads, dtype=torch.float64))
    assert (stacked.gates, stacked.inputs) == ((0, 1, 2, 2), (1, 0, 0, 2))
    v = torch.randn(7, 3, 5, dtype=torch.float64)
    out = stacked(v)
    for run, (g, i) in enumerate(zip(stacked.gates, stacked.inputs, strict=True)):
        single = LowRankFeatureGate(5, 2, dtype=torch.float64)
        state = {name: values[g] for name, values in stacked.state_dict().items()}
        single.load_state_dict(state | {"down": state["down"].mT})
        assert_close(out[:, run], single(v[:, i]))


def test_stacked_gates_start_as_the_identity_exactly():
    v = torch.randn(300, 40) * 10
    out = LowRankFeatureGates(40, 3, "paper")(v)
    assert torch.equal(out, v.unsqueeze(1).expand(-1, 3, -1))
    for gates in (LowRankFeatureGate(400, 8), LowRankFeatureGates(400, 3, 8)):
        assert gates.down.std().item() == pytest.approx(400**-0.5, rel=0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LowRankFeatureGates(3, 0, 1), "num_gates must be at least 1"),
        (lambda: LowRankFeatureGates(3, 2, 1, reads=[[0]]), "inputs of each of 2 gates"),
        (lambda: LowRankFeatureGates(3, 2, 1, reads=[[0], []]), "inputs of each of 2 gates"),
        (lambda: LowRankFeatureGates(3, 2, 1)(torch.zeros(2, 2, 3)), r"must be \(N, 3\)"),
        (
            lambda: LowRankFeatureGates(3, 1, 1, reads=[[1]])(torch.zeros(2, 1, 3)),
            r"must be \(N, 2, 3\)",
        ),
    ],
)
def test_stacked_gates_check_what_they_get(refuses, call, message):
    refuses(ValueError, (message, lambda: call()))
