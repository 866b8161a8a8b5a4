"""Sizing networks: their sizes, folded ones, and vectors of the published implementation."""

from collections import Counter
from functools import partial

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from core_gates.features.selection import FeatureSelectionGate
from endoscopy.data.streams import STREAMS
from endoscopy.models import (
    MultiStreamSizer,
    fold,
    fsg_resnet18,
    fsg_vit,
    fsg_vit_tiny_patch16_384,
    gate_parameters,
    gates_of,
    tiny_resnet,
    tiny_vit,
    weight_parameters,
)
from endoscopy.models.trunks import gate_trunk
from tests.fixtures.recipe_weights import recipe_weights

PUBLISHED = {
    fsg_vit_tiny_patch16_384: (5_597_569, 24 * 192),
    fsg_resnet18: (11_242_305, 960 + 512 + 128),
    partial(MultiStreamSizer, "efficientnet_b0", hidden_dim=128): (4_171_645, 1280 + 128),
    tiny_resnet: (223_617, 16 + 32 + 64 + 96),
    tiny_vit: (478_657, 8 * 96),
}


def count(parameters):
    return sum(p.numel() for p in parameters.values())


@pytest.mark.parametrize("build", PUBLISHED)
def test_sizes(build):
    """ViT-Ti 5.6 M with 4,608 gates, ResNet-18 11.2 M with 960 and those of the head."""
    with torch.device("meta"):
        model = build()
        plain = build(gates="none")
    num_weights, num_gates = PUBLISHED[build]
    assert count(gate_parameters(model)) == num_gates
    assert count(weight_parameters(model)) == count(weight_parameters(plain)) == num_weights
    assert not gate_parameters(plain)


def test_gates_of_three_streams():
    with torch.device("meta"):
        model = fsg_resnet18(("rgb", "loc", "depth"))
    assert count(gate_parameters(model)) == 3 * 960 + 3 * 512 + 128
    assert model.branches["depth"].conv1.weight.shape == (64, 1, 7, 7)
    assert list(model.branches) == ["rgb", "loc", "depth"]


def test_the_order_of_the_streams_is_that_of_the_features():
    torch.manual_seed(0)
    model = tiny_resnet(("loc", "rgb")).eval()
    streams = {"rgb": torch.randn(2, 3, 32, 32), "loc": torch.randn(2, 3, 32, 32)}
    features = torch.cat([model.branches[name](streams[name]) for name in ("loc", "rgb")], 1)
    assert torch.equal(model(streams | {"depth": torch.zeros(0)}), model.head.fc(features))


def test_the_box_reaches_the_head(refused):
    model = tiny_resnet(geometry=True).eval()
    streams, box = {"rgb_mask": torch.randn(2, 4, 32, 32)}, torch.randn(2, 4)
    moved = model(streams, box + torch.tensor([1.0, 0, 0, 0])) - model(streams, box)
    assert torch.allclose(moved, model.head.fc.weight[:, 96].expand(2, 1), atol=1e-6)
    refused("reads the geometry of the box", model, streams)
    refused(
        r"also reads depth: set --data.streams to \[rgb_mask, depth",
        tiny_resnet(("rgb_mask", "depth")),
        streams,
    )
    plain = tiny_resnet().eval()
    assert torch.equal(plain(streams, box), plain(streams))


FAMILY = [
    "vit_tiny_patch16_384",
    "deit3_small_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "beit_base_patch16_224",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_18x2_224",
    "vit_base_patch16_xp_224",
    "vit_relpos_small_patch16_224",
    "swin_tiny_patch4_window7_224",
]


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_of_vision_transformers(name):
    with torch.device("meta"):
        model = fsg_vit(name)
    trunk = model.branches["rgb"]
    gates = [m for m in trunk.modules() if isinstance(m, FeatureSelectionGate)]
    blocks = getattr(trunk, "blocks", [b for s in getattr(trunk, "layers", []) for b in s.blocks])
    assert len(gates) == (4 if "18x2" in name else 2) * len(blocks) > 0


def test_layer_scale_and_stochastic_depth_stay_beside_gates():
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    model = fsg_vit(trunk_options={**options, "init_values": 0.1, "drop_path_rate": 0.9})
    block = model.branches["rgb"].blocks[1]
    block.ls2.gamma.data.fill_(2.0)
    assert block.drop_path2.drop_prob == pytest.approx(0.9)
    with torch.no_grad():
        block.mlp.fc2.gate.logits.fill_(-200.0)
        x = torch.randn(2, 5, 24)
        model.eval()
        middle = x + block.ls1(block.attn(block.norm1(x)))
        assert torch.allclose(block(x), middle, atol=1e-6)  # a closed gate closes the branch


def test_save_and_load(tmp_path):
    model = fsg_vit(
        "vit_tiny_patch16_224", {"rgb": 3, "own": 2}, 4, geometry=True, trunk_options=SMALL
    ).eval()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    loaded = MultiStreamSizer.from_pretrained(tmp_path).eval()
    assert loaded.arguments == model.arguments
    assert fold(loaded).arguments == {**model.arguments, "gates": "none"}
    streams = {"rgb": torch.randn(2, 3, 16, 16), "own": torch.randn(2, 2, 16, 16)}
    box = torch.randn(2, 4)
    assert torch.equal(loaded(streams, box), model(streams, box))


SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trunk": "resnet81"}, "'resnet81' is neither 'tiny_resnet' nor a model .* 'resnet18'"),
        ({"trunk": "tiny_resnet", "trunk_options": {"deep": 1}}, "refuses its options"),
        ({"trunk": "tiny_resnet", "trunk_options": {"depths": [1]}}, "widths has 5 entries"),
        ({"streams": ("rgb", "thermal")}, "unknown stream 'thermal'; choose from rgb"),
        ({"streams": "rgb"}, r"streams is 'rgb'; expected a list such as \['rgb'\]"),
        ({"streams": ()}, "streams must name at least one"),
        ({"streams": ("rgb", "rgb")}, "each once"),
        ({"outputs": 0}, "outputs must be at least 1, got 0"),
        ({"gates": "soft"}, "gates is 'soft'; choose one of fsg, none"),
        ({"trunk": "efficientnet_b0", "gates": "se"}, "no place for gates 'se'"),
        ({"trunk": "efficientnet_b0", "hidden_dim": None}, "no place for gates 'fsg'"),
    ],
    ids=str,
)
def test_arguments_are_checked(arguments, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        MultiStreamSizer(**arguments)


def test_channels_are_those_of_the_data():
    model = tiny_resnet(tuple(STREAMS))
    for name, channels in STREAMS.items():
        first = next(m for m in model.branches[name].modules() if isinstance(m, nn.Conv2d))
        assert first.in_channels == channels


SMALL_VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def swiglu(**options):
    return fsg_vit(
        "eva02_tiny_patch14_224", trunk_options={**SMALL_VIT, "patch_size": 8}, **options
    )


def convnext(**options):
    sizes = {"depths": [1, 1, 2, 1], "dims": [8, 12, 16, 24]}
    return fsg_vit("convnext_tiny", trunk_options=sizes, **options)


NETWORKS = {
    "vit": (lambda **k: fsg_vit(trunk_options={**SMALL_VIT, "init_values": 0.5}, **k), 16),
    "swiglu": (swiglu, 16),
    "convnext": (convnext, 32),
    "three streams": (
        lambda **k: fsg_resnet18(("rgb", "loc", "depth"), geometry=True, hidden_dim=16, **k),
        32,
    ),
    "efficientnet": (lambda **k: MultiStreamSizer("efficientnet_b0", hidden_dim=16, **k), 32),
    "tiny resnet": (lambda **k: tiny_resnet(("rgb", "depth"), **k), 32),
    "tiny vit": (lambda **k: tiny_vit(("rgb",), geometry=True, **k), 64),
}


@pytest.fixture(
    params=[
        pytest.param(name, marks=[pytest.mark.slow] * (name == "three streams"))
        for name in NETWORKS
    ]
)
def case(request, grown):
    """How to build a network, a grown one, and what it reads."""
    build, size = NETWORKS[request.param]
    torch.manual_seed(0)
    streams = {"rgb": torch.randn(2, 3, size, size), "depth": torch.randn(2, 1, size, size)}
    streams["loc"] = torch.randn(2, 3, size, size)
    inputs = streams, torch.randn(2, 4)
    return build, grown(build(), *inputs), inputs


def operations(model, inputs):
    """How often each operation stands in the exported graph."""
    streams = {name: inputs[0][name] for name in model.branches}
    program = torch.export.export(model, (streams, inputs[1]))
    return Counter(str(n.target) for n in program.graph.nodes if n.op == "call_function")


@torch.no_grad()
@pytest.mark.ends("two exports a case")
def test_folded_equals_gated_without_any_further_operation(case):
    build, model, inputs = case
    gated = model(*inputs)
    folded = fold(model)
    assert (folded(*inputs) - gated).abs().max() < 1e-5 * gated.abs().max()
    assert gated.std() > 1e-3 * gated.abs().max()  # else nothing but the bias would be compared
    assert not gates_of(folded)
    plain = build(gates="none").eval()
    assert [type(module) for module in folded.modules()] == [type(m) for m in plain.modules()]
    plain.load_state_dict(folded.state_dict())  # it is a network without gates
    if build is NETWORKS["efficientnet"][0]:  # seconds to export, and its trunk has no gates
        return
    expected = operations(plain, inputs)
    assert operations(folded, inputs) == expected
    if build is NETWORKS["vit"][0]:
        assert operations(model, inputs).total() > expected.total()


@torch.no_grad()
def test_the_network_that_is_folded_stays_as_it_was(case):
    _, model, inputs = case
    before = model(*inputs)
    for gate in gates_of(model).values():
        gate.logits.fill_(-30.0)  # all closed
    closed = model(*inputs)
    assert not torch.allclose(before, closed, rtol=1e-3)
    folded = fold(model)
    assert torch.equal(model(*inputs), closed)
    assert torch.allclose(folded(*inputs), closed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gates", ["l0", "layer_scale", "se", "none"])
@torch.no_grad()
def test_every_kind_of_gate(gates, grown):
    streams = {"rgb": torch.randn(4, 3, 32, 32), "depth": torch.randn(4, 1, 32, 32)}
    model = grown(tiny_resnet(("rgb", "depth"), gates=gates, hidden_dim=8), streams)
    expected = model(streams)
    folded = fold(model)
    assert (folded(streams) - expected).abs().max() < 1e-5 * expected.abs().max()
    static = gates in ("l0", "layer_scale")
    kinds = [type(module) for module in model.modules()]
    assert (kinds != [type(module) for module in folded.modules()]) == static


EXACT = {"rtol": 1e-9, "atol": 1e-11}


def check_gradients(model, tensors, rename, tolerance):
    """Compare the gradients of all parameters that the file holds."""
    parameters = dict(model.named_parameters())
    names = [name for name in tensors if name.startswith("g.")]
    assert names
    for name in names:
        own = rename(name.removeprefix("g."))
        grad, expected = parameters[own].grad, tensors[name]
        if tolerance["rtol"] > 1e-9 and ".bn1." in own:
            # Single entries cancel to near zero; the array as a whole is tenfold better than them.
            assert (grad - expected).norm() <= 1e-7 * expected.norm(), own
        else:
            assert_close(grad, expected, **tolerance, msg=lambda m, n=own: f"{n}: {m}")


@pytest.mark.parametrize("name", ["fsg_vit_block_d16_h2_s11", "fsg_vit_block_d24_h3_s12"])
def test_a_block_of_timm_with_our_gates(name, vectors, own_name):
    tensors = vectors(name)
    bias = "w.attn.qkv.bias" in tensors
    dim, num_heads = tensors["x"].shape[-1], int(tensors["heads"])
    norm = partial(nn.LayerNorm, eps=1e-5)
    ratio = float(tensors["mlp_ratio"])
    block = Block(dim, num_heads, ratio, qkv_bias=bias, norm_layer=norm).double()
    assert gate_trunk(block, "fsg") == 2

    def rename(name):
        return own_name(name).removeprefix("branches.rgb.")

    weights = {rename(k[2:]): v for k, v in tensors.items() if k.startswith("w.")}
    missing, unexpected = block.load_state_dict(weights, strict=False)
    assert not unexpected
    assert {name.rpartition(".")[2] for name in missing} == {"kept"}
    x = tensors["x"].requires_grad_()
    y = block(x)
    assert_close(y, tensors["y"], **EXACT)
    (y * tensors["gy"]).sum().backward()
    assert_close(x.grad, tensors["gx"], **EXACT)
    check_gradients(block, tensors, rename, EXACT)


def test_the_vision_transformer(vectors, own_name):
    tensors = vectors("fsg_vit_full_i32p8d24x3_s31")
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3}
    options["num_heads"] = int(tensors["heads"])
    model = fsg_vit("vit_tiny_patch16_384", outputs=3, trunk_options=options).double()
    weights = {own_name(k[2:]): v for k, v in tensors.items() if k.startswith("w.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert len(missing) == 6
    logits = model({"rgb": tensors["x"]})
    loss = F.cross_entropy(logits, tensors["target"])
    assert_close((logits, loss), (tensors["logits"], tensors["loss"]), **EXACT)
    loss.backward()
    check_gradients(model, tensors, own_name, EXACT)


@pytest.mark.parametrize(
    ("name", "streams", "tolerance"),
    [
        ("fsg_resnet18_rgb_eval_s41", {"rgb": 3}, EXACT),
        (
            "fsg_resnet18_mask-depth_train_s42",
            {"mask": 3, "depth": 1},
            {"rtol": 1e-6, "atol": 1e-11},
        ),
    ],
)
def test_the_multi_stream_resnet(name, streams, tolerance, vectors, own_name):
    tensors = vectors(name)
    model = fsg_resnet18(streams, hidden_dim=16).double().train("train" in name)
    missing, unused = model.load_state_dict(recipe_weights(tensors, own_name), strict=False)
    assert all(n.endswith(("kept", "running_mean", "running_var", "tracked")) for n in missing)
    assert all(n.endswith("gate.logits") for n in unused)  # of streams that are not there
    y = model({stream: tensors[f"in.{stream}"] for stream in streams})
    assert_close(y, tensors["y"], **tolerance)
    (y * tensors["gy"]).sum().backward()
    check_gradients(model, tensors, own_name, tolerance)
