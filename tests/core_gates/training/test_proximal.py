from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing import assert_close

from core_gates.adapters import SparseLowRank, rank_gates
from core_gates.training import ProximalStep

GOLDEN = Path(__file__).parents[2] / "golden" / "moe_inference_sora" / "sora.npz"


@pytest.fixture(scope="module")
def sora():
    with np.load(GOLDEN) as arrays:
        return {
            key: str(value) if value.dtype.kind == "U" else torch.from_numpy(value)
            for key, value in arrays.items()
        }


def trajectory(sora, i, rule):
    """The gate after each step with the learning rates and thresholds of the file.

    The published AdamW does not divide ε by the bias correction of the second moment.
    """
    gate = nn.Parameter(sora[f"opt{i}_p0"].clone())
    optimizer = torch.optim.AdamW([gate], 1.0, weight_decay=float(sora[f"opt{i}_wd"]))
    scaled = sora[f"opt{i}_mode"] == "lr_scaled"
    proximal = ProximalStep(optimizer, [gate], 0.0, scaled_by_lr=scaled, rule=rule)
    values = []
    names = ("grads", "lrs", "lambdas")
    for step, (grad, lr, threshold) in enumerate(
        zip(*(sora[f"opt{i}_{name}"] for name in names), strict=True), 1
    ):
        optimizer.param_groups[0] |= {"lr": float(lr), "eps": 1e-6 / (1 - 0.999**step) ** 0.5}
        proximal.threshold = float(threshold)
        gate.grad = grad
        optimizer.step()
        values.append(gate.detach().clone())
    return torch.stack(values)


@pytest.mark.parametrize("i", range(4))
@pytest.mark.parametrize(("rule", "name"), [("soft", "soft_threshold"), ("reference", "reference")])
def test_golden_trajectories(sora, i, rule, name):
    expected = sora[f"opt{i}_traj_{name}"]
    actual = trajectory(sora, i, rule)
    assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(actual == 0, expected == 0)


def at_rest(*values, dtype=None):
    """A gate with a gradient of zero, and an optimizer that leaves it where it is."""
    gate = nn.Parameter(torch.tensor(values, dtype=dtype))
    gate.grad = torch.zeros_like(gate)
    return gate, torch.optim.SGD([gate], lr=0.1)


OPTIMIZERS = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.02, momentum=0.9),
    "foreach": lambda groups: torch.optim.AdamW(groups, lr=0.02, foreach=True),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=0.02, fused=True),
    "tensor lr": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(0.02)),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.02),
    "Muon": lambda groups: torch.optim.Muon(groups, lr=0.02),
}


@pytest.mark.fault("core A5")
@pytest.mark.fault("core F5")
@pytest.mark.parametrize("scaled_by_lr", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_ends_its_step_with_the_threshold(name, scaled_by_lr):
    torch.manual_seed(0)
    start = torch.randn(3, 2), torch.randn(4, 5)
    results = []
    for shrunk in (False, True):
        weight, gate = (nn.Parameter(t.clone()) for t in start)
        optimizer = OPTIMIZERS[name]([{"params": [weight]}, {"params": [gate]}])
        if shrunk:
            ProximalStep(optimizer, [gate], 5.0 if scaled_by_lr else 0.1, scaled_by_lr=scaled_by_lr)
        for p in (weight, gate):
            p.grad = torch.ones_like(p)
        optimizer.step()
        results.append((weight.data, gate.data))
    (weight, gate), (same, shrunken) = results
    assert torch.equal(same, weight)
    assert_close(shrunken, gate.sign() * (gate.abs() - 0.1).clamp(min=0))
    assert 0 < (shrunken == 0).sum() < gate.numel()


def test_lr_scaled_thresholds_follow_the_learning_rate_of_each_group():
    gates = [nn.Parameter(torch.tensor([1.0, -1.0, 0.01], dtype=torch.float64)) for _ in range(2)]
    groups = [{"params": [gates[0]]}, {"params": [gates[1]], "lr": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    ProximalStep(optimizer, gates, 0.5, scaled_by_lr=True)
    for lr in (0.1, 0.05, 0.02):
        optimizer.param_groups[0]["lr"] = lr
        for gate in gates:
            gate.grad = torch.zeros_like(gate)
        optimizer.step()
    expected = torch.tensor([1 - 0.5 * 0.17, -1 + 0.5 * 0.17, 0], dtype=torch.float64)
    assert_close(gates[0].data, expected, rtol=0, atol=1e-12)
    assert gates[1].tolist() == [1.0, -1.0, 0.01]


def test_a_dead_gate_can_revive():
    gate = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([gate], lr=0.1, eps=1e-12)
    ProximalStep(optimizer, [gate], 0.03)
    gate.grad = torch.tensor([1.0, 0.0])
    optimizer.step()
    assert_close(gate.data, torch.tensor([-0.07, 0.0]), rtol=0, atol=1e-6)


def test_many_gates_of_different_shapes_are_thresholded_each():
    shapes = ((3,), (1, 2), (0,), ())
    gates = [nn.Parameter(torch.full(shape, 1.0)) for shape in shapes]
    gates.append(nn.Parameter(torch.ones(2, dtype=torch.float64)))
    optimizer = torch.optim.SGD(gates, lr=0.1)
    ProximalStep(optimizer, gates, 0.25)
    for gate in (*gates[:3], gates[4]):
        gate.grad = torch.zeros_like(gate)
    optimizer.step()
    assert (gates[0].tolist(), gates[1].tolist()) == ([0.75] * 3, [[0.75, 0.75]])
    assert (gates[4].tolist(), gates[3]) == ([0.75, 0.75], 1)


@pytest.mark.fault("core F5")
def test_gates_of_one_group_may_lie_on_two_devices():
    here, there = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, device="meta"))
    optimizer = torch.optim.SGD([there, here], lr=0.1)
    ProximalStep(optimizer, [there, here], 0.25)
    for gate in (here, there):
        gate.grad = torch.zeros_like(gate)
    optimizer.step()
    assert here.tolist() == [0.75] * 3
    assert there.is_meta


def sparsified(dtype):
    """How many of eight ranks remain after training on what needs three of them."""
    torch.manual_seed(0)
    adapter = SparseLowRank(6, 8, 8, alpha=8.0, initialization="ones").to(dtype)
    nn.init.normal_(adapter.lora_B, std=0.5)
    useful = torch.tensor([1.0] * 3 + [0.0] * 5)
    x = torch.randn(256, 6)
    target = (x @ (adapter.lora_B.float() * useful @ adapter.lora_A.float()).T).detach()
    optimizer = torch.optim.AdamW(
        [{"params": rank_gates(adapter), "lr": 4e-3, "weight_decay": 0.0}]
    )
    ProximalStep(optimizer, rank_gates(adapter), 1e-3)
    for _ in range(500):
        optimizer.zero_grad()
        (adapter(x.to(dtype)).float() - target).square().mean().backward()
        optimizer.step()
    return adapter.rank


@pytest.mark.fault("core F5")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sora_sparsifies_in_every_precision(dtype):
    assert sparsified(dtype) == 3


def sharded(dtype):
    """Three steps of a sharded model whose five ranks divide unevenly, against a whole one."""
    from torch.distributed.fsdp import fully_shard

    results = []
    for mesh in (None, init_device_mesh("cpu", (dist.get_world_size(),))):
        torch.manual_seed(0)
        model = nn.Sequential(SparseLowRank(6, 6, 5), SparseLowRank(6, 6, 1)).to(dtype)
        for adapter in model:
            nn.init.normal_(adapter.lora_B)
        if mesh is not None:
            for part in (*(adapter.lora_gate for adapter in model), *model, model):
                fully_shard(part, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        gates = rank_gates(model)
        ProximalStep(optimizer, gates, 0.2)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(4, 6, dtype=dtype)).float().square().mean().backward()
            optimizer.step()
        if mesh is not None:
            gates = [gate.full_tensor() for gate in gates]
        results.append([gate.detach() for gate in gates])
    return results


def sharded_in_two_precisions():
    return [sharded(dtype) for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.fault("core A5")
def test_two_ranks_of_fsdp_shrink_as_one_process(ranks):
    for of_rank in ranks(sharded_in_two_precisions):
        for whole, found in of_rank:
            assert_close(found, whole, rtol=1e-5, atol=1e-5)
            assert 0 < (whole[0] == 0).sum() < 5
            assert torch.equal(found[0] == 0, whole[0] == 0)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_gradient_scaler_skips_shrinks_nothing(fused):
    gate = nn.Parameter(torch.tensor([1.0, -0.01]))
    optimizer = torch.optim.AdamW([gate], lr=0.0, fused=fused)
    ProximalStep(optimizer, [gate], 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor, expected in ((float("inf"), [1.0, -0.01]), (1.0, [0.9, 0.0])):
        optimizer.zero_grad()
        scaler.scale(factor * gate.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert_close(gate.tolist(), expected)


def test_it_works_with_closures_and_can_be_removed():
    gate, optimizer = at_rest(1.0, -1.0)
    proximal = ProximalStep(optimizer, [gate], 0.25)
    assert (optimizer.step(lambda: 3.0), gate.tolist()) == (3.0, [0.75, -0.75])
    proximal.remove()
    optimizer.step()
    assert gate.tolist() == [0.75, -0.75]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -0.1}, "threshold must not be negative, got -0.1"),
        ({"threshold": float("nan")}, "threshold must not be negative, got nan"),
        ({"rule": "hard"}, "rule is 'hard'; choose one of soft, reference"),
        ({"gates": [torch.zeros(2)]}, "1 of 1 gates are not parameters of the optimizer"),
    ],
)
def test_settings_are_checked(options, message):
    gate, optimizer = at_rest(1.0)
    with pytest.raises(ValueError, match=message):
        ProximalStep(**{"optimizer": optimizer, "gates": [gate], "threshold": 0.1} | options)


@pytest.mark.fault("core F5")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gates_too_coarse_to_shrink_are_refused(dtype):
    gate, optimizer = at_rest(1.0, dtype=dtype)
    with pytest.raises(ValueError, match=f"gates of {dtype} are too coarse"):
        ProximalStep(optimizer, [gate], 0.1)
