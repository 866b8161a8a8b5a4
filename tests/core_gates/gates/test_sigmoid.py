import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed as dist
from torch.testing import assert_close

from core_gates import SigmoidGate, balance_loss, update_gates
from core_gates.routing import count_routed
from tests.core_gates.drawn import identity_gate

GOLDEN = ["standard_T24_E6_k2", "standard_T32_E8_k3"]


def load_cv(counts):
    load = counts[:-1].double()
    return float(load.std(correction=0) / load.mean())


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_choice_weights_balance_and_next_bias(golden, name):
    g = golden(name)
    gate = identity_gate(
        SigmoidGate, g["logits"].shape[1], k=int(g["k"]), balance_rate=float(g["bias_update_speed"])
    )
    gate.balance_bias.copy_(g["bias"])
    routing = gate(g["logits"])
    update_gates(gate)
    chosen = g["sigmoid_bias_index"].sort(-1).values
    assert torch.equal(routing.indices.sort(-1).values, chosen)
    assert_close(routing.to_dense().weights, g["sigmoid_bias_gate"], rtol=0, atol=1e-10)
    sequence = balance_loss(routing, scope="sequence")
    assert_close(sequence, g["dsv3_seq_balance"], rtol=0, atol=1e-10)
    assert_close(gate.balance_bias, g["bias_next_sign"], rtol=0, atol=1e-10)


def test_dense_form():
    gate = SigmoidGate(3, 4, renormalize=False, scale=2.5, bias=True)
    torch.nn.init.normal_(gate.bias)
    x = torch.randn(5, 3)
    routing = gate(x)
    assert_close(routing.weights, 2.5 / (1 + torch.exp(-(x @ gate.weight.T + gate.bias))))
    assert routing.indices is None
    assert_close(SigmoidGate(3, 4, scale=2.5)(x).weights.sum(-1), torch.full((5,), 2.5))


@pytest.mark.fault("core F8")
@pytest.mark.parametrize("balanced", [False, True])
def test_logits_choose_where_scores_saturate(balanced):
    gate = identity_gate(SigmoidGate, 4, k=1).float()
    x = torch.tensor([[20.0, 30.0, 25.0, 1.0], [-200.0, -300.0, -150.0, -190.0]])
    if balanced:
        gate.balance_bias += 0.25
    assert gate(x).indices.tolist() == [[1], [2]]
    gate.k = 2
    assert gate(x).indices.sort().values.tolist() == [[1, 2], [2, 3]]
    gate.balance_bias[3] = 1  # a bias still outweighs any logit
    assert (gate(x).indices == 3).any(-1).all()


@pytest.mark.fault("core F8")
def test_logits_choose_groups_where_scores_saturate():
    gate = identity_gate(SigmoidGate, 6, k=1, num_groups=3, num_kept_groups=1).float()
    assert gate(torch.tensor([[20.0, 30.0, 21.0, 40.0, 22.0, 22.0]])).indices.tolist() == [[3]]


def test_bias_chooses_and_never_weighs():
    gate = identity_gate(SigmoidGate, 4, k=2, renormalize=False)
    x = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    gate.balance_bias.copy_(torch.tensor([-9.0, 0.0, 0.0, 9.0]))
    routing = gate(x)
    assert routing.indices.tolist() == [[3, 1]]
    assert_close(routing.weights, x[:, [3, 1]].sigmoid())


def test_scores_that_underflow_keep_their_ratio_and_a_gradient():
    gate = SigmoidGate(2, 2, k=2)
    gate.weight.data.copy_(torch.eye(2))
    x = torch.tensor([[-300.0, -301.0]], requires_grad=True)
    weights = gate(x).to_dense().weights
    assert_close(weights, torch.tensor([[0.0, -1.0]]).softmax(-1))
    weights[0, 0].backward()
    assert x.grad.abs().min() > 0.1
    assert balance_loss(gate(x)) >= 1


@given(st.integers(0, 500), st.integers(1, 3), st.integers(1, 3))
def test_groups_are_ranked_by_their_two_best_and_ties_go_to_the_lowest(seed, kept, size):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (4, 3 * size), generator=generator).double()  # with ties
    k = min(2, kept * size)
    gate = identity_gate(SigmoidGate, 3 * size, k=k, num_groups=3, num_kept_groups=kept)
    gate.balance_bias.copy_(torch.randint(2, (3 * size,), generator=generator))
    for row, indices in zip(x, gate(x).indices.tolist(), strict=True):
        biased = (row.sigmoid() + gate.balance_bias).tolist()
        groups = [biased[g * size : (g + 1) * size] for g in range(3)]
        strength = [sum(sorted(group)[-2:]) for group in groups]
        open_ = sorted(range(3), key=lambda g: -strength[g])[:kept]
        allowed = [e for e in range(3 * size) if e // size in open_]
        assert indices == sorted(allowed, key=lambda e: -biased[e])[:k]


def test_one_step_over_all_micro_batches_counts_no_padding():
    gate = identity_gate(SigmoidGate, 3, k=1, balance_rate=0.5)
    x = torch.eye(3, dtype=torch.float64)
    gate(x[[0, 0, 1]])
    gate(x[[1, 2, 2]], padding_mask=torch.tensor([False, False, True]))
    assert not gate.balance_bias.any()
    update_gates(gate)
    assert gate.balance_bias.tolist() == [-0.5, -0.5, 0.5]  # counts 2, 2, 1


def test_centered_step_has_mean_zero():
    gate = identity_gate(SigmoidGate, 3, k=1, balance_rate=0.3, centered=True)
    gate(torch.eye(3, dtype=torch.float64)[[0, 0, 1, 2]])
    update_gates(gate)
    assert_close(gate.balance_bias, torch.tensor([-0.4, 0.2, 0.2], dtype=torch.float64))


def test_nothing_routed_or_no_rate_moves_nothing():
    for rate, x in ((0.1, torch.ones(0, 3)), (0.0, torch.ones(2, 3))):
        gate = SigmoidGate(3, 3, k=1, balance_rate=rate)
        gate(x)
        update_gates(gate)
        assert not gate.balance_bias.any()


def test_positions_that_are_not_finite_move_nothing():
    gate = identity_gate(SigmoidGate, 3, k=1, balance_rate=1.0)
    x = torch.eye(3, dtype=torch.float64)[[1, 2]]
    x[0, 0] = torch.nan
    gate(x)
    update_gates(gate)
    assert gate.balance_bias.tolist() == [1.0, 1.0, -1.0]


@pytest.mark.parametrize(
    ("skew", "seed"),
    [
        (1.0, 0),
        *(pytest.param(s, seed, marks=pytest.mark.slow) for s in (1, 1.5) for seed in (1, 3)),
    ],
)
def test_skewed_load_is_balanced_within_500_steps(skew, seed):
    torch.manual_seed(seed)
    gate = SigmoidGate(16, 16, k=2, balance_rate=1e-3)
    torch.nn.init.normal_(gate.weight, std=0.25)
    batches = (torch.randn(8, 8192, 16) + skew * torch.randn(16)).unbind()
    history = []
    for step in range(501):
        with torch.no_grad():
            history.append(load_cv(count_routed(gate(batches[step % 8]))))
        update_gates(gate)
        if history[-1] < 0.1:
            break
    assert 1 <= history[0] <= 2
    assert history[-1] < 0.1


def balanced_bias(x, sizes):
    """Return the bias after three steps on this rank's part of every batch."""
    torch.manual_seed(3)
    gate = SigmoidGate(4, 5, k=2, balance_rate=0.01)
    torch.nn.init.normal_(gate.weight)
    for batch in x:
        mine = batch.split(sizes)[dist.get_rank()] if sizes else batch
        for micro_batch in mine.split(3):
            gate(micro_batch)
        update_gates(gate)
    return gate.balance_bias


def biases_of_rank(x):
    return [balanced_bias(x, sizes) for sizes in ([4, 5], [9, 0])]


def test_counts_of_two_ranks_equal_one_process(ranks):
    x = torch.randn(3, 9, 4, generator=torch.Generator().manual_seed(0)) + 1
    expected = balanced_bias(x, None)
    assert expected.abs().max() > 0.01
    for biases in ranks(biases_of_rank, x):
        for bias in biases:
            assert_close(bias, expected, rtol=0, atol=0)
