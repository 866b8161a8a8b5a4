"""What users need from a room is imported from the room."""

import importlib
import subprocess
import sys

import pytest
import torch

ROOMS = [
    "adapters",
    "attention",
    "conv",
    "features",
    "gates",
    "moe",
    "monitor",
    "ops",
    "routing",
    "surgery",
    "training",
]


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
