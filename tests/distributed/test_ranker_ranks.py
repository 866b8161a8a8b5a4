"""Rankers trained on two processes against one: tables replicated, sharded, or left to DDP."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import is_initialized

from recsys.embedding.bank import EmbeddingBank, spread, spread_names
from recsys.embedding.row_wise_adagrad import RowWiseAdagrad
from recsys.inputs import Rows

TOY = runpy.run_path(str(Path(__file__).parents[1] / "fixtures" / "toy_ranker.py"))
SIZES = TOY["SIZES"]
STEPS = 5
DTYPES = ("float64", "float32")


def train(parallel, how, dtype):
    """Five steps with row-wise Adagrad on the tables and Adam, or SGD in float32, on the rest."""
    dtype = getattr(torch, dtype)
    ranker = TOY["toy_ranker"]("target_attention", copies=2, dtype=dtype).train()
    ranker.net.norm = nn.Identity()
    if is_initialized() and parallel.strategy and torch.distributed.get_rank() == 1:
        with torch.no_grad():  # rank 0's are taken
            [table.mul_(2) for table in ranker.tables()]
    if how:
        spread(ranker, how)
    names = spread_names(ranker)
    model = parallel(ranker)
    adam = dtype == torch.float64
    dense = ranker.dense_parameters()
    optimizers = (
        RowWiseAdagrad(ranker.tables(), 0.05, l2=1e-3),
        torch.optim.Adam(dense, 0.01) if adam else torch.optim.SGD(dense, 0.1),
    )
    losses = []
    for step in range(STEPS):
        rows = TOY["rows"](32, seed=step)
        labels = (torch.rand(32, 3, generator=torch.Generator().manual_seed(step)) < 0.3).to(dtype)
        mine = Rows(
            parallel.share(rows.sparse),
            parallel.share(rows.dense).to(dtype),
            tuple(map(parallel.share, rows.sequences)),
        )
        logits = model(*mine)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, parallel.share(labels))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(float(loss.detach()))
    state = optimizers[0].state_dict()
    tables = [layer.bank.named_tables() for layer in ranker.layers]
    return {
        "state": {name: value.clone() for name, value in ranker.state_dict().items()},
        "tables": [{name: table.clone() for name, table in each.items()} for each in tables],
        "sums": [state["state"][i]["sum"] for i in range(6)],
        "ignored": len(names) in (0, 6),
    }


def train_all(parallel):
    """All ways, in one start of the processes, which takes longer than their work."""
    ways = [(how, dtype) for how in ("replicated", "sharded", "") for dtype in DTYPES]
    return {f"{how} {dtype}": train(parallel, how, dtype) for how, dtype in ways}


def test_two_ranks_equal_one_process(two_ranks):
    found = two_ranks(train_all, tolerance=1e-6)
    assert len(found) == 6
    start = TOY["toy_ranker"]("target_attention", copies=2).state_dict()
    for result in found.values():
        moved = [(result["state"][n] - start[n]).abs().max() for n in start if "stacks" in n]
        assert float(min(moved)) > 0.01


def resume(state, sums):
    """Load whole tables and accumulators into shards, read them again, look rows up."""
    torch.manual_seed(0)
    born = EmbeddingBank(TOY["schema"](), SIZES | {"video": 3000}, std=0.5, sharded=True)
    ranker = TOY["toy_ranker"](dtype=torch.float64)
    spread(ranker, "sharded")
    bank = ranker.layers[0].bank
    own = [len(table) for table in ranker.tables()]
    ranker.load_state_dict(state)
    optimizer = RowWiseAdagrad(ranker.tables())
    packed = optimizer.state_dict() | {"state": {i: {"sum": s} for i, s in enumerate(sums)}}
    optimizer.load_state_dict(packed)
    mine = [len(optimizer.state[table]["sum"]) for table in ranker.tables()]
    rows = TOY["rows"](7, seed=torch.distributed.get_rank()).sparse
    nothing = bank.lookup("video", torch.empty(0, 3, dtype=torch.int64))
    return {
        "state": {name: value.clone() for name, value in ranker.state_dict().items()},
        "sums": [entry["sum"] for entry in optimizer.state_dict()["state"].values()],
        "own": own,
        "sums of rank": mine,
        "vectors": bank(rows),
        "nothing": list(nothing.shape),
        "born": born.named_tables(),
        "born own": sum(len(table) for table in born.tables()),
    }


def test_whole_states_fit_any_number_of_ranks(ranks):
    ranker = TOY["toy_ranker"](dtype=torch.float64)
    state = {name: torch.randn_like(value) for name, value in ranker.state_dict().items()
             if value.is_floating_point()}  # fmt: skip
    state = ranker.state_dict() | state
    ranker.load_state_dict(state)
    sums = [torch.rand(len(table), dtype=torch.float64) for table in ranker.tables()]
    found = ranks(resume, state, sums, world_size=3)
    for rank, result in enumerate(found):
        assert all(torch.equal(result["state"][name], value) for name, value in state.items())
        assert all(torch.equal(a, b) for a, b in zip(result["sums"], sums, strict=True))
        assert result["own"] == result["sums of rank"]
        rows = TOY["rows"](7, seed=rank).sparse
        assert torch.equal(result["vectors"], ranker.layers[0].bank(rows))
        assert result["nothing"] == [0, 3, 4]
    sizes = [sum(column) for column in zip(*(result["own"] for result in found), strict=True)]
    assert sizes == [len(table) for table in ranker.tables()]
    assert max(r["born own"] for r in found) - min(r["born own"] for r in found) <= 3
    for name, table in found[0]["born"].items():
        assert torch.equal(table, found[1]["born"][name])
        assert len(table.unique(dim=0)) == len(table)  # although all ranks have one seed
    assert float(found[0]["born"]["video"].std()) == pytest.approx(0.5, rel=0.05)
    assert float(found[0]["born"]["author.remainder"].std()) == pytest.approx(0.5**0.5, rel=0.6)


def test_on_one_process_nothing_is_changed():
    ranker = TOY["toy_ranker"]()
    spread(ranker, "sharded")
    assert spread_names(ranker) == []
    with pytest.raises(ValueError, match="how is 'split'; choose one of replicated, sharded"):
        spread(ranker, "split")
