"""What users need from a room is imported from the room."""

import importlib
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

import core_gates.conv
import core_gates.features
from core_gates.adapters import GatedLoraLinear, LoraGate, SparseLoraLinear, SparseLowRank
from core_gates.training import SyncBatchNorm

ROOMS = ["adapters", "conv", "features", "training"]


def room(name):
    return importlib.import_module(f"core_gates.{name}")


@pytest.mark.fault("core F7")
def test_what_users_need_is_in_the_rooms():
    from core_gates.adapters import LowRank
    from core_gates.gates import fetch_order, prediction_recall
    from core_gates.routing import RoutingOutput, positions_in_expert

    assert LowRank(torch.ones(2, 3), torch.ones(4, 2)).rank == 2
    routing = RoutingOutput(torch.ones(3, 1), torch.tensor([[1], [1], [0]]))
    assert fetch_order(routing, 2)[0].tolist() == [1, 0]
    assert prediction_recall(routing, routing).tolist() == [1, 1, 1]
    assert positions_in_expert(routing.indices, 2).flatten().tolist() == [0, 1, 0]


@pytest.mark.parametrize("name", ROOMS)
def test_rooms_list_their_names_in_order_and_with_docstrings(name):
    names = room(name).__all__
    assert list(names) == sorted(names)
    assert all(getattr(room(name), public).__doc__ for public in names)


def test_rooms_do_not_wait_for_each_other():
    code = "; ".join(f"import core_gates.{name}" for name in reversed(ROOMS))
    subprocess.run([sys.executable, "-c", code], check=True)


MODULES = {
    "GatedConv": lambda **new: core_gates.conv.GatedConv(2, 3, 3, **new),
    "PartialConv": lambda **new: core_gates.conv.PartialConv(2, 3, 3, **new),
    "SameConv": lambda **new: core_gates.conv.SameConv(2, 3, 3, **new),
    "FeatureSelectionGate": lambda **new: core_gates.features.FeatureSelectionGate(4, **new),
    "LowRankFeatureGate": lambda **new: core_gates.features.LowRankFeatureGate(4, 2, **new),
    "SelfGate": lambda **new: core_gates.features.SelfGate(4, 2, **new),
    "LoraGate": lambda **new: LoraGate(4, time="film", **new),
    "SparseLowRank": lambda **new: SparseLowRank(4, 3, 2, **new),
    "SyncBatchNorm": lambda **new: SyncBatchNorm(4, **new),
    "GatedLoraLinear": lambda **new: GatedLoraLinear(torch.nn.Linear(4, 3, **new), **new),
    "SparseLoraLinear": lambda **new: SparseLoraLinear(torch.nn.Linear(4, 3, **new), **new),
}


@pytest.mark.fault("core S9")
@pytest.mark.parametrize("name", MODULES)
def test_modules_are_built_anywhere_and_reset_completely(name):
    expected = MODULES[name](dtype=torch.float64).state_dict()
    module = MODULES[name](device="meta", dtype=torch.float64)
    assert all(tensor.is_meta for tensor in module.state_dict().values() if tensor.numel())
    module.to_empty(device="cpu")
    for tensor in module.state_dict().values():
        tensor.fill_(77)
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    state = module.state_dict()
    assert {k: v.dtype for k, v in state.items()} == {k: v.dtype for k, v in expected.items()}
    for key, value in state.items():
        assert not (value == 77).any(), key
        if "norm" in key or isinstance(module, SyncBatchNorm):
            assert_close(value, expected[key], rtol=0, atol=0)
