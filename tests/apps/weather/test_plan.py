"""What ``gates weather plan`` says, against real runs."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from apps.weather.plan import network_cost, plan, step_of
from weather.models.adas.presets import adas_preset
from weather.models.fengwu.network import fengwu_preset

MAKE = {"adas": adas_preset, "fengwu": fengwu_preset}


@pytest.fixture
def planned(tmp_path):
    place = SimpleNamespace(run_folder=SimpleNamespace(path=tmp_path))

    def run(**options):
        plan(place, **options)
        content = json.loads((tmp_path / "plan.json").read_text())
        return {
            section: {name: entry["value"] for name, entry in lines.items()}
            for section, lines in content.items()
        }

    return run


def real(network, size="tiny", batch_size=1):
    torch.manual_seed(0)
    module = MAKE[network](size).train()
    states = torch.randn(batch_size, module.num_channels, *module.grid_shape)
    return module, step_of(module, states)


def measured_memory(network, size):
    """Largest number of bytes that PyTorch's own allocator has handed out, weights included."""
    activities = [ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True, acc_events=True) as record:
        module, loss = real(network, size)
        optimizer = torch.optim.AdamW(module.parameters())
        for _ in range(2):  # from the second step on there are moments
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()
    events = record.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    now = most = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        now += size
        most = max(most, now)
    return most


@pytest.mark.parametrize("network", MAKE)
def test_operations_are_those_of_a_real_run(network):
    _, cost = network_cost(network, "tiny")
    module, loss = real(network)
    with FlopCounterMode(display=False) as counter:
        value = loss()
        forward = counter.get_total_flops()
        value.backward()
    assert (cost.forward, cost.training) == (forward, counter.get_total_flops())
    assert sum(p.numel() for p in module.parameters()) > 1e6


@pytest.mark.parametrize(
    ("network", "size"),
    [
        ("fengwu", "unit"),
        pytest.param("fengwu", "tiny", marks=pytest.mark.slow),
        pytest.param("adas", "unit", marks=pytest.mark.slow),
        pytest.param("adas", "tiny", marks=pytest.mark.slow),
    ],
)
def test_memory_is_that_of_a_real_run(planned, network, size, capfd):
    found = planned(size=size, networks=(network,), gpus=1)
    lines = found[f"{network}: memory of each of 1 GPUs"]
    assert lines["total"] == pytest.approx(measured_memory(network, size), rel=0.15)
    assert lines["activations"] > 0.6 * lines["total"]  # what had to be found out


def test_parts_of_the_memory(planned):
    found = planned(size="unit", networks=("fengwu",), gpus=4)
    weights = found["fengwu: network"]["parameters"]
    lines = found["fengwu: memory of each of 4 GPUs"]
    assert lines["weights"] == lines["their gradients"] == 4 * weights
    assert lines["their Adam moments"] == 8 * weights
    assert lines["total"] == sum(lines.values()) - lines["total"]
    spread = planned(size="unit", networks=("fengwu",), gpus=4, sharded=True)
    parts = spread["fengwu: memory of each of 4 GPUs"]
    assert (parts["weights"], parts["their Adam moments"]) == (weights, 2 * weights)
    assert 0 < parts["gathered weights"] <= 8 * weights
    assert parts["activations"] == lines["activations"]
    half = planned(size="unit", networks=("fengwu",), precision="bf16", gpus=4)
    ratio = half["fengwu: memory of each of 4 GPUs"]["activations"] / lines["activations"]
    assert ratio == pytest.approx(0.5, abs=0.02)
    twice = planned(size="unit", networks=("fengwu",), batch_size=2, gpus=4)
    ratio = twice["fengwu: memory of each of 4 GPUs"]["activations"] / lines["activations"]
    assert ratio == pytest.approx(2, abs=0.1)
    arithmetic = "fengwu: arithmetic of a sample"
    assert twice[arithmetic] == found[arithmetic]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gpus": 0}, "--gpus is 0, expected 1 to 1,000,000"),
        ({"batch_size": 0}, "--batch_size is 0"),
        ({"size": "huge"}, "--size of adas is 'huge'; choose one of official, fnp, small"),
        ({"networks": ("pangu",)}, "--networks is 'pangu'; choose one of adas, fengwu"),
    ],
)
def test_impossible_options(planned, options, words, refused):
    refused(words, planned, **options)
