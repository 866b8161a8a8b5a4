import pytest
from torch import nn

from core_gates import (
    BaseLayerGate,
    ExpertChoiceGate,
    MoELayer,
    PermutedGate,
    SinkhornGate,
    SoftMoEGate,
    StackedExperts,
    SwitchGate,
    TopKGate,
)
from core_gates.routing import PermutationSearch, refuse_coupled_gates


def model(gate):
    experts = StackedExperts(4, 6, 3)
    return nn.ModuleList([MoELayer(TopKGate(6, 4), experts), MoELayer(gate, experts)])


@pytest.mark.parametrize(
    "gate",
    [
        BaseLayerGate(6, 4),
        ExpertChoiceGate(6, 4),
        SinkhornGate(6, 4),
        SoftMoEGate(6, 4),
        SwitchGate(6, 4),
        PermutedGate(ExpertChoiceGate(6, 4), search=PermutationSearch(6)),
    ],
    ids=lambda gate: type(gate).__name__,
)
def test_gates_that_couple_positions_are_refused_by_name(gate):
    causal = model(gate)
    with pytest.raises(ValueError, match=rf"as 1\.gate \({type(gate).__name__}\)") as caught:
        refuse_coupled_gates(causal)
    assert "0.gate" not in str(caught.value)
    assert "allow_leak=True" in str(caught.value)
    refuse_coupled_gates(causal, allow_leak=True)


def test_other_gates_are_accepted():
    assert refuse_coupled_gates(model(TopKGate(6, 4))) is None
    roomy = SwitchGate(6, 4, capacity_factor=None, eval_capacity_factor=None)
    assert refuse_coupled_gates(model(roomy)) is None


def test_a_model_may_itself_be_the_gate():
    with pytest.raises(ValueError, match=r"as SinkhornGate \(SinkhornGate\) would"):
        refuse_coupled_gates(SinkhornGate(6, 4))
