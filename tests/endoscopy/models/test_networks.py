import pytest
import torch
from torch import nn

from core_gates.errors import GatesError
from core_gates.features.selection import FeatureSelectionGate
from endoscopy.data.streams import STREAMS
from endoscopy.models import (
    MultiStreamSizer,
    fsg_efficientnet_b0,
    fsg_resnet18,
    fsg_vit,
    fsg_vit_tiny_patch16_384,
    gate_parameters,
    tiny_resnet,
    tiny_vit,
    weight_parameters,
)

PUBLISHED = {
    fsg_vit_tiny_patch16_384: (5_597_569, 24 * 192),
    fsg_resnet18: (11_242_305, 960 + 512 + 128),
    fsg_efficientnet_b0: (4_171_645, 1280 + 128),
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


def test_the_box_reaches_the_head():
    model = tiny_resnet(geometry=True).eval()
    streams, box = {"rgb_mask": torch.randn(2, 4, 32, 32)}, torch.randn(2, 4)
    moved = model(streams, box + torch.tensor([1.0, 0, 0, 0])) - model(streams, box)
    weight = model.head.fc.weight[:, 96]
    assert torch.allclose(moved, weight.expand(2, 1), atol=1e-6)
    with pytest.raises(GatesError, match="reads the geometry of the box"):
        model(streams)
    plain = tiny_resnet().eval()
    assert torch.equal(plain(streams, box), plain(streams))


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("build", [tiny_resnet, tiny_vit])
def test_any_number_of_channels(build, channels):
    model = build({"own": channels}, outputs=3)
    assert model({"own": torch.randn(2, channels, 64, 64)}).shape == (2, 3)


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
    per_block = 4 if "18x2" in name else 2
    assert len(gates) == per_block * len(blocks) > 0


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


def test_a_missing_stream_is_named():
    model = tiny_resnet(("rgb", "depth"))
    with pytest.raises(GatesError, match=r"also reads depth: set --data.streams to \[rgb, depth\]"):
        model({"rgb": torch.randn(1, 3, 32, 32)})


def test_channels_are_those_of_the_data():
    model = tiny_resnet(tuple(STREAMS))
    for name, channels in STREAMS.items():
        first = next(m for m in model.branches[name].modules() if isinstance(m, nn.Conv2d))
        assert first.in_channels == channels
