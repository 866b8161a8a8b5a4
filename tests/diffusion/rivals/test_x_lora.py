"""X-LoRA: golden vectors of PEFT, tokens of FLUX.1, training, and what it leaves alone."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from core_gates.adapters import LowRank
from core_gates.errors import GatesError
from diffusion.evaluation.parity import plain_layer, read_vectors, relative_error
from diffusion.lora_file import Factors, LoraBundle
from diffusion.rivals.x_lora import Scalings, TokenWeightedLora, XLora

GOLDEN = Path(__file__).parents[2] / "golden" / "autolora"


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("softmax", {}),
        ("topk", {"top_k": 2, "normalize": "kept"}),
        ("layerwise", {"layerwise": True, "depth": 2, "width": 6, "temperature": 0.7}),
    ],
)
def test_golden(case, options):
    arrays, _ = read_vectors(GOLDEN, "xlora_a.npz")
    own = {n.partition(".")[2]: v for n, v in arrays.items() if n.startswith(f"{case}.")}
    features, count = own["hidden"].shape[-1], own["scalings"].shape[-1]
    made = Scalings(features, count, 2, dtype=torch.float64, **options)
    made.load_state_dict({n.removeprefix("cls."): v for n, v in own.items() if "cls." in n})
    found = made(own["hidden"])
    if case != "topk":  # there PEFT hands out logits, and selects in every layer
        assert relative_error(found, own["scalings"]) <= 1e-6
    adapters = [
        LowRank(own[f"A{k}"], own[f"B{k}"], float(own[f"scaling{k}"])) for k in range(count)
    ]
    weights = 1.3 * found[:, :, int(own["layer"])]
    adapted = TokenWeightedLora(plain_layer(own), adapters, lambda _: weights)
    assert relative_error(adapted(own["x"]), own["y"]) <= 1e-6


IMAGES, TEXTS = 5, 3


def naive(model, adapters, inputs, scalings, strengths):
    """The second pass, by hooks that add every adapter in full to the layers of a copy."""
    made = deepcopy(model)
    mean = scalings.mean(1, keepdim=True)
    handles = []

    def weights(name, x):
        if x.ndim == 2:
            return mean[:, 0]
        if name.startswith("single_transformer_blocks"):
            return torch.cat([mean.expand(-1, TEXTS, -1), scalings], 1)
        text = "add_" in name or "context" in name
        assert x.shape[1] == (TEXTS if text else scalings.shape[1])
        return mean.expand(-1, TEXTS, -1) if text else scalings

    def hook(name):
        def add(_module, args, output):
            for k, (key, adapter) in enumerate(adapters.items()):
                if name in adapter.modules:
                    own = strengths[key] * weights(name, args[0])[..., k : k + 1]
                    output = output + own * (args[0] @ adapter.delta_weight(name).T)
            return output

        return add

    for name, layer in made.named_modules():
        if isinstance(layer, nn.Linear):
            handles.append(layer.register_forward_hook(hook(name)))
    return made(**inputs)[0]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("equal", [False, True])
def test_tokens_of_flux(flux, untouched, inputs, adapters, count, equal):
    given = dict(list(adapters.items())[:count])
    if equal:  # as many tokens of the text as of the image
        shorter = {name: inputs[name][..., :TEXTS, :] for name in ("hidden_states", "img_ids")}
        inputs = inputs | shorter
    torch.manual_seed(2)
    rival = XLora(flux, given, weight=1.4, dtype=torch.float64)
    nn.init.normal_(rival.classifier.layers[0].weight, std=1.0)
    states = []
    handle = untouched.norm_out.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    plain = untouched(**inputs)[0]
    handle.remove()
    scalings = (states[0] @ rival.classifier.layers[0].weight.T).detach()
    scalings = 1.4 * (scalings + rival.classifier.layers[0].bias.detach()).softmax(-1)
    strengths = dict.fromkeys(given, 1.0) | {"a": 0.5}
    with rival:
        rival.set_strengths(strengths)
        found = flux(**inputs)[0]
        assert rival.scalings.shape == (2, scalings.shape[1], 28, count)
        assert scalings.shape[1] == (TEXTS if equal else IMAGES)
        assert_close(found, naive(untouched, given, inputs, scalings, strengths))
        rival.set_strengths(dict.fromkeys(given, 0))
        assert torch.equal(flux(**inputs)[0], plain)
        assert rival.scalings is None
    assert torch.equal(flux(**inputs)[0], plain)


def test_an_error_in_the_first_pass_leaves_nothing(flux, inputs, adapters):
    rival = XLora(flux, adapters)

    def fail():
        with rival:
            flux(**inputs | {"hidden_states": inputs["hidden_states"][:, :, :-1]})

    with pytest.raises(RuntimeError):
        fail()
    assert rival.scalings is None


def test_other_adapters_of_the_same_number(flux, inputs, adapters, bundle):
    rival = XLora(flux, adapters, dtype=torch.float64)
    with rival:
        before = flux(**inputs)[0]
        rival.set_adapters({"x": bundle(5), "y": bundle(6, where="ff"), "z": bundle(7, rank=1)})
        assert not torch.allclose(flux(**inputs)[0], before)
        with pytest.raises(GatesError, match="the classifier is for 3 adapters, found 1"):
            rival.set_adapters({"x": bundle(5)})
    narrow = XLora(flux, {"a": bundle(1, where="attn")}, layerwise=True)
    with pytest.raises(GatesError, match=r"has no scalings for .*: train another"):
        narrow.set_adapters({"a": bundle(1)})
    dora = bundle(1)
    dora.modules["proj_out"] = dora.modules["proj_out"]._replace(magnitude=torch.ones(8, 1))
    for attempt in (lambda: XLora(flux, {"d": dora}), lambda: narrow.set_adapters({"d": dora})):
        with pytest.raises(GatesError, match="adapter 'd' is a DoRA at proj_out"):
            attempt()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state": "last"}, "FluxTransformer2DModel has no module 'last'"),
        ({"top_k": 4}, "top_k is 4, expected 1 to 3"),
        ({"depth": 0}, "depth 0 must be at least 1"),
        ({"normalize": "some"}, "normalize is 'some'; choose one of all, kept, never"),
    ],
)
def test_options_are_checked(flux, adapters, options, message):
    with pytest.raises(GatesError, match=message):
        XLora(flux, adapters, **options)


def test_any_model_whose_features_are_given(bundle):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    model.requires_grad_(False)
    adapter = bundle(1).select([])
    factors = bundle(1).modules["proj_out"]
    adapter.modules["0"] = factors._replace(down=torch.ones(2, 4).double(), up=torch.ones(6, 2))
    adapter.modules["0"] = adapter.modules["0"]._replace(up=torch.ones(6, 2).double())
    with pytest.raises(GatesError, match="are not known: give them"):
        XLora(model, {"a": adapter}, state="2")
    x = torch.randn(5, 4, dtype=torch.float64)
    plain = model(x)
    with XLora(model, {"a": adapter}, state="2", features=6, dtype=torch.float64):
        expected = model[2](model[1](plain_of(model, x, adapter)))
        assert_close(model(x), expected)
    assert torch.equal(model(x), plain)


def plain_of(model, x, adapter):
    base = model[0].base
    return x @ (base.weight + adapter.delta_weight("0")).T + base.bias


def test_stable_diffusion_3():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16,
        pooled_projection_dim=10, out_channels=4, dual_attention_layers=(0,),
    ).double().eval().requires_grad_(False)  # fmt: skip
    untouched = deepcopy(model)
    adapter = LoraBundle("sd3", {})
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            sizes = (2, layer.in_features), (layer.out_features, 2)
            adapter.modules[name] = Factors(*(torch.randn(*s).double() for s in sizes), 0.2)
    inputs = {
        "hidden_states": torch.randn(2, 4, 4, 4).double(),  # four tokens
        "encoder_hidden_states": torch.randn(2, 4, 12).double(), "return_dict": False,
        "pooled_projections": torch.randn(2, 10).double(), "timestep": torch.ones(2).double(),
    }  # fmt: skip
    rival = XLora(model, {"a": adapter, "b": adapter}, dtype=torch.float64)
    with rival:  # the scalings of both sum to 1
        found = model(**inputs)[0]
        rival.set_strengths({"b": 0})
        assert not torch.allclose(model(**inputs)[0], found)
        assert rival.scalings.shape[:2] == (2, 4)
    for name in adapter.modules:
        untouched.get_submodule(name).weight += adapter.delta_weight(name)
    assert_close(found, untouched(**inputs)[0])
