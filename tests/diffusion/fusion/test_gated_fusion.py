"""Adapters under gates: on small models, compiled, and at published sizes."""

import itertools
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from core_gates.adapters import AdapterCapacity
from core_gates.errors import GatesError
from diffusion.evaluation.parity import relative_error
from diffusion.fusion import GatedFusion
from diffusion.lora_file import FluxShape, load_lora, save_lora
from diffusion.models.embedded_base import UNIT, transformer_of
from tests.diffusion.random_adapters import random_adapter


def merged(model, adapters, strengths=None):
    """The model with adapters added to its weights."""
    made = deepcopy(model)
    for name, adapter in adapters.items():
        for module in adapter.modules:
            delta = (strengths or {}).get(name, 1.0) * adapter.delta_weight(module)
            made.get_submodule(module).weight += delta
    return made


def trained(fusion):
    torch.manual_seed(3)
    for parameter in fusion.parameters():
        nn.init.normal_(parameter, std=0.5)
    return fusion


@pytest.fixture
def adapters(bundle):
    return {"a": bundle(1), "b": bundle(2, rank=3, where="attn")}


@pytest.mark.parametrize("mode", ["gated", "sum"])
def test_untrained_gates_are_the_sum(model, inputs, adapters, mode):
    plain = model(**inputs)[0]
    with GatedFusion(model, adapters, mode=mode, dtype=torch.float64) as fused:
        found = model(**inputs)[0]
        assert_close(found, merged(model_of(fused), adapters)(**inputs)[0])
        assert not torch.allclose(found, plain)
        fused.set_strengths({"b": 0.3})
        expected = merged(model_of(fused), adapters, {"b": 0.3})(**inputs)[0]
        assert_close(model(**inputs)[0], expected)
        fused.set_strengths({"a": 0, "b": 0})
        assert_close(model(**inputs)[0], plain)


def model_of(fused):
    """The model without adapters; they are attached again."""
    fused.detach()
    plain = deepcopy(fused.model)
    fused.attach()
    return plain


@torch.no_grad()
def test_split_layers_are_the_fused_one_under_its_gate(model, adapters):
    fused = trained(GatedFusion(model, adapters, dtype=torch.float64))
    sites = [site for site in fused.sites if len(site.parts) > 1]
    assert len(sites) == 3
    for site in sites:
        x = torch.randn(7, site.in_features, dtype=torch.float64)
        parts = list(zip(site.parts, site.sizes, strict=True))
        whole = torch.cat([model.get_submodule(part)(x) for part in site.parts], -1)
        changes = [
            [x @ b.delta_weight(p).mT if p in b.modules else x.new_zeros(7, n) for p, n in parts]
            for b in adapters.values()
        ]
        expected = fused.gate(site.name)(whole, torch.stack([torch.cat(c, -1) for c in changes], 1))
        with fused:
            found = torch.cat([model.get_submodule(part)(x) for part in site.parts], -1)
        assert_close(found, expected)


@pytest.mark.parametrize("options", [{}, {"time": "film"}, {"mode": "sum"}])
def test_nothing_is_left_behind_even_by_an_error(options, model, inputs, adapters):
    before, names = deepcopy(model.state_dict()), [name for name, _ in model.named_modules()]
    layers, expected = dict(model.named_modules()), model(**inputs)[0]
    fused = trained(GatedFusion(model, adapters, dtype=torch.float64, **options))

    def fail():
        with fused:
            assert not torch.allclose(model(**inputs)[0], expected)
            assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        fail()
    assert [name for name, _ in model.named_modules()] == names
    assert all(module is layers[name] for name, module in model.named_modules())
    assert torch.equal(model(**inputs)[0], expected)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_gates_know_the_time(model, inputs, adapters):
    fused = trained(GatedFusion(model, adapters, time="film", dtype=torch.float64))
    assert not any(name.startswith("model") for name, _ in fused.named_parameters())
    with fused:
        early, late = (
            model(**inputs | {"timestep": torch.full((2,), t)})[0] for t in (0.2, 0.2001)
        )
        assert not torch.allclose(early, late, atol=1e-6)


@pytest.mark.parametrize("variant", ["full", "no_base", "no_cross", "no_lora"])
def test_gates_are_saved_and_loaded_by_their_layers(model, inputs, adapters, tmp_path, variant):
    fused = trained(GatedFusion(model, adapters, variant=variant, dtype=torch.float64))
    with fused:
        expected = model(**inputs)[0]
    path = fused.save_gates(tmp_path / "gates.safetensors")
    assert "model_dict.blocks___0___attn___a_to_qkv.weight_out" in load_file(path)
    loaded = GatedFusion(model, adapters, gates=path, dtype=torch.float64)
    with loaded:
        assert_close(model(**inputs)[0], expected, rtol=0, atol=0)
    assert {gate.variant for gate in loaded.gates.values()} == {variant}


def test_options_that_would_do_nothing_are_refused(model, adapters, tmp_path):
    path = GatedFusion(model, adapters, variant="no_base").save_gates(tmp_path / "g.safetensors")
    with pytest.raises(GatesError, match="variant='no_base', not 'full': leave variant out"):
        GatedFusion(model, adapters, gates=path, variant="full")
    assert GatedFusion(model, adapters, gates=path, variant="no_base", time="implicit").gates
    for options in ({"gates": path}, {"variant": "full"}):
        with pytest.raises(GatesError, match="mode='sum' has no gates"):
            GatedFusion(model, adapters, mode="sum", **options)


def test_gates_start_at_strengths_and_keep_their_factors_in_a_file(
    model, inputs, adapters, tmp_path
):
    roles = {"a": "subject", "b": "style"}
    double = {"dtype": torch.float64}
    strengths = trained(GatedFusion(model, adapters, mode="strengths", switch=True).double())
    path = strengths.save_gates(tmp_path / "strengths.safetensors")
    assert {name.rpartition(".")[2] for name in load_file(path)} == {"factors", "switch"}
    started = GatedFusion(model, adapters, gates=path, **double)
    found, scores = [], {"a": 0.4, "b": -0.1}
    for fused in (strengths, started, GatedFusion(model, adapters, mode="strengths", gates=path)):
        fused.describe(roles=roles, scores=scores)
        with fused:
            found.append(model(**inputs)[0].detach())
    assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)
    assert_close(found[2], found[0])
    path = trained(started).save_gates(tmp_path / "gates.safetensors")
    again = GatedFusion(model, dict(reversed(adapters.items())), gates=path, **double)
    both = []
    for fused in (started, again):  # whatever the order
        fused.describe(roles=roles, scores=scores)
        with fused:
            both.append(model(**inputs)[0].detach())
    assert_close(both[0], both[1])
    assert not torch.allclose(both[0], found[0], atol=1e-3)
    with pytest.raises(GatesError, match="holds gates, not strengths alone: give mode='gated'"):
        GatedFusion(model, adapters, mode="strengths", gates=path)


def test_the_sum_is_the_start_of_factors(model, inputs, adapters):
    fused = GatedFusion(model, adapters, factors=True, dtype=torch.float64)
    fused.describe(roles={"a": "subject", "b": "style"}, scores={"a": 0.3, "b": -0.5})
    with fused:
        assert_close(model(**inputs)[0], merged(model_of(fused), adapters)(**inputs)[0])
    fused.set_strengths({"a": 0.5})
    assert fused.weights(fused.sites[0].name) == {"a": 0.5, "b": 1.0}


def test_published_gates_take_factors_that_change_nothing_yet(model, inputs, adapters, tmp_path):
    plain = trained(GatedFusion(model, adapters))
    assert plain.context is None
    path, found = plain.save_gates(tmp_path / "gates.safetensors"), []
    assert not any("factors" in name for name in load_file(path))
    for options in ({}, {"factors": True}):
        fused = GatedFusion(model, adapters, gates=path, **options)
        fused.describe(roles={"a": "subject"}, scores={"b": -0.5})
        with fused:
            found.append(model(**inputs)[0].detach())
    with plain:
        assert torch.equal(found[0], model(**inputs)[0].detach())
    assert torch.equal(*found)


@torch.no_grad()
def test_siblings_see_what_they_are_told_between_calls_of_one_input(model, inputs, adapters):
    fused = trained(GatedFusion(model, adapters, factors=True, switch=True, dtype=torch.float64))
    site = next(site for site in fused.sites if len(site.parts) > 1)
    x = torch.randn(7, site.in_features, dtype=torch.float64)
    first, second = site.parts[:2]
    with fused:
        fused.describe(scores={"a": 0.4, "b": -0.1})
        before = model.get_submodule(second)(x)
        same = x.clone()
        model.get_submodule(first)(same)  # computes all of them
        fused.describe(scores={"a": -0.9})
        assert not torch.allclose(model.get_submodule(second)(same), before, atol=1e-6)


def test_wrong_gates_are_refused(model, adapters, bundle, tmp_path):
    path = GatedFusion(model, {"b": bundle(2, where="attn")}).save_gates(tmp_path / "g.safetensors")
    with pytest.raises(GatesError, match=r"holds no gates for .*: give others"):
        GatedFusion(model, adapters, gates=path)
    state = load_file(path)
    first = next(iter(state))
    for change, message in (
        ({first: state[first][:-1]}, "does not fit the model"),
        ({first: state[first] * torch.nan}, "is not finite; get the file again"),
        ({"model_dict.other.bias": torch.ones(3)}, "gates of layers that the model lacks"),
    ):
        save_file(state | change, path)
        with pytest.raises(GatesError, match=message):
            GatedFusion(model, {"b": bundle(2, where="attn")}, gates=path)
    save_file({"model_dict.adapter_switch.switch": torch.zeros(3)}, path)
    with pytest.raises(GatesError, match="holds no gates: give gates of this model"):
        GatedFusion(model, {"b": bundle(2, where="attn")}, gates=path)


def test_adapters_are_exchanged_and_their_order_does_not_matter(model, inputs, adapters, bundle):
    fused = trained(
        GatedFusion(model, adapters, capacity=AdapterCapacity(3, 4), dtype=torch.float64)
    )
    three, large = {**adapters, "c": bundle(7, rank=4, where="ff")}, bundle(8, rank=5)
    everywhere, columns = bundle(1), bundle(7, where="ff")
    site, factors = next(iter(columns.modules.items()))
    columns.modules[site] = factors._replace(magnitude=torch.ones(1, factors.in_features))
    with fused:
        fused.set_adapters(three)
        found = model(**inputs)[0]
        for order in itertools.permutations(three):
            fused.set_adapters({name: three[name] for name in order})
            assert_close(model(**inputs)[0], found)
        fused.set_strengths({"a": 0.5})
        found = model(**inputs)[0]
        with pytest.raises(GatesError, match="there is room for 3 adapters of rank 4"):
            fused.set_adapters({"d": large})
        assert list(fused.adapters) == list(reversed(three))
        assert fused.strengths == {"c": 1.0, "b": 1.0, "a": 0.5}
        assert_close(model(**inputs)[0], found)
        with pytest.raises(GatesError, match="norms of columns cannot be fused"):
            fused.set_adapters({"e": columns})
        assert list(fused.adapters) == list(reversed(three))
    with GatedFusion(model, {"b": bundle(2, where="attn")}) as narrow:
        with pytest.raises(GatesError, match="detach first, or make it with everywhere=True"):
            narrow.set_adapters({"a": everywhere})
        assert list(narrow.adapters) == ["b"]


def test_misfits_are_refused_in_one_line(model, adapters, bundle, refuses):
    for given, message in (
        (bundle(1, family="sd3"), "adapter 'x' is for sd3, the model is flux"),
        (bundle(1).select(["proj_out"]), None),
    ):
        if message is None:
            factors = given.modules["proj_out"]
            given.modules["proj_out"] = factors._replace(down=factors.down[:, :-1])
            message = r"changes proj_out of 7 to 4 features, the model has 8 to 4"
        with pytest.raises(GatesError, match=message):
            GatedFusion(model, {"x": given})
    fused = GatedFusion(model, adapters)
    refuses(
        GatesError,
        ("no adapter is named 'z'; there are a, b", lambda: fused.set_strengths({"z": 1.0})),
        ("must be finite numbers", lambda: fused.set_strengths({"a": float("nan")})),
    )
    with pytest.raises(ValueError, match="mode is 'summ'; choose one of gated, sum"):
        GatedFusion(model, adapters, mode="summ")


def test_a_list_of_adapters_is_named_by_files_titles_or_numbers(model, inputs, bundle, tmp_path):
    given = [bundle(1), bundle(2, where="attn"), bundle(3, where="ff"), bundle(4), bundle(5)]
    (tmp_path / "night").mkdir()
    paths = [tmp_path / "fox.safetensors", tmp_path / "night" / "adapter_model.safetensors"]
    read = [load_lora(save_lora(g, p)) for g, p in zip(given, paths, strict=False)]
    titled = replace(given[2], metadata={"modelspec.title": "fox"})
    fused = GatedFusion(model, [*read, titled, *given[3:]], dtype=torch.float64)
    names = ["fox", "night", "fox-2", "adapter", "adapter-2"]
    assert list(fused.adapters) == names
    mapped = GatedFusion(model, dict(fused.adapters), dtype=torch.float64)
    with fused:
        fused.set_strengths({"fox-2": 0.5})
        found = model(**inputs)[0]
    with mapped:
        mapped.set_strengths({"fox-2": 0.5})
        assert torch.equal(model(**inputs)[0], found)
    fused.set_adapters(read[1:])
    assert list(fused.adapters) == ["night"]


def test_what_is_no_adapter_is_refused_in_one_line(model, bundle):
    one = bundle(1)
    for given, message in (
        ([one, "a.safetensors"], "'adapter-2' is 'a.safetensors': read its file by load_lora"),
        ({"a": "a.safetensors"}, "adapter 'a' is 'a.safetensors': read its file by load_lora"),
        ([one, one], "an adapter is given twice: give it once"),
        (one, "a LoraBundle is given, expected a list or a mapping of adapters"),
        ("loras", "'loras' is given, expected a list or a mapping"),
    ):
        with pytest.raises(GatesError, match=message):
            GatedFusion(model, given)


def test_any_model_of_linear_layers(bundle, inputs):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    given = bundle(1).select([])
    modules = {"0": torch.randn(2, 4), "2": torch.randn(2, 8)}
    given.modules.update(
        {n: bundle(1).modules["proj_out"]._replace(
            down=d.double(), up=torch.randn(8 if n == "0" else 4, 2).double()
        ) for n, d in modules.items()}
    )  # fmt: skip
    x = torch.randn(3, 4, dtype=torch.float64)
    expected = merged(model.requires_grad_(False), {"a": given})(x)
    with GatedFusion(model, {"a": given}, dtype=torch.float64) as fused:
        assert_close(model(x), expected)
        assert sorted(fused.gates) == ["0", "2"]


@pytest.fixture(scope="module")
def flux():
    torch.manual_seed(0)
    return transformer_of("unit").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def call():
    draw = torch.Generator().manual_seed(1)
    width = UNIT["joint_attention_dim"]
    inputs = {
        "hidden_states": torch.randn(1, 4, UNIT["in_channels"], generator=draw),
        "encoder_hidden_states": torch.randn(1, 3, width, generator=draw),
        "pooled_projections": torch.randn(1, UNIT["pooled_projection_dim"], generator=draw),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
        "return_dict": False,
    }

    @torch.no_grad()
    def run(model):
        return model(**inputs)[0]

    return run


@pytest.fixture(scope="module")
def fusion(flux):
    """Of two adapters."""
    return trained(
        GatedFusion(flux, [random_adapter(flux, seed, where="attn.to_q") for seed in (1, 2)])
    )


@pytest.fixture(autouse=True)
def forgotten():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


GRAPHS = pytest.mark.costly("Dynamo traces a transformer with gates and without")


def compiled(model):
    return torch.compile(model, backend="eager", fullgraph=True)


@pytest.mark.slow
def test_a_model_that_is_compiled_first_takes_and_loses_adapters(flux, fusion, call):
    plain = call(flux)
    with fusion:
        fused = call(flux)
    assert not torch.allclose(fused, plain)
    model = compiled(flux)
    assert torch.equal(call(model), plain)
    with fusion:
        assert torch.equal(call(model), fused)
        fusion.set_strengths({"adapter": 0.0, "adapter-2": 0.0})
        assert torch.equal(call(model), plain)
        fusion.set_strengths({"adapter": 1.0, "adapter-2": 1.0})
        assert torch.equal(call(model), fused)
    assert torch.equal(call(model), plain)


def test_the_compiled_model_itself_may_be_given(flux, fusion, call):
    with fusion:
        fused = call(flux)
    model = compiled(flux)
    other = GatedFusion(model, fusion.adapters)
    other.load_state_dict(fusion.state_dict())
    assert other.family == "flux"
    with other:
        assert torch.equal(call(model), fused)
    assert not other.attached


@GRAPHS
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_adapters_are_exchanged_without_compiling_again(flux, call, backend):
    given = {"a": random_adapter(flux, 1), "b": random_adapter(flux, 2, rank=3, where="attn")}
    fewer = {"d": random_adapter(flux, 4, rank=4)}
    other = {"e": random_adapter(flux, 5, rank=1, where="attn"), "d": random_adapter(flux, 6)}
    more = {name: random_adapter(flux, 7 + k, rank=k + 1) for k, name in enumerate("xyz")}
    counted = CompileCounterWithBackend(backend)
    model = torch.compile(flux, backend=counted)
    with trained(GatedFusion(flux, given, capacity=AdapterCapacity(3, 4))) as fusion:
        found = call(model)
        first = counted.frame_count
        for number, adapters in enumerate((fewer, other, more)):
            fusion.set_adapters(adapters)
            fusion.set_strengths(dict.fromkeys(adapters, 0.5 + number))
            last, found = found, call(model)
            assert relative_error(found, call(flux)) <= 1e-5
            assert relative_error(found, last) > 1e-3
    assert counted.frame_count == first > 0


NAMES = [
    *(f"blocks.{k}.{name}" for k in range(19) for s in "ab" for name in (
        f"attn.{s}_to_qkv", f"attn.{s}_to_out", f"ff_{s}.0", f"ff_{s}.2", f"norm1_{s}.linear"
    )),
    *(f"single_blocks.{k}.{name}" for k in range(38)
      for name in ("to_qkv_mlp", "proj_out", "norm.linear")),
]  # fmt: skip
"""The fused layers of FLUX.1-dev as published."""


class FluxTransformer2DModel(nn.Module):
    """The linear layers of FLUX.1-dev at their places, without numbers."""

    def __init__(self):
        super().__init__()
        for name, (inputs, outputs) in FluxShape().modules().items():
            *parents, last = name.split(".")
            place = self
            for parent in parents:
                if parent not in dict(place.named_children()):
                    place.add_module(parent, nn.Module())
                place = place.get_submodule(parent)
            place.add_module(last, nn.Linear(inputs, outputs, device="meta"))


@pytest.mark.parametrize(("variant", "millions"), [("full", 27.316224), ("no_base", 24.281088)])
def test_published_sizes(variant, millions):
    fused = GatedFusion(FluxTransformer2DModel(), {}, everywhere=True, variant=variant)
    assert ([name.replace("___", ".") for name in fused.gates], len(NAMES)) == (NAMES, 304)
    assert all(parameter.is_meta for parameter in fused.parameters())
    assert sum(parameter.numel() for parameter in fused.parameters()) == millions * 1e6


def test_gates_load_strictly_onto_a_model_without_memory(tmp_path):
    model = FluxTransformer2DModel()
    empty = GatedFusion(model, {}, everywhere=True)
    for gate in empty.gates.values():
        gate.to_empty(device="cpu")
        nn.init.normal_(gate.weight_out)
        for name, parameter in gate.named_parameters():
            if name != "weight_out":
                nn.init.constant_(parameter, 0.5)
    path = empty.save_gates(tmp_path / "gates.safetensors")
    terms = ["weight_base", "weight_lora", "weight_cross", "weight_out", "bias"]
    terms += [f"norm_{of}.{part}" for of in ("base", "lora") for part in ("weight", "bias")]
    stored = {f"model_dict.{name.replace('.', '___')}.{term}" for name in NAMES for term in terms}
    assert load_file(path).keys() == stored
    loaded = GatedFusion(model, {}, everywhere=True, gates=path)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    for name, gate in empty.gates.items():
        assert torch.equal(loaded.gates[name].weight_out, gate.weight_out)
