import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from core_gates import DenseToSparseGate, StagedSchedule, update_gates

GOLDEN = [
    "dts_T10_E8_tau03_gumbel",
    "dts_T10_E8_tau2_gumbel",
    "dts_T7_E6_tau03_hard",
    "dts_T7_E6_tau03_softmaxcombine",
]
DIM, EXPERTS = 6, 5
FIRST = {"shared": 0, "annealing": 3, "hard": 7}  # first step of each phase
STAGES = StagedSchedule(shared_steps=3, annealing_steps=4, start=2.0, end=0.5)


def build(step=0, stages=STAGES, **options):
    gate = DenseToSparseGate(DIM, EXPERTS, stages=stages, **options)
    torch.nn.init.normal_(gate.weight, generator=torch.Generator().manual_seed(1))
    for _ in range(step):
        gate.update()
    return gate


def at(temperature, *, hard=False, **options):
    """Return a gate of float64 at a temperature, annealing or hard, that takes its input as h."""
    stages = StagedSchedule(0, 0 if hard else 1, start=temperature, end=temperature)
    num_experts = options.pop("num_experts", EXPERTS)
    gate = DenseToSparseGate(
        num_experts, num_experts, stages=stages, dtype=torch.float64, **options
    )
    gate.weight.data.copy_(torch.eye(num_experts))
    return gate


def positions(*shape):
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(2))


def gumbel(*shape):
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return -(-uniform.log()).log()


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_gates_and_gradients(golden, name):
    g = golden(name)
    logits = g["logits"].requires_grad_()
    gate = at(
        float(g["tau"]),
        hard=bool(g["hard"]),
        num_experts=logits.shape[-1],
        threshold=float(g["threshold"]),
        combine="gumbel" if g["combine_with_gumbel_weights"] else "softmax",
    )
    routing = gate(logits, noise=g["gumbel_noise"])
    weights, balance = routing.to_dense().weights, routing.aux["balance"]
    (grad_gate,) = torch.autograd.grad((weights * g["cotangent"]).sum(), logits, retain_graph=True)
    (grad_aux,) = torch.autograd.grad(balance, logits)
    for actual, expected in (
        (weights, "gate"),
        (routing.chosen() > 0, "dispatch"),
        (balance, "l_aux"),
        (grad_gate, "grad_logits_gate"),
        (grad_aux, "grad_logits_aux"),
    ):
        assert_close(actual, g[expected], rtol=0, atol=1e-10)


@given(st.integers(0, 10**6))
def test_cold_is_top_1_of_the_noisy_logits(seed):
    logits, noise = torch.randn(
        2, 4, EXPERTS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    gap = (logits + noise).topk(2).values
    logits = logits[gap[:, 0] - gap[:, 1] > 1e-3]
    noise = noise[gap[:, 0] - gap[:, 1] > 1e-3]
    best = torch.nn.functional.one_hot((logits + noise).argmax(-1), EXPERTS).double()
    cold = at(1e-5)(logits, noise=noise)
    assert_close(cold.weights, best, rtol=0, atol=1e-12)
    hard = at(1e-5, hard=True)(logits, noise=noise)
    assert hard.indices.shape == (len(logits), 1)
    assert_close(hard.to_dense().weights, best, rtol=0, atol=1e-12)


def test_without_a_threshold_it_is_a_gumbel_softmax():
    logits, noise = torch.randn(9, EXPERTS, dtype=torch.float64), gumbel(9, EXPERTS)
    routing = at(0.7, threshold=0.0)(logits, noise=noise)
    expected = torch.exp((logits + noise) / 0.7)
    assert_close(routing.weights, expected / expected.sum(-1, keepdim=True))
    assert_close(routing.aux["balance"], torch.tensor(float(EXPERTS)).double())


def test_noise_is_gumbel_and_drawn_in_training_only():
    gate = DenseToSparseGate(1, 2, threshold=0.0, stages=StagedSchedule(0, 1, start=1.0, end=1.0))
    torch.manual_seed(0)
    x = torch.zeros(20_000, 1)
    difference = gate(x).probs.logit()[:, 0]  # of two Gumbel variables: logistic
    assert abs(difference.mean()) < 0.05
    assert abs(difference.var() - torch.pi**2 / 3) < 0.1
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert (gate.eval()(x).weights == 0.5).all()
    assert torch.equal(torch.get_rng_state(), before)


def test_phases_and_temperature_follow_the_steps():
    gate, seen = build(), []
    for _ in range(9):
        for _micro_batch in range(2):
            gate(positions(2))
        seen.append((gate.phase, round(gate.tau.item(), 4)))
        update_gates(gate)
    falling = [round(2 * 4 ** (-i / 4), 4) for i in range(5)]
    phases = ["shared"] * 3 + ["annealing"] * 4 + ["hard"] * 2
    assert seen == list(zip(phases, [2.0] * 3 + falling + [0.5], strict=True))
    gate.reset_parameters()
    assert (gate.phase, gate.tau.item(), int(gate.step)) == ("shared", 2.0, 0)
    assert not gate.weight.any()


def test_shared_phase_uses_expert_0_alone_and_touches_the_gate():
    gate, x = build(), positions(2, 3)
    routing = gate(x)
    assert not routing.indices.any()
    assert (routing.weights == 1).all()
    assert routing.indices.shape == (2, 3, 1)
    (routing.weights.sum() + routing.aux["balance"]).backward()
    assert gate.weight.grad is not None
    assert not gate.weight.grad.any()


@pytest.mark.parametrize("combine", ["gumbel", "softmax"])
def test_evaluation_goes_by_the_phase(combine):
    x = positions(40)
    annealing = build(FIRST["annealing"], combine=combine, threshold=0.1).eval()
    routing = annealing(x)
    logits = x @ annealing.weight.T
    probs = (logits / 2.0).softmax(-1)
    weights = probs if combine == "gumbel" else logits.softmax(-1)
    assert_close(routing.weights, torch.where(probs > 0.1, weights, 0))
    assert routing.indices is None
    used = (routing.weights > 0).sum(-1)
    assert used.min() >= 1
    assert used.max() > 1
    hard = build(FIRST["hard"], combine=combine).eval()
    routing = hard(x)
    probs = (logits / 0.5).softmax(-1)
    weights = probs if combine == "gumbel" else logits.softmax(-1)
    assert torch.equal(routing.indices.squeeze(-1), logits.argmax(-1))
    assert_close(routing.weights, weights.gather(-1, routing.indices))


def test_balance_is_one_for_balanced_hard_experts():
    logits = 100 * torch.eye(EXPERTS, dtype=torch.float64)
    balance = at(0.3, hard=True).eval()(logits).aux["balance"]
    assert_close(balance, torch.tensor(1.0).double())
    skewed = at(0.3, hard=True).eval()(logits[:1].expand(EXPERTS, -1)).aux["balance"]
    assert_close(skewed, torch.tensor(float(EXPERTS)).double())


@pytest.mark.parametrize("phase", FIRST)
def test_padding_does_not_count(phase):
    gate, x = build(FIRST[phase]).eval(), positions(6)
    mask = torch.tensor([False, True, False, False, True, True])
    routing = gate(x.masked_fill(mask.unsqueeze(-1), torch.nan), padding_mask=mask)
    assert not routing.to_dense().weights[mask].any()
    assert_close(routing.aux, gate(x[~mask]).aux)
    assert gate(x, padding_mask=torch.ones_like(mask)).aux["balance"] == 0
    assert gate(x[:0]).aux["balance"] == 0


def test_stages():
    stages = StagedSchedule(3, 4, hardens=False)
    assert [stages.stage_at(s) for s in (0, 2, 3, 6, 7, 10**6)] == [0, 0, 1, 1, 1, 1]
    assert StagedSchedule(0, 4).temperature_at(4) == 0.3
