from copy import deepcopy

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from core_gates import GateMonitor, TopKGate, collect_routing
from core_gates.features.selection import FeatureSelectionGate
from core_gates.training.gradient_routing import GradientRouting
from core_gates.training.proximal import ProximalStep

MODES = ["dual", "every_k", "joint", "off", "reference"]


class Net(nn.Module):
    """A gated net with everything that a second pass could disturb."""

    def __init__(self, dropout=0.0, norm=nn.LayerNorm):
        super().__init__()
        self.first, self.norm, self.gate = nn.Linear(3, 8), norm(8), FeatureSelectionGate(8)
        self.drop, self.last = nn.Dropout(dropout), nn.Linear(8, 2)
        self.last_gate = FeatureSelectionGate(2)

    def forward(self, x):
        return self.last_gate(self.last(self.drop(self.gate(self.norm(self.first(x)).relu()))))


def build(
    mode="dual", *, make=Net, seed=0, dtype=torch.float32, kind=torch.optim.Adam, lr=0.01, **options
):
    """A model and its routing; gates learn with their own rate."""
    torch.manual_seed(seed)
    model = make().to(dtype)
    gates = [p for n, p in model.named_parameters() if "gate" in n]
    weights = [p for n, p in model.named_parameters() if "gate" not in n]
    routing = GradientRouting(kind(weights, lr=lr), kind(gates, lr=0.05), mode=mode, **options)
    return model, routing


def batch(step=0, n=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.stack([x.sum(-1), x.prod(-1)], -1).to(dtype)


def loss_on(x, target):
    return lambda model: F.mse_loss(model(x), target)


def train(model, routing, steps=3, dtype=torch.float32):
    return [routing.step(model, loss_on(*batch(t, dtype=dtype))) for t in range(steps)]


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


GATES = {"gate.logits", "last_gate.logits"}
WEIGHTS = {"first.weight", "first.bias", "norm.weight", "norm.bias", "last.weight", "last.bias"}


def test_each_pass_moves_its_own_group_from_its_own_gradient_alone():
    model, routing = build()
    seen = []
    for optimizer in (routing.gate_optimizer, routing.optimizer):

        def note(*_):
            grads = {n for n, p in model.named_parameters() if p.grad is not None}
            seen.append((grads, snapshot(model)))

        optimizer.register_step_pre_hook(note)
    before = snapshot(model)
    routing.step(model, loss_on(*batch()))
    (gate_grads, at_gates), (weight_grads, at_weights) = seen
    assert gate_grads == GATES
    assert weight_grads == WEIGHTS
    assert not changed(before, at_gates)
    assert changed(at_gates, at_weights) == GATES
    assert changed(at_weights, snapshot(model)) == WEIGHTS


def test_dual_is_the_rule_written_out():
    model, routing = build(kind=torch.optim.SGD, clip=0.3, gate_clip=0.02)
    twin = deepcopy(model)
    gates = [p for n, p in twin.named_parameters() if "gate" in n]
    weights = [p for n, p in twin.named_parameters() if "gate" not in n]
    for t in range(3):
        loss = loss_on(*batch(t))
        step = routing.step(model, loss)
        for group, clip, lr in ((gates, 0.02, 0.05), (weights, 0.3, 0.01)):
            grads = torch.autograd.grad(loss(twin), group)
            norm = torch.cat([g.flatten() for g in grads]).norm()
            assert norm > clip
            for p, g in zip(group, grads, strict=True):
                p.data -= lr * g * clip / norm
            measured = step.gate_grad_norm if group is gates else step.grad_norm
            assert_close(measured, norm)
    assert_close(snapshot(model), snapshot(twin), rtol=1e-5, atol=1e-6)


def test_the_gate_loss_may_be_another_one():
    model, routing = build()
    x, target = batch()
    step = routing.step(model, loss_on(x, target), lambda m: 3 * F.l1_loss(m(x), target))
    twin, _ = build()
    assert_close(step.gate_loss, 3 * F.l1_loss(twin(x), target).detach())
    assert not torch.equal(step.loss, step.gate_loss)


def test_joint_moves_both_groups_from_one_pass():
    model, routing = build("joint", kind=torch.optim.SGD, clip=0.3, gate_clip=0.02)
    before = deepcopy(model)
    calls = []

    def loss(m):
        calls.append(m)
        return loss_on(*batch())(m)

    step = routing.step(model, loss)
    assert len(calls) == 1
    assert step.gate_loss is None
    loss_on(*batch())(before).backward()
    for name, clip, lr in (("gate", 0.02, 0.05), ("", 0.3, 0.01)):
        group = [
            (p, q)
            for (n, p), q in zip(model.named_parameters(), before.parameters(), strict=True)
            if ("gate" in n) == bool(name)
        ]
        norm = nn.utils.clip_grad_norm_([q for _, q in group], clip)
        assert_close(step.gate_grad_norm if name else step.grad_norm, norm)
        for p, q in group:
            assert_close(p.data, q.data - lr * q.grad)


def test_reference_moves_the_weights_along_the_sum_of_both_gradients():
    model, routing = build("reference", kind=torch.optim.SGD)
    loss = loss_on(*batch())
    twin = deepcopy(model)
    gates = [p for n, p in twin.named_parameters() if "gate" in n]
    weights = [p for n, p in twin.named_parameters() if "gate" not in n]
    first = torch.autograd.grad(loss(twin), [*weights, *gates])
    for gate, grad in zip(gates, first[len(weights) :], strict=True):
        gate.data -= 0.05 * grad
    second = torch.autograd.grad(loss(twin), weights)
    for p, a, b in zip(weights, first[: len(weights)], second, strict=True):
        p.data -= 0.01 * (a + b)
    routing.step(model, loss)
    assert_close(snapshot(model), snapshot(twin), rtol=1e-5, atol=1e-6)


def test_every_k_and_off():
    moved = {}
    for mode, k in (("every_k", 3), ("off", 1), ("dual", 3)):
        model, routing = build(mode, k=k)
        moved[mode] = []
        for t in range(5):
            before = snapshot(model)
            step = routing.step(model, loss_on(*batch(t)))
            names = changed(before, snapshot(model))
            assert names - GATES == WEIGHTS
            assert bool(names & GATES) == (step.gate_loss is not None)
            moved[mode].append(bool(names & GATES))
    assert moved["every_k"] == [True, False, False, True, False]
    assert moved["off"] == [False] * 5
    assert moved["dual"] == [True] * 5
    model, resumed = build("every_k", k=3)
    resumed.load_state_dict({"num_steps": 3})
    assert resumed.step(model, loss_on(*batch())).gate_loss is not None
    assert resumed.state_dict() == {"num_steps": 4}


@pytest.mark.parametrize("mode", ["dual", "reference"])
def test_the_gate_pass_leaves_buffers_and_random_numbers_as_they_were(mode):
    """Without its step the training is that of a plain loop, bit for bit."""

    def make():
        return Net(dropout=0.5, norm=nn.BatchNorm1d)

    model, routing = build(mode, make=make)
    if mode == "reference":  # its first pass adds to the gradient: no loss, no addition
        gate_loss = lambda m: 0 * m(batch()[0]).sum()  # noqa: E731
    else:
        gate_loss = None
        routing.gate_optimizer.param_groups[0]["lr"] = 0.0
    plain = build(make=make)[0]
    optimizer = torch.optim.Adam([p for n, p in plain.named_parameters() if "gate" not in n], 0.01)
    torch.manual_seed(7)
    for t in range(3):
        routing.step(model, loss_on(*batch(t)), gate_loss)
    state = torch.get_rng_state()
    torch.manual_seed(7)
    for t in range(3):
        optimizer.zero_grad()
        loss_on(*batch(t))(plain).backward()
        optimizer.step()
    assert torch.equal(torch.get_rng_state(), state)
    assert plain.norm.num_batches_tracked == 3
    assert not changed(snapshot(plain), snapshot(model))


def test_both_passes_draw_the_same_masks_for_every_micro_batch():
    model, routing = build(make=lambda: Net(dropout=0.5))
    masks = []
    model.drop.register_forward_hook(lambda _m, inputs, out: masks.append((out == 0).clone()))
    losses = [loss_on(*batch(t)) for t in range(3)]
    routing.step(model, losses)
    assert len(masks) == 6
    for gate_pass, main_pass in zip(masks[:3], masks[3:], strict=True):
        assert torch.equal(gate_pass, main_pass)  # positive gates change no zero
    assert not torch.equal(masks[0], masks[1])


def test_buffers_return_when_the_loss_raises():
    model, routing = build(make=lambda: Net(norm=nn.BatchNorm1d))
    before, state = snapshot(model), torch.get_rng_state()

    def loss(m):
        m(batch()[0])
        torch.rand(3)
        raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        routing.step(model, loss)
    assert not changed(before, snapshot(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_accumulation_equals_one_batch(mode):
    whole, routing = build(mode, dtype=torch.float64, clip=0.5, gate_clip=0.1)
    parts, routing_of_parts = build(mode, dtype=torch.float64, clip=0.5, gate_clip=0.1)
    for t in range(3):
        x, target = batch(t, 8, torch.float64)
        one = routing.step(whole, loss_on(x, target))
        four = routing_of_parts.step(
            parts, [loss_on(*pair) for pair in zip(x.split(2), target.split(2), strict=True)]
        )
        for a, b in zip(one, four, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.allclose(a.double(), b.double(), rtol=1e-10)
    assert_close(snapshot(parts), snapshot(whole), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_scale_changes_nothing(mode):
    """Float32, clipping both groups: the clip must see unscaled gradients."""
    results = []
    for exponent in (None, 0, 8, 16):
        scaler = None if exponent is None else torch.amp.GradScaler("cpu", init_scale=2.0**exponent)
        model, routing = build(mode, clip=0.3, gate_clip=0.02, scaler=scaler)
        train(model, routing)
        results.append(snapshot(model))
    for other in results[1:]:
        assert_close(other, results[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_an_overflow_skips_the_step_and_lowers_the_scale_once(mode):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model, routing = build(mode, scaler=scaler)
    before = snapshot(model)
    x, target = batch()
    routing.step(model, lambda m: F.mse_loss(m(x), target) * torch.inf)
    assert not changed(before, snapshot(model))
    assert scaler.get_scale() == 2.0**9
    routing.step(model, loss_on(x, target))
    assert scaler.get_scale() == 2.0**9
    assert changed(before, snapshot(model)) >= WEIGHTS


@pytest.mark.parametrize("overflowing", ["gate.logits", "first.weight"])
@pytest.mark.parametrize("mode", ["dual", "reference", "every_k", "joint"])
def test_an_overflow_of_one_group_skips_both(mode, overflowing):
    """Nor does the optimizer of the gates remember the step: the next one is as if none was."""
    found = []
    for disturbed in (True, False):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        model, routing = build(mode, scaler=scaler, clip=0.3, gate_clip=0.02)
        train(model, routing, 2)
        if disturbed:
            before = snapshot(model)
            hook = model.get_parameter(overflowing).register_hook(lambda grad: grad * torch.inf)
            train(model, routing, 1)
            hook.remove()
            assert not changed(before, snapshot(model))
            assert scaler.get_scale() == 2.0**9
        train(model, routing, 1)
        found.append(snapshot(model))
    assert changed(before, found[0]) >= WEIGHTS
    assert_close(found[0], found[1], rtol=0, atol=1e-6)


def test_the_main_pass_sees_the_new_gates_under_an_outer_autocast():
    """Autocast keeps half-precision copies of weights; those of gates are outdated by then."""

    class LinearGate(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.body = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x):
            return self.gate(x).sigmoid() * self.body(x)

    model, routing = build(make=LinearGate)
    x, _ = batch()
    outputs = []

    def loss(m):
        outputs.append(m(x))
        return outputs[-1].float().square().mean()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing.gate_optimizer.param_groups[0]["lr"] = 1.0
        routing.step(model, loss)
    assert not torch.equal(outputs[0], outputs[1])


def test_unused_gates_keep_their_state():
    class WithSpare(Net):
        def __init__(self):
            super().__init__()
            self.spare_gate = FeatureSelectionGate(3)

    model, routing = build(make=WithSpare)
    before = snapshot(model)
    train(model, routing)
    assert changed(before, snapshot(model)) == GATES | WEIGHTS
    assert model.spare_gate.logits not in routing.gate_optimizer.state
    with pytest.raises(ValueError, match="the gate loss depends on no parameter"):
        routing.step(model, lambda m: m.first.weight.sum())


def test_gradients_do_not_outlive_the_step_for_gates():
    for mode in MODES:
        model, routing = build(mode)
        train(model, routing, 1)
        left = {n for n, p in model.named_parameters() if p.grad is not None}
        assert left == WEIGHTS


def test_it_resumes_bit_for_bit():
    def make():
        return Net(dropout=0.5, norm=nn.BatchNorm1d)

    whole, routing = build("every_k", make=make, k=2)
    train(whole, routing, 3)
    parts = (routing, routing.optimizer, routing.gate_optimizer)
    state = deepcopy([whole.state_dict(), *(p.state_dict() for p in parts)])
    numbers = torch.get_rng_state()
    train(whole, routing, 3)
    resumed, routing = build("every_k", make=make, k=2, seed=1)
    parts = (resumed, routing, routing.optimizer, routing.gate_optimizer)
    for part, saved in zip(parts, state, strict=True):
        part.load_state_dict(saved)
    torch.set_rng_state(numbers)
    train(resumed, routing, 3)
    assert not changed(snapshot(whole), snapshot(resumed))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "both"}, "mode is 'both'; choose one of dual, reference, joint, every_k, off"),
        ({"clip": 0.0}, r"clip must be positive, got 0\.0"),
        ({"gate_clip": -1.0}, r"gate_clip must be positive, got -1\.0"),
        ({"k": 0}, "k must be positive, got 0"),
        ({"gate_optimizer": None}, "mode 'dual' needs a gate_optimizer"),
    ],
)
def test_arguments_are_checked(options, message):
    _, routing = build()
    arguments = {"optimizer": routing.optimizer, "gate_optimizer": routing.gate_optimizer}
    with pytest.raises(ValueError, match=message):
        GradientRouting(**arguments | options)


def test_optimizers_must_not_share_parameters_and_batches_not_be_empty():
    model, routing = build()
    everything = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match="2 parameters are in both optimizers"):
        GradientRouting(everything, routing.gate_optimizer)
    with pytest.raises(ValueError, match="at least one micro-batch"):
        routing.step(model, [])


def test_mode_off_needs_no_gates():
    model = nn.Linear(3, 2)
    routing = GradientRouting(torch.optim.SGD(model.parameters(), 0.1), None, mode="off")
    before = snapshot(model)
    assert routing.step(model, loss_on(*batch())).grad_norm is None
    assert changed(before, snapshot(model)) == {"weight", "bias"}


def frozen(mode, *, weights=False, gates=False, **options):
    """A model whose weights or gates do not learn, and its routing."""
    model, routing = build(mode, **options)
    for name, parameter in model.named_parameters():
        if gates if "gate" in name else weights:
            parameter.requires_grad_(False)
    return model, routing


@pytest.mark.fault("core A16")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scaled", [False, True])
def test_gates_learn_while_all_weights_are_frozen(mode, scaled):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if scaled else None
    model, routing = frozen(mode, weights=True, clip=10.0, gate_clip=10.0, scaler=scaler)
    before = snapshot(model)
    steps = train(model, routing)
    assert changed(before, snapshot(model)) == (set() if mode == "off" else GATES)
    twin, _ = frozen(mode, weights=True)
    if mode == "off":
        assert steps[0].gate_grad_norm is None
    else:
        assert all(step.gate_grad_norm > 0 for step in steps)
    if mode in ("joint", "off"):
        assert_close(steps[0].loss, loss_on(*batch())(twin).detach())
    assert all(step.loss.isfinite() for step in steps)


@pytest.mark.fault("core A16")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scaled", [False, True])
def test_weights_learn_while_all_gates_are_frozen(mode, scaled):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if scaled else None
    model, routing = frozen(mode, gates=True, clip=10.0, gate_clip=10.0, scaler=scaler)
    before = snapshot(model)
    steps = train(model, routing)
    assert changed(before, snapshot(model)) == WEIGHTS
    assert all(step.grad_norm > 0 for step in steps)
    if mode != "reference":  # which adds the gradients of both passes
        plain, unrouted = frozen("off", gates=True, clip=10.0)
        train(plain, unrouted)
        assert not changed(snapshot(plain), snapshot(model))


@pytest.mark.fault("core A16")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_frozen_model_only_measures_its_loss(mode, scaled):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if scaled else None
    model, routing = frozen(mode, weights=True, gates=True, clip=1.0, scaler=scaler)
    before = snapshot(model)
    step = routing.step(model, loss_on(*batch()))
    assert not changed(before, snapshot(model))
    assert_close(step.loss, loss_on(*batch())(model))
    assert step.grad_norm is None
    assert step.gate_grad_norm is None


def test_gates_and_optimizer_with_proximal_steps_work_together():
    model, routing = build()
    ProximalStep(routing.gate_optimizer, routing.gates, 10.0)
    train(model, routing, 1)
    assert not model.gate.logits.any()
    assert model.first.weight.all()


def shard(tensors, accumulate):
    """This rank's half of each micro-batch; everything without ranks."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    pairs = zip(*(t.chunk(accumulate) for t in tensors), strict=True)
    return [loss_on(*(t.chunk(size)[rank] for t in pair)) for pair in pairs]


def train_on_ranks(mode, accumulate, bare, clip, still=frozenset()):
    """Five steps of Adam in float64; parameters named in ``still`` are frozen."""
    options = {}
    if dist.is_initialized() and bare:
        options = {"group": dist.group.WORLD, "backward": lambda loss: loss.backward()}
    model, routing = build(mode, dtype=torch.float64, clip=clip, gate_clip=clip, **options)
    for name in still:
        model.get_parameter(name).requires_grad_(False)
    runner = model
    if dist.is_initialized() and bare:
        for p in filter(lambda p: p.requires_grad, model.parameters()):
            p.register_post_accumulate_grad_hook(average)
    elif dist.is_initialized():
        runner = DistributedDataParallel(model)
    for t in range(5):
        routing.step(runner, shard(batch(t, 8, torch.float64), accumulate))
    return dict(model.state_dict())


def average(parameter):
    """Stands for the hooks of a strategy that leaves the model bare."""
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()


RUNS = [
    ("dual", 1, False, 0.1),
    ("dual", 2, False, 0.1),
    ("dual", 1, True, 0.1),
    ("every_k", 1, False, 0.1),
    ("joint", 2, False, 0.1),
    ("reference", 2, False, 0.1),
    ("dual", 2, False, 0.1, WEIGHTS),
    ("dual", 2, True, 0.1, WEIGHTS),
    ("dual", 2, False, 0.1, GATES),
]


def everything_on_ranks():
    return {"trained": [train_on_ranks(*run) for run in RUNS], "averaged": average_unused()}


def average_unused():
    """A gate that one rank uses, and one that none uses."""
    from core_gates.training.gradient_routing import _average

    gates = [torch.zeros(2, 3), torch.zeros(4), torch.zeros(1)]
    rank = dist.get_rank()
    grads = [torch.full((2, 3), 2.0 * (rank + 1)), torch.ones(4) if rank else None, None]
    means = _average(grads, gates, dist.group.WORLD)
    return [torch.full((1,), torch.nan) if mean is None else mean for mean in means]


def test_two_ranks_equal_one_process(ranks):
    start = snapshot(build(dtype=torch.float64)[0])
    expected = [train_on_ranks(*run) for run in RUNS]
    for result in ranks(everything_on_ranks, timeout=300.0):
        for run, mine, one in zip(RUNS, result["trained"], expected, strict=True):
            assert changed(start, one) == (GATES | WEIGHTS) - set().union(*run[4:])
            assert_close(mine, one, rtol=0, atol=1e-10, msg=lambda m, run=run: f"{run}: {m}")
        full, single, none = result["averaged"]
        assert torch.equal(full, torch.full((2, 3), 3.0))
        assert torch.equal(single, torch.full((4,), 0.5))
        assert none.isnan()


class Routed(Net):
    """A gated net that also routes to experts."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = TopKGate(3, 2, k=1), nn.Linear(3, 4)

    def forward(self, x):
        routing = self.router(x).to_dense()
        outputs = self.experts(x).unflatten(-1, (2, 2))
        return super().forward(x) + (routing.weights.unsqueeze(-1) * outputs).sum(-2)


@pytest.mark.parametrize("mode", MODES)
def test_routing_gates_and_monitors_count_a_batch_once(mode):
    """The gate pass repeats the positions of the main pass: balancing must not see them twice."""
    model, routing = build(mode, make=Routed)
    with collect_routing(model) as routings, GateMonitor(model) as monitor:
        train(model, routing, steps=2)
    assert len(routings["router"]) == 2
    assert monitor.compute()["gate"]["values"] == 2 * 8
