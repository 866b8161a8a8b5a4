"""Mean gates: observed in blocks of tokens, and folded into one adapter without a gate."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from core_gates.adapters import AdapterCapacity
from core_gates.errors import GatesError
from diffusion.fusion import GatedFusion
from diffusion.fusion.baking import MeanGates, bake


@pytest.fixture
def adapters(bundle):
    return {"a": bundle(1), "b": bundle(2, rank=3, where="attn"), "c": bundle(3, where="norm")}


def trained(fusion, std=0.5):
    torch.manual_seed(3)
    for parameter in fusion.parameters():
        nn.init.normal_(parameter, std=std)
    return fusion


def merged(model, adapter):
    made = deepcopy(model)
    for module in adapter.modules:
        made.get_submodule(module).weight += adapter.delta_weight(module)
    return made


@pytest.mark.parametrize("block", [1, 2, 256])
@pytest.mark.parametrize("options", [{}, {"time": "film"}, {"capacity": AdapterCapacity(4, 4)}])
def test_means_are_those_of_all_gates(model, inputs, adapters, block, options):
    fused = trained(GatedFusion(model, adapters, dtype=torch.float64, **options))
    other = inputs | {"hidden_states": -inputs["hidden_states"][:, :3]}
    seen = {}

    def note(site):
        def hook(layer, args, _output):
            gates = layer.gate_values(args[0])
            seen.setdefault(site, []).append(gates.flatten(0, -3))

        return hook

    with fused, MeanGates(fused, block) as observed:
        handles = [v.register_forward_hook(note(k)) for k, v in fused.layers.items()]
        model(**inputs), model(**other)
        for handle in handles:
            handle.remove()
    means = observed.means
    names = {
        name: {part for s in fused.sites if s.name == name for part in s.parts} for name in means
    }
    for site, parts in names.items():
        expected = torch.cat(seen[site]).mean(0)
        own = [n for n, b in adapters.items() if parts.intersection(b.modules)]
        assert list(means[site]) == own
        assert_close(torch.stack(list(means[site].values())), expected[: len(own)])
    assert set(means) == {
        s.name for s in fused.sites if any(set(s.parts) & set(b.modules) for b in adapters.values())
    }
    model(**other)
    assert all(torch.equal(observed.means[s][n], means[s][n]) for s in means for n in means[s])


@pytest.mark.parametrize("mode", ["gated", "sum"])
def test_constant_gates_are_baked_exactly(model, inputs, adapters, mode):
    fused = GatedFusion(model, adapters, mode=mode, dtype=torch.float64)
    torch.manual_seed(3)
    for gate in fused.gates.values():
        nn.init.normal_(gate.bias)
        nn.init.normal_(gate.weight_out)
    fused.set_strengths({"a": 0.7, "c": 0})
    with fused, MeanGates(fused) as observed:
        expected = model(**inputs)[0].detach()
    made = bake(fused, observed.means)
    assert_close(merged(model, made)(**inputs)[0], expected)
    assert (made.family, made.ranks()["transformer_blocks.0.attn.to_k"]) == ("flux", 5)
    assert made.ranks()["transformer_blocks.0.norm1.linear"] == 2
    with GatedFusion(model, {"one": made}, mode="sum"):
        assert_close(model(**inputs)[0], expected)


def test_other_gates_are_baked_on_average(model, inputs, adapters):
    fused = trained(GatedFusion(model, {"a": adapters["a"]}, dtype=torch.float64))
    with fused, MeanGates(fused) as observed:
        model(**inputs)
    made, site = bake(fused, observed.means), "proj_out"
    rows = fused.gate(site).weight_out * observed.means[site]["a"]
    expected = rows.detach().unsqueeze(1) * adapters["a"].delta_weight(site)
    assert_close(made.delta_weight(site), expected)


def test_refusals(model, inputs, adapters, bundle):
    fused = GatedFusion(model, adapters, dtype=torch.float64)
    with pytest.raises(GatesError, match="the fusion is not attached"), MeanGates(fused):
        pass
    with pytest.raises(GatesError, match=r"no mean gates of adapter 'a' at .*: observe a run"):
        bake(fused)
    with fused, MeanGates(fused) as observed:
        model(**inputs)
    means = observed.means
    means["proj_out"] = {"a": torch.ones(3)}
    with pytest.raises(GatesError, match="3 mean gates of adapter 'a' at proj_out are known, exp"):
        bake(fused, means)
    dora = bundle(1)
    dora.modules["proj_out"] = dora.modules["proj_out"]._replace(
        magnitude=torch.ones(4, 1).double()
    )
    other = GatedFusion(model, {"a": dora}, dtype=torch.float64)
    with other, MeanGates(other) as observed:
        model(**inputs)
    with pytest.raises(GatesError, match="adapter 'a' is a DoRA at proj_out"):
        bake(other, observed.means)
