import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from core_gates.gates.noisy_top_k import NoisyTopKGate

GOLDEN = ["standard_T24_E6_k2", "standard_T32_E8_k3"]


def variation(totals):
    return totals.var(correction=0) / totals.mean() ** 2


def gate_of(clean, noise_logits, k, **options):
    """Return a gate and the input by which its two projections give these logits."""
    experts = clean.shape[-1]
    gate = NoisyTopKGate(2 * experts, experts, k=k, dtype=torch.float64, **options)
    eye, zeros = torch.eye(experts), torch.zeros(experts, experts)
    gate.weight.data.copy_(torch.cat([eye, zeros], -1))
    gate.noise_weight.data.copy_(torch.cat([zeros, eye], -1))
    return gate, torch.cat([clean, noise_logits], -1)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_weights_importance_and_load(golden, name):
    g = golden(name)
    gate, x = gate_of(g["logits"], g["noise_logits"], int(g["k"]))
    routing = gate(x, noise=g["noise"])
    weights = routing.to_dense().weights
    assert_close(weights, g["noisy_topk_gate"], rtol=0, atol=1e-10)
    assert_close(weights.sum(0), g["noisy_importance"], rtol=0, atol=1e-10)
    importance, load = variation(g["noisy_importance"]), variation(g["noisy_topk_load"])
    assert_close(routing.aux["importance"], importance, rtol=0, atol=1e-10)
    assert_close((routing.aux["load"], routing.logits), (load, g["logits"]), rtol=0, atol=1e-10)


def test_load_is_the_probability_to_be_kept_by_another_draw(golden):
    g = golden(GOLDEN[0])
    gate, x = gate_of(g["logits"][:1], g["noise_logits"][:1], 2)
    noise = g["noise"][:1]
    expert = 4
    draws = noise.repeat(200_000, 1)
    draws[:, expert] = torch.randn(
        200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    kept = (gate(x.expand(200_000, -1), noise=draws).indices == expert).any(-1).double().mean()
    routing = gate(x, noise=noise)
    std = torch.nn.functional.softplus(g["noise_logits"][:1]) + 0.01
    load = gate._load(routing, (g["logits"][:1] + noise * std).topk(3).values, std)[0, expert]
    assert 0.05 < load < 0.95
    assert_close(load, kept, rtol=0, atol=0.005)


def test_every_expert_is_loaded_by_all_positions_at_k_of_all():
    gate, x = gate_of(torch.randn(7, 3).double(), torch.randn(7, 3).double(), 3)
    routing = gate(x)
    assert routing.aux["load"] == 0
    assert (routing.chosen() == 1).all()


def test_gradients_reach_both_weights():
    generator = torch.Generator().manual_seed(1)
    clean, raw, noise = (torch.randn(6, 4, generator=generator).double() for _ in range(3))
    gate, x = gate_of(clean, raw, 2)

    def outputs(x, weight, noise_weight):
        parameters = {"weight": weight, "noise_weight": noise_weight}
        routing = torch.func.functional_call(gate, parameters, (x,), {"noise": noise})
        return routing.weights, *routing.aux.values()

    assert gradcheck(outputs, (x.requires_grad_(), gate.weight, gate.noise_weight))
    gate(x, noise=noise).aux["load"].backward()
    assert gate.noise_weight.grad.abs().max() > 1e-3
    assert gate.weight.grad.abs().max() > 1e-3


def test_noise_spreads_the_zero_weights_of_the_start():
    gate, x = NoisyTopKGate(3, 8, k=2), torch.randn(4000, 3)
    torch.manual_seed(0)
    assert (gate(x).chosen().sum(0) > 850).all()
    assert gate(x).indices.ne(gate(x).indices).any()
    gate.eval()
    assert (gate(x).indices == torch.tensor([0, 1])).all()


def test_losses_exclude_padding_unless_told():
    generator = torch.Generator().manual_seed(1)
    clean, raw, noise = (torch.randn(6, 4, generator=generator).double() for _ in range(3))
    mask = torch.tensor([False, True, False, False, True, False])
    gate, x = gate_of(clean, raw, 2)
    expected = gate(x[~mask], noise=noise[~mask]).aux
    x[1] = torch.nan
    assert_close(gate(x, padding_mask=mask, noise=noise).aux, expected)
    x[1] = 0
    gate.padding_in_loss = True
    assert_close(gate(x, padding_mask=mask, noise=noise).aux, gate(x, noise=noise).aux)
