import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.testing import assert_close

from core_gates.gates.hash import HashGate


def test_golden_weights_and_mixture(golden):
    g = golden("hash_n6_hardshared")
    num_experts = int(g["num_experts"])
    gate = HashGate(1, num_experts, num_ids=len(g["expert_index"]))
    gate.table.copy_(g["expert_index"].unsqueeze(-1))
    ids = torch.arange(len(g["expert_index"]))
    dense = gate(torch.zeros(len(ids), 1), ids=ids).to_dense().weights
    assert torch.equal(dense.argmax(-1), g["expert_index"])
    weights = dense @ g["perm"].mean(0)
    y = torch.einsum("bn,nbh->bh", weights / weights.sum(-1, keepdim=True), g["experts"])
    assert_close(y, g["y"], rtol=1e-5, atol=1e-6)


@given(st.integers(1, 40), st.integers(1, 7), st.data(), st.sampled_from(["balanced", "random"]))
def test_ids_get_distinct_experts_with_equal_weights(num_ids, num_experts, data, table):
    k = data.draw(st.integers(1, num_experts))
    gate = HashGate(2, num_experts, num_ids=num_ids, k=k, table=table)
    assert all(len(set(row)) == k for row in gate.table.tolist())
    routing = gate(torch.zeros(num_ids, 2), ids=torch.arange(num_ids))
    assert torch.equal(routing.indices, gate.table)
    assert_close(routing.weights, torch.full((num_ids, k), 1 / k))
    assert_close(routing.probs, routing.to_dense().weights)


def test_balanced_tables_are_balanced_and_random_ones_are_not():
    ids = torch.arange(1003)
    spread = {}
    for table in ("balanced", "random"):
        gate = HashGate(1, 8, num_ids=1003, k=2, table=table)
        load = gate(torch.zeros(1003, 1), ids=ids).chosen().sum(0)
        spread[table] = int(load.max() - load.min())
    assert spread["balanced"] <= 1
    assert 10 < spread["random"] < 120


def test_pairs_of_experts_mix():
    gate = HashGate(1, 6, num_ids=3000, k=2)
    assert len({tuple(sorted(row)) for row in gate.table.tolist()}) == 15


def test_frequent_ids_are_spread_first():
    frequencies = [1 / (i + 1) for i in range(500)]
    load = torch.zeros(4)
    gate = HashGate(1, 4, num_ids=500, frequencies=torch.tensor(frequencies))
    load.scatter_add_(0, gate.table[:, 0], torch.tensor(frequencies))
    assert load.max() - load.min() < 0.01
    assert sorted(gate.table[:4, 0].tolist()) == [0, 1, 2, 3]


def test_table_belongs_to_the_seed_and_to_the_state():
    for table in ("balanced", "random"):
        first, twin, other = (
            HashGate(1, 5, num_ids=99, table=table, seed=seed) for seed in (0, 0, 1)
        )
        assert torch.equal(first.table, twin.table)
        assert not torch.equal(first.table, other.table)
        other.load_state_dict(first.state_dict())
        assert torch.equal(first.table, other.table)
    meta = HashGate(1, 5, num_ids=99, table="random", device="meta").to_empty(device="cpu")
    meta.reset_parameters()
    assert torch.equal(meta.table, first.table)


@pytest.mark.fault("core F8")
@pytest.mark.parametrize("others", [3, 16])
def test_the_table_of_another_number_of_experts_is_refused(others):
    gate, other = HashGate(1, 8, num_ids=2), HashGate(1, others, num_ids=2)
    before = gate.table.clone()
    message = f"layer.table spreads ids over {others} experts, but the gate has 8"
    with pytest.raises(RuntimeError, match=message):
        nn.ModuleDict({"layer": gate}).load_state_dict(nn.ModuleDict({"layer": other}).state_dict())
    assert torch.equal(gate.table, before)


@pytest.mark.fault("core F9")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.fault("core F8")
def test_distributed_checkpoint_in_place(tmp_path):
    ids, x = torch.arange(12), torch.zeros(12, 1)
    trained, gate = HashGate(1, 4, num_ids=12, seed=1), HashGate(1, 4, num_ids=12)
    dcp.save(trained.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    dcp.load(gate.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(gate(x, ids=ids).indices, trained(x, ids=ids).indices)
    other = HashGate(1, 8, num_ids=12)
    dcp.load(other.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(ValueError, match="spreads ids over 4 experts, but the gate has 8"):
        other(x, ids=ids)


def test_selectors_route_by_ids():
    gate, ids = HashGate(2, 5, num_ids=9, k=2), torch.tensor([8, 0, 3])
    x, mask = torch.zeros(3, 2), torch.tensor([False, True, False])
    selectors = gate.selectors(x, ids=ids, padding_mask=mask)
    expected = gate(x, ids=ids, padding_mask=mask).to_dense().weights
    assert_close(selectors.squeeze(-2), expected)
    assert not selectors[1].any()


def test_ids_at_ignored_positions_may_be_anything():
    gate = HashGate(2, 3, num_ids=4)
    mask = torch.tensor([False, True])
    routing = gate(torch.zeros(2, 2), ids=torch.tensor([3, -100]), padding_mask=mask)
    assert (routing.kept.tolist(), routing.weights.tolist()) == ([[True], [False]], [[1.0], [0.0]])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (None, "routes by ids: pass ids"),
        (torch.tensor([0.0, 1.0]), "ids must be integers, got torch.float32"),
        (torch.tensor([True, False]), "ids must be integers, got torch.bool"),
        (torch.tensor([0, 4]), "between 0 and num_ids - 1 = 3, got 4"),
        (torch.tensor([0, -1]), "between 0 and num_ids - 1 = 3, got -1"),
        (torch.tensor([0]), r"ids \(1,\) must have the shape \(2,\) of the tokens"),
    ],
)
def test_ids_are_checked(refuses, ids, message):
    refuses(ValueError, (message, lambda: HashGate(3, 5, num_ids=4)(torch.zeros(2, 3), ids=ids)))
