from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from core_gates import GatedLoraLinear, SparseLowRank
from core_gates.adapters import SoftThreshold, gate_l1_loss

GOLDEN = Path(__file__).parents[2] / "golden" / "moe_inference_sora" / "sora.npz"
EXACT = {"rtol": 0, "atol": 1e-9}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return {k: torch.from_numpy(v) for k, v in arrays.items() if v.dtype.kind != "U"}


@pytest.fixture(params=[0, 1, 2])
def layer(request, golden):
    """The arrays of a layer and the adapter that holds them."""
    prefix = f"lin{request.param}_"
    arrays = {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}
    (r, in_features), out_features = arrays["A"].shape, len(arrays["B"])
    adapter = SparseLowRank(
        in_features, out_features, r, alpha=arrays["alpha"].item(), dtype=torch.float64
    )
    adapter.lora_A.data, adapter.lora_B.data = arrays["A"].clone(), arrays["B"].clone()
    adapter.lora_gate.weight.data = arrays["gate"][0].clone()
    return arrays, adapter


def random_adapter(r, dead=(), dtype=torch.float64, **options):
    torch.manual_seed(0)
    adapter = SparseLowRank(6, 8, r, dtype=dtype, **options)
    nn.init.normal_(adapter.lora_B)
    with torch.no_grad():
        adapter.lora_gate.weight[list(dead)] = 0
    return adapter


def inputs(*leading, dtype=torch.float64):
    return torch.randn(
        *leading, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(dtype)


def test_golden_output_and_gradients(layer):
    arrays, adapter = layer
    x = arrays["x"].clone().requires_grad_()
    y = adapter(x)
    assert_close(y, arrays["y"], **EXACT)
    y.backward(arrays["grad_y"])
    assert_close((x.grad, adapter.lora_A.grad), (arrays["grad_x"], arrays["grad_A"]), **EXACT)
    assert_close(adapter.lora_B.grad, arrays["grad_B"], **EXACT)
    assert_close(adapter.lora_gate.weight.grad, arrays["grad_gate"][0], **EXACT)


def test_golden_export_and_pruning(layer):
    arrays, adapter = layer
    assert torch.equal(adapter.lora_gate.kept, arrays["keep"])
    assert adapter.rank == arrays["keep"].sum()
    exported = adapter.export()
    assert exported.scale == 1.0
    assert_close(exported.down, arrays["pruned_A"], **EXACT)
    assert_close(exported.up, arrays["pruned_B_folded"], **EXACT)
    assert_close(adapter.delta_weight(), arrays["delta_w"], **EXACT)
    adapter.prune_()
    assert_close((adapter.lora_A, adapter(arrays["x"])), (arrays["pruned_A"], arrays["y"]), **EXACT)


@given(dead=st.sets(st.integers(0, 4)))
def test_pruning_export_and_merging_are_exact(dead):
    adapter, x = random_adapter(5, dead), inputs(4)
    linear = nn.Linear(6, 8, dtype=torch.float64)
    expected, weight = adapter(x), linear.weight.detach().clone()
    summed = linear(x) + expected
    exported = adapter.export()
    assert (adapter.rank, exported.rank) == (5 - len(dead), adapter.rank)
    assert_close(F.linear(F.linear(x, exported.down), exported.up), expected)
    adapter.merge_into(linear)
    assert_close(linear(x), summed)
    if adapter.rank == 0:
        assert torch.equal(linear.weight, weight)
    adapter.prune_()
    assert adapter.lora_A.shape == (5 - len(dead), 6)
    assert sum(p.numel() for p in (adapter.lora_A, adapter.lora_B)) == adapter.rank * (6 + 8)
    assert_close((adapter(x), adapter.delta_weight()), (expected, linear.weight.detach() - weight))


def test_rank_zero_still_works():
    adapter, x = random_adapter(3, dead=range(3)), inputs(2, 4).requires_grad_()
    adapter.prune_()
    assert (adapter.export().rank, adapter.rank) == (0, 0)
    assert not adapter.delta_weight().any()
    out = adapter(x)
    assert out.shape == (2, 4, 8)
    assert not out.any()
    out.sum().backward()
    assert not x.grad.any()
    adapter.prune_()
    adapter.reset_parameters()


@pytest.mark.fault("core F3")
@pytest.mark.parametrize("dead", [(), (0, 2, 5, 6, 7), range(8)])
@pytest.mark.parametrize("rank", [0, 3, 8])
@pytest.mark.parametrize("assign", [False, True])
def test_a_pruned_adapter_can_be_loaded(tmp_path, dead, rank, assign):
    """A new adapter has the size of the configuration, or that of the checkpoint."""
    adapter, x = random_adapter(8, dead), inputs(4)
    adapter.prune_()
    expected, remaining = adapter(x), adapter.rank
    torch.save(nn.Sequential(adapter).state_dict(), tmp_path / "adapter.pt")
    state = torch.load(tmp_path / "adapter.pt", weights_only=True)
    loaded = SparseLowRank(6, 8, rank, alpha=2.0, dtype=torch.float64)
    nn.Sequential(loaded).load_state_dict(state, assign=assign)
    assert loaded.rank == len(loaded.lora_A) == remaining
    assert_close(loaded(x), expected, rtol=0, atol=0)
    assert all(p.requires_grad for p in loaded.parameters())
    loaded.prune_()
    torch.save(loaded.state_dict(), tmp_path / "again.pt")
    again = SparseLowRank(6, 8, remaining, dtype=torch.float64)
    again.load_state_dict(torch.load(tmp_path / "again.pt", weights_only=True))
    assert_close(again(x), expected, rtol=0, atol=0)


@pytest.mark.fault("core F3")
def test_a_checkpoint_of_another_layer_is_refused(refuses):
    state = random_adapter(8, dead=[1]).state_dict()
    refuses(
        RuntimeError,
        ("size mismatch for lora_A", lambda: SparseLowRank(7, 8, 8).load_state_dict(state)),
        ("size mismatch for lora_B", lambda: SparseLowRank(6, 9, 4).load_state_dict(state)),
    )


@pytest.mark.fault("core F3")
@pytest.mark.parametrize("dead", [(1,), range(3)])
def test_an_export_is_always_an_adapter(dead):
    adapter, x = random_adapter(3, dead), inputs(5)
    layer = GatedLoraLinear(nn.Linear(6, 8, dtype=torch.float64))
    layer.set_adapters([adapter.export()])
    assert_close(layer(x), layer.base(x) + adapter(x), rtol=1e-6, atol=1e-6)


@pytest.mark.fault("core F3")
def test_the_scale_of_many_components_is_exact():
    adapter = SparseLowRank(6, 8, 3, alpha=0.1 + 0.2).bfloat16().double()
    assert_close(adapter.scale, torch.tensor(0.1, dtype=torch.float64), rtol=0, atol=1e-8)
    assert_close(SparseLowRank(6, 8, 3).double().scale.item(), 16 / 3, rtol=0, atol=0)


@pytest.mark.fault("core F5")
@pytest.mark.parametrize("cast", ["to", "half", "constructor"])
def test_the_gate_stays_in_single_precision(cast):
    exact = random_adapter(3, dtype=torch.float32)
    gate = exact.gate_values().detach().clone()
    exact(inputs(4, dtype=torch.float32)).sum().backward()
    grad = exact.gate_values().grad.clone()
    if cast == "constructor":
        adapter = SparseLowRank(6, 8, 3, device="meta", dtype=torch.bfloat16)
    else:
        adapter = exact.half() if cast == "half" else exact.to(torch.bfloat16)
        assert_close(adapter.gate_values().data, gate, rtol=0, atol=0)
        assert_close(adapter.gate_values().grad, grad, rtol=0, atol=0)
    assert adapter.gate_values().dtype == adapter.scale.dtype == torch.float32
    assert adapter.lora_A.dtype == adapter.lora_B.dtype != torch.float32
    assert SoftThreshold(3, dtype=torch.float64).double().weight.dtype == torch.float64


def test_a_pruned_adapter_stays_trainable_or_frozen():
    adapter = random_adapter(4, dead=[1])
    adapter.lora_A.requires_grad_(False)
    adapter.prune_()
    assert not adapter.lora_A.requires_grad
    assert adapter.lora_B.requires_grad
    assert adapter.lora_gate.weight.requires_grad


def test_a_dead_component_freezes_its_factors_and_can_revive():
    adapter = random_adapter(3, dead=[1])
    adapter(inputs(4)).square().sum().backward()
    assert not adapter.lora_A.grad[1].any()
    assert not adapter.lora_B.grad[:, 1].any()
    assert adapter.lora_gate.weight.grad[1] != 0
    with torch.no_grad():
        adapter.lora_gate.weight -= 0.1 * adapter.lora_gate.weight.grad
    assert adapter.lora_gate.kept.all()


def test_starts_as_nothing_with_the_published_draw():
    torch.manual_seed(0)
    adapter = SparseLowRank(2000, 8, 500)
    assert not adapter(torch.randn(3, 2000)).any()
    assert abs(adapter.gate_values().mean()) < 0.2
    assert 0.9 < adapter.gate_values().std() < 1.1
    assert 0.95 < adapter.lora_A.abs().max() * 2000**0.5 <= 1.0
    adapter(torch.randn(3, 2000)).sum().backward()
    assert not adapter.gate_values().grad.any()  # as B is zero
    assert torch.equal(SparseLowRank(6, 8, 3, initialization="ones").gate_values(), torch.ones(3))


def test_golden_l1_loss(golden):
    gates = nn.ModuleList()
    for number in range(3):
        gates.append(SoftThreshold(golden[f"l1_gate{number}"].shape[1], dtype=torch.float64))
        gates[-1].weight.data = golden[f"l1_gate{number}"][0].clone()
    loss = golden["l1_lambda"] * gate_l1_loss(gates)
    assert_close(loss, golden["l1_value"], **EXACT)
    loss.backward()
    for number, gate in enumerate(gates):
        assert_close(gate.weight.grad, golden[f"l1_grad{number}"][0], **EXACT)
    with pytest.raises(ValueError, match="Linear holds no SoftThreshold gate"):
        gate_l1_loss(nn.Linear(2, 2))


def test_dropout_hits_the_input_in_training_only():
    adapter, x = random_adapter(3, dropout=0.5), inputs(200)
    torch.manual_seed(2)
    dropped = adapter(x)
    torch.manual_seed(2)
    by_hand = F.dropout(x, 0.5)
    adapter.eval()
    assert_close(dropped, adapter(by_hand))
    assert not torch.allclose(dropped, adapter(x))


@pytest.mark.parametrize("leading", [(), (0,), (1,), (2, 0), (2, 3)])
def test_shapes(leading):
    assert random_adapter(3)(inputs(*leading)).shape == (*leading, 8)


def test_autocast_and_bfloat16():
    adapter, x = random_adapter(3, dtype=torch.float32), inputs(50, dtype=torch.float32)
    expected = adapter(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(adapter(x).float(), expected, rtol=0.05, atol=0.2)
    out = adapter.to(torch.bfloat16)(x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), expected, rtol=0.05, atol=0.2)


def test_names_are_those_that_lora_formats_filter():
    adapter = SparseLowRank(6, 8, 3, device="meta")
    assert {name for name, _ in adapter.named_parameters()} == {
        "lora_A",
        "lora_B",
        "lora_gate.weight",
    }
    assert all(p.is_meta for p in adapter.parameters())
    adapter = adapter.to_empty(device="cpu")
    for tensor in (*adapter.parameters(), *adapter.buffers()):
        tensor.data.fill_(123)
    adapter.reset_parameters()
    assert_close(adapter.scale, torch.tensor(16 / 3))
    assert not adapter.lora_B.any()
    assert adapter.lora_A.abs().max() <= 6**-0.5
    assert adapter.gate_values().abs().max() < 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": -1}, "rank must not be negative, got -1"),
        ({"in_features": 0}, "in_features must be at least 1"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"initialization": "zeros"}, "initialization is 'zeros'; choose one of normal, ones"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        SparseLowRank(**{"in_features": 6, "out_features": 8, **options})


def test_merging_into_another_layer_is_refused():
    for dead in ([], range(3)):
        with pytest.raises(ValueError, match="do not fit a layer of 6 inputs and 9 outputs"):
            random_adapter(3, dead).merge_into(nn.Linear(6, 9))
