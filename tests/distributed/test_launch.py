import os
import time

import pytest
import torch
from torch import distributed as dist


def total_of_ranks(values, offset):
    mine = values[dist.get_rank()] + offset
    dist.all_reduce(mine)
    return {"sum": mine, "rank": dist.get_rank(), "pid": os.getpid()}


def fail_on_rank_one():
    if dist.get_rank() == 1:
        raise KeyError("the missing field")
    dist.barrier()


def exit_on_rank_one():
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def sleep():
    time.sleep(600)


def seed_of_lightning():
    return str(os.environ.get("PL_GLOBAL_SEED"))


def test_ranks_share_a_process_group(ranks):
    values = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    first, second = ranks(total_of_ranks, values, 0.5)
    assert first["sum"].tolist() == second["sum"].tolist() == [12.0, 23.0]
    assert (first["rank"], second["rank"]) == (0, 1)
    assert len({first["pid"], second["pid"], os.getpid()}) == 3


def test_a_seed_that_another_test_set_does_not_reach_the_ranks(ranks, monkeypatch):
    launch = ranks.__globals__
    left = {**launch["_environment"](0, 1), "PL_GLOBAL_SEED": "5"}
    monkeypatch.setitem(launch, "_environment", lambda *_: left)
    assert ranks(seed_of_lightning, world_size=1) == ["None"]


def test_an_error_of_a_rank_arrives_with_its_traceback(ranks):
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 failed:.*in fail_on_rank_one.*KeyError"):
        ranks(fail_on_rank_one)


def test_the_death_of_a_rank_is_an_error(ranks):
    with pytest.raises(RuntimeError, match="rank 1 failed"):
        ranks(exit_on_rank_one)


def test_hanging_ranks_are_killed(ranks):
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="sleep did not end within 2 s"):
        ranks(sleep, timeout=2)
    assert time.monotonic() - started < 12


def test_users_of_the_fixture_are_marked(ranks, request):
    assert request.node.get_closest_marker("distributed")
