from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from core_gates import (
    DenseToSparseGate,
    ExpertParallel,
    MoELayer,
    StackedExperts,
    StagedSchedule,
    spawn_experts,
)
from core_gates.moe import advance_gates

DIM, HIDDEN, EXPERTS = 16, 32, 8


class Stack(nn.Module):
    """Experts of one hidden layer, stacked."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, DIM) / 4)
        self.up_bias = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
        self.down = nn.Parameter(torch.randn(EXPERTS, DIM, HIDDEN) / 6)

    def dense(self, x):
        hidden = torch.einsum("ehd,...d->...eh", self.up, x) + self.up_bias
        return torch.einsum("edh,...eh->...ed", self.down, hidden.relu())


@pytest.fixture
def experts():
    torch.manual_seed(0)
    return Stack()


@pytest.mark.parametrize("dispatch", ["sorted", "dense"])
@pytest.mark.parametrize("training", [True, False])
def test_spawning_preserves_the_function(training, dispatch):
    torch.manual_seed(0)
    gate = DenseToSparseGate(DIM, EXPERTS, stages=StagedSchedule(1, 10))
    layer = MoELayer(gate, StackedExperts(EXPERTS, DIM, HIDDEN, bias=True), dispatch=dispatch)
    layer.train(training)
    x, target = torch.randn(512, DIM), torch.randn(512, DIM)
    before, routing = layer(x)
    assert gate.phase == "shared"
    assert not routing.indices.any()
    assert_close(before, layer.experts.dense(x)[:, 0])
    gate.update()
    spawn_experts(layer.experts, mask_prob=0.0)
    after, routing = layer(x)
    assert gate.phase == "annealing"
    assert (routing.weights > 0).all()
    if training:  # noise makes the weights uneven
        assert routing.weights.max() > 0.5
    change = (after - target).square().mean() - (before - target).square().mean()
    assert abs(change.item()) < 1e-6
    assert (after - before).abs().max() < 1e-6


def test_masks_are_independent_and_biases_are_kept(experts):
    original = deepcopy(experts)
    spawn_experts(experts, mask_prob=0.25, generator=torch.Generator().manual_seed(1))
    for name in ("up", "down"):
        copies, source = getattr(experts, name), getattr(original, name)[0]
        zero = copies == 0
        assert_close(copies, torch.where(zero, 0, source))
        assert ((zero.flatten(1).double().mean(-1) - 0.25).abs() < 0.1).all()
        assert abs((zero[0] & zero[1]).double().mean() - 0.0625) < 0.05
    assert_close(experts.up_bias, original.up_bias[:1].expand(EXPERTS, -1))


def test_rescaling_keeps_the_mean(experts):
    source = experts.up[2].detach().clone()
    spawn_experts(experts, source=2, mask_prob=0.5, rescale=True)
    left = experts.up != 0
    assert_close(experts.up[left], (2 * source).expand_as(experts.up)[left])


def test_noise_and_redrawing_are_relative_to_the_source(experts):
    source = experts.up[0].detach().clone()
    noisy, redrawn, anew = (deepcopy(experts) for _ in range(3))
    spawn_experts(noisy, mask_prob=0.0, noise_std=0.1)
    assert_close((noisy.up - source).std() / source.std(), torch.tensor(0.1), rtol=0.05, atol=0)
    spawn_experts(redrawn, mask_prob=0.0, reinit_fraction=0.3)
    assert abs((redrawn.up != source).double().mean() - 0.3) < 0.03
    spawn_experts(anew, mask_prob=0.0, reinit_fraction=1.0)
    assert_close(anew.up.std(), source.std(), rtol=0.05, atol=0)
    assert abs(torch.corrcoef(torch.stack([anew.up[0].flatten(), source.flatten()]))[0, 1]) < 0.15


def test_the_source_can_stay(experts):
    source = {name: p[3].detach().clone() for name, p in experts.named_parameters()}
    spawn_experts(experts, source=3, mask_prob=0.5, noise_std=1.0, keep_source=True)
    for name, parameter in experts.named_parameters():
        assert_close(parameter[3], source[name], rtol=0, atol=0)
    assert (experts.up[0] != source["up"]).any()


@pytest.mark.parametrize("state", ["copy", "reset"])
def test_optimizer_state(experts, state):
    other = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([*experts.parameters(), other], lr=0.01)

    def step():
        optimizer.zero_grad()
        (experts.dense(torch.randn(64, DIM)).square().sum() + other.sum()).backward()
        optimizer.step()

    step()
    before = deepcopy(optimizer.state[experts.up])
    spawn_experts(experts, source=1, optimizer=optimizer, optimizer_state=state)
    if state == "copy":
        after = optimizer.state[experts.up]
        assert after["step"] == before["step"]
        for moment in ("exp_avg", "exp_avg_sq"):
            assert_close(after[moment], before[moment][1:2].expand_as(experts.up), rtol=0, atol=0)
    else:
        assert not any(parameter in optimizer.state for parameter in experts.parameters())
    assert other in optimizer.state
    step()
    assert optimizer.state[experts.up]["step"] == (2 if state == "copy" else 1)


def test_a_state_of_another_shape_is_refused_before_anything_changes(experts):
    optimizer = torch.optim.Adafactor(experts.parameters())
    experts.dense(torch.randn(4, DIM)).square().sum().backward()
    optimizer.step()
    before = deepcopy(experts.state_dict())
    with pytest.raises(ValueError, match="cannot be copied: choose optimizer_state='reset'"):
        spawn_experts(experts, optimizer=optimizer)
    assert_close(dict(experts.state_dict()), dict(before), rtol=0, atol=0)
    spawn_experts(experts, optimizer=optimizer, optimizer_state="reset")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": 8}, "source must lie between 0 and 7, got 8"),
        ({"mask_prob": 1.0}, r"mask_prob must lie in \[0, 1\), got 1.0"),
        ({"reinit_fraction": 1.5}, "reinit_fraction must lie between 0 and 1, got 1.5"),
        ({"noise_std": -1.0}, "noise_std must not be negative, got -1.0"),
        ({"optimizer_state": "keep"}, "optimizer_state is 'keep'; choose one of copy, reset"),
    ],
)
def test_errors(refuses, experts, options, message):
    refuses(ValueError, (message, lambda: spawn_experts(experts, **options)))


def test_modules_that_stack_no_experts_are_refused():
    for module in (nn.Linear(2, 3), nn.Identity(), nn.PReLU()):
        if isinstance(module, nn.PReLU):
            module.scale = nn.Parameter(torch.ones(()))
        if isinstance(module, nn.Linear):
            module.bias = nn.Parameter(torch.ones(2))
        with pytest.raises(ValueError, match="stack the experts along its first dimension"):
            spawn_experts(module)


SHARED_STEPS = 3


def build(seed=0):
    """Two layers that start dense, and their optimizer."""
    torch.manual_seed(seed)
    layers = [
        MoELayer(
            DenseToSparseGate(DIM, EXPERTS, stages=StagedSchedule(SHARED_STEPS, 10)),
            StackedExperts(EXPERTS, DIM, HIDDEN, bias=True),
            return_routing=False,
        )
        for _ in range(2)
    ]
    model = nn.Sequential(*layers)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def train(model, optimizer, steps, *, rank=0):
    """Take steps of two micro-batches each, the same ones and noise whenever they are taken."""
    for step in steps:
        torch.manual_seed(step)
        for _ in range(2):
            x = torch.randn(32, DIM)
            (model(x) - x.roll(1, -1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.manual_seed(1000 + rank)  # other numbers on every rank
        advance_gates(model, optimizer, mask_prob=0.25, seed=7)


def test_experts_are_spawned_once_when_their_gate_leaves_the_first_phase():
    model, optimizer = build()
    train(model, optimizer, range(SHARED_STEPS - 1))
    before = [layer.experts.down_proj.clone() for layer in model]
    assert model[0].gate.phase == "shared"
    assert all((w[1:] != w[:1]).all() for w in before)
    train(model, optimizer, [SHARED_STEPS - 1])
    assert model[0].gate.phase == "annealing"
    masks = []
    for layer in model:
        weight = layer.experts.down_proj
        source = weight.abs().amax(0)
        mask = weight != 0
        assert torch.equal(weight.abs(), source * mask)
        assert 0.7 < mask.float().mean() < 0.8
        moments = optimizer.state[weight]["exp_avg"]
        assert torch.equal(moments, moments[:1].expand_as(moments))
        assert moments[0].any()
        masks.extend(mask)
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 2 * EXPERTS
    train(model, optimizer, [SHARED_STEPS])
    assert all((layer.experts.down_proj != 0).float().mean() > 0.99 for layer in model)


@pytest.mark.parametrize("stop", [SHARED_STEPS - 1, SHARED_STEPS])
def test_a_resumed_run_on_any_rank_spawns_the_same_experts(stop):
    model, optimizer = build()
    train(model, optimizer, range(SHARED_STEPS + 2))
    first, its_optimizer = build()
    train(first, its_optimizer, range(stop), rank=1)
    resumed, new_optimizer = build(seed=1)
    resumed.load_state_dict(first.state_dict())
    new_optimizer.load_state_dict(deepcopy(its_optimizer.state_dict()))
    train(resumed, new_optimizer, range(stop, SHARED_STEPS + 2), rank=2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_what_cannot_be_spawned_is_refused_before_any_gate_is_advanced(refuses):
    model, optimizer = build()
    refuses(ValueError, ("mask_prob", lambda: advance_gates(model, optimizer, mask_prob=1.5)))
    model[1].experts = ExpertParallel(model[1].experts)
    model[1].experts.num_ranks = 2
    with pytest.raises(ValueError, match="experts spread over 2 ranks cannot be spawned"):
        advance_gates(model, optimizer)
    assert [int(layer.gate.step) for layer in model] == [0, 0]
    assert StagedSchedule(0).spawns_at(0) is False
