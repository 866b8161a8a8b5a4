import pytest
import torch
from torch import nn

from core_gates.gates import DSelectKGate, MultiGate
from core_gates.gates.mixture import MaskedMixture
from recsys.diagnosis.layer_activity import gate_weights, visible_experts


def test_a_mixture_without_self_gates_has_no_residual_path():
    x = torch.randn(7, 3)
    mixture = MaskedMixture(3, torch.tensor([[True, False, True], [True, True, True]]))
    found = gate_weights(mixture, x)
    torch.testing.assert_close(found.gates, mixture.weights(x))
    assert found.residual is None


def test_self_gates_are_taken_out():
    x = torch.randn(7, 3)
    seen, own = torch.ones(2, 3, dtype=torch.bool), torch.eye(2, 3, dtype=torch.bool)
    mixture = MaskedMixture(3, seen, self_mask=own)
    found = gate_weights(mixture, x)
    torch.testing.assert_close(found.gates.sum(-1), torch.ones(7, 2))
    torch.testing.assert_close(found.gates + found.residual, mixture.weights(x))
    assert (found.residual[:, own] > 0).all()
    assert (found.residual[:, ~own] == 0).all()


class WithResidual(nn.Module):
    def weights(self, x):
        return torch.full((len(x), 1, 2), 0.5) + self.residual_weights(x)

    def residual_weights(self, x):
        return torch.tensor([[-2.0, 0.0]]).expand(len(x), 1, 2)


class Free(nn.Module):
    """As AdaTT: gates in a module, free weights on top."""

    def __init__(self):
        super().__init__()
        self.gates = MaskedMixture(3, torch.ones(1, 2, dtype=torch.bool))

    def weights(self, x):
        return self.gates.weights(x) + torch.tensor([0.0, 3.0])


def test_a_mixture_may_name_its_residual_path():
    found = gate_weights(WithResidual(), torch.randn(4, 3))
    assert found.gates.tolist() == [[[0.5, 0.5]]] * 4
    assert found.residual[0].tolist() == [[-2.0, 0.0]]
    found = gate_weights(Free(), torch.randn(4, 3))
    torch.testing.assert_close(found.gates.sum(-1), torch.ones(4, 1))
    torch.testing.assert_close(found.residual, torch.tensor([0.0, 3.0]).expand(4, 1, 2))


def test_routing_gates_are_measured():
    gates = MultiGate([DSelectKGate(3, 4, k=2) for _ in range(2)])
    x = torch.randn(5, 3)
    found = gate_weights(gates, x, ids=None)
    torch.testing.assert_close(found.gates, gates.weights(x))
    assert found.residual is None


@pytest.mark.fault("video R5")
def test_masks_tell_what_gates_see():
    mask = torch.tensor([[True, False, True], [True, True, False]])
    assert torch.equal(visible_experts(MaskedMixture(3, mask, self_mask=~mask)), mask)
    gates = MultiGate([DSelectKGate(3, 2, k=1) for _ in range(2)], mask)
    assert torch.equal(visible_experts(gates), mask)
    assert visible_experts(WithResidual()) is None


@pytest.mark.fault("video R5")
def test_an_expert_with_several_outputs_is_seen_if_one_of_them_is():
    mask = torch.tensor([[True, False, False, False], [False, False, True, True]])
    mixture = MaskedMixture(3, mask)
    mixture.expert_of_output = [0, 1, 1, 2]
    assert visible_experts(mixture).tolist() == [[True, False, False], [False, True, True]]
