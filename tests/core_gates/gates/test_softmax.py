import torch
from torch.testing import assert_close

from core_gates import SoftmaxGate, TemperatureSchedule, update_gates


def test_formula():
    gate = SoftmaxGate(3, 4, tau=0.5, bias=True)
    torch.nn.init.normal_(gate.bias)
    x = torch.randn(5, 3)
    routing = gate(x)
    logits = x @ gate.weight.T + gate.bias
    assert_close(routing.logits, logits)
    expected = torch.exp(2 * logits) / torch.exp(2 * logits).sum(-1, keepdim=True)
    assert_close(routing.weights, expected)
    assert routing.probs is not None
    assert (routing.indices, routing.kept) == (None, None)


def test_temperature_follows_its_schedule_once_per_step():
    gate = SoftmaxGate(3, 4, tau=TemperatureSchedule(2.0, 0.5, 3))
    seen = []
    for _ in range(5):
        for _micro_batch in range(2):
            gate(torch.randn(2, 3))
        seen.append(gate.tau.item())
        update_gates(gate)
    assert (seen, int(gate.step)) == ([2.0, 1.5, 1.0, 0.5, 0.5], 5)
    gate.reset_parameters()
    assert (gate.tau.item(), int(gate.step)) == (2.0, 0)


def test_temperature_is_kept_in_double_for_a_double_gate():
    assert SoftmaxGate(3, 4, tau=0.3, dtype=torch.float64).tau.item() == 0.3
