import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from core_gates import FeatureSelectionGate, SparseLowRank
from core_gates.surgery import fold_gates, gate_hosts, inject_gates, prune_gates

# Small models of each family: name, options, image size, gated modules.
MODELS = {
    "vit": (
        "vit_tiny_patch16_224",
        {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2},
        16,
        4,
    ),
    "vit with layer scale": (
        "vit_tiny_patch16_224",
        {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}
        | {"init_values": 0.5, "drop_path_rate": 0.1},
        16,
        4,
    ),
    "vit of parallel branches": (
        "vit_small_patch16_18x2_224",
        {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2},
        16,
        8,
    ),
    "vit of joint projections": (
        "vit_base_patch16_xp_224",
        {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2},
        16,
        4,
    ),
    "vit of one joint projection": (
        "vit_dpwee_patch16_reg1_gap_256",
        {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2},
        16,
        2,
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (1, 2), "num_heads": (2, 4)},
        32,
        6,
    ),
    "swin v2": (
        "swinv2_tiny_window8_256",
        {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (1, 2), "num_heads": (2, 4)},
        32,
        6,
    ),
    "vit of relative positions": (
        "vit_relpos_base_patch16_rpn_224",
        {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2},
        16,
        4,
    ),
    "convnext": ("convnext_tiny", {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24)}, 32, 5),
    "convnext of convolutions": (
        "convnext_atto",
        {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24)},
        32,
        4,
    ),
    "resnet": ("resnet10t", {"channels": (8, 12, 16, 24)}, 32, 4),
    "resnet of bottlenecks": ("resnet26d", {"channels": (4, 8, 8, 12)}, 32, 4),
    "resnet of selective kernels": ("skresnet50", {"channels": (4, 8, 8, 12)}, 32, 4),
}
POST_NORM = {"SwinTransformerV2Block", "ResPostRelPosBlock"}


@pytest.fixture(params=MODELS)
def case(request):
    """A model in evaluation with trained-looking weights, images, its number of gates."""
    timm = pytest.importorskip("timm")
    name, options, size, num_gates = MODELS[request.param]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.data += 0.2 * torch.rand(tensor.shape)
    return model, torch.randn(2, 3, size, size), num_gates


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x):
        return self.proj(x)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc2(self.fc1(x).relu())


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2, self.attn, self.mlp = (
            nn.LayerNorm(4), nn.LayerNorm(4), Attention(), Mlp(),
        )  # fmt: skip

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def two_blocks():
    torch.manual_seed(1)
    return nn.Sequential(Block(), Block())


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def test_folded_equals_gated(case):
    model, images, num_gates = case
    kinds = [type(module) for module in model.modules()]
    with torch.no_grad():
        plain = model(images)
        gates = inject_gates(model)
        gated = model(images)
        folded = fold_gates(copy.deepcopy(model))
        result = folded(images)
    assert len(gates) == num_gates
    assert relative_error(gated, plain) > 1e-3  # the gates do something
    assert relative_error(result, gated) < 1e-5
    assert [type(module) for module in folded.modules()] == kinds  # no extra operation
    assert not any(module._forward_hooks for module in folded.modules())


def test_the_seam_is_the_residual_branch(case):
    """Closing all gates of a branch model removes the branches; of a ResNet, everything."""
    model, images, _ = case
    gates = inject_gates(model)
    for gate in gates.values():
        gate.kept.fill_(False)
    stages = any(isinstance(model.get_submodule(name), nn.Sequential) for name in gates)
    with torch.no_grad():
        closed = model(images)
    if stages:
        assert_close(closed, model.fc.bias.expand_as(closed))
        return
    for module in model.modules():
        if type(module).__name__.endswith("Block"):
            for name in ("norm1", "norm2") if type(module).__name__ in POST_NORM else ():
                nn.init.zeros_(module.get_submodule(name).weight)
                nn.init.zeros_(module.get_submodule(name).bias)
            if hasattr(module, "gamma"):
                nn.init.zeros_(module.gamma)
            elif type(module).__name__ not in POST_NORM:
                for name, linear in module.named_modules():
                    if name.endswith(("attn.proj", "mlp.fc2", "out_proj")):
                        nn.init.zeros_(linear.weight)
                        nn.init.zeros_(linear.bias)
    for gate in gates.values():
        gate.kept.fill_(True)
    with torch.no_grad():
        assert_close(model(images), closed)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnetv2_18", {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)}),
        ("skresnet18", {"layers": (1, 1, 1, 1), "channels": (8, 16, 16, 16)}),
    ],
)
def test_other_resnets_are_gated_and_refuse_to_be_folded(refuses, name, options):
    model = pytest.importorskip("timm").create_model(name, num_classes=5, **options).eval()
    images = torch.randn(2, 3, 32, 32)
    plain = model(images)
    gates = inject_gates(model)
    assert len(gates) == 4
    assert relative_error(model(images), plain) > 1e-3
    model(images).square().sum().backward()
    assert all(gate.logits.grad.abs().sum() > 0 for gate in gates.values())
    refuses(ValueError, ("cannot be folded", lambda: fold_gates(model)))
    assert all(module in model.modules() for module in gates.values())  # nothing has changed


def test_gates_learn_and_weights_load_by_their_old_names(case):
    model, images, _ = case
    state = copy.deepcopy(model.state_dict())
    gates = inject_gates(model)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert {name.rpartition(".gate.")[0] for name in missing} == set(gates)
    model.train()(images).square().sum().backward()
    for gate in gates.values():
        assert gate.logits.grad.abs().max() > 0


def test_copies_and_pickles_use_their_own_gates():
    model = two_blocks()
    inject_gates(model)
    x = torch.randn(3, 4)
    before = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), before)
        for module in twin.modules():
            if isinstance(module, FeatureSelectionGate):
                module.logits.data.fill_(9.0)
        assert not torch.allclose(twin(x), before)
    assert torch.equal(model(x), before)


def test_names_and_patterns():
    assert list(gate_hosts(two_blocks())) == [
        "0.attn.proj",
        "0.mlp.fc2",
        "1.attn.proj",
        "1.mlp.fc2",
    ]
    assert list(gate_hosts(Block())) == ["attn.proj", "mlp.fc2"]
    model = two_blocks()
    assert list(inject_gates(model, where=["1.*", "0.mlp*"])) == [
        "0.mlp.fc2",
        "1.attn.proj",
        "1.mlp.fc2",
    ]
    fold_gates(model, where=["1.*"])
    assert [n for n, m in model.named_modules() if isinstance(m, FeatureSelectionGate)] == [
        "0.mlp.fc2.gate"
    ]


@pytest.mark.parametrize("rectifier", ["relu", "hard_concrete", "straight_through"])
def test_every_rectifier_prunes_and_folds(rectifier):
    model = two_blocks().double()
    gate = functools.partial(FeatureSelectionGate, rectifier=rectifier)
    gates = inject_gates(model, gate=gate)
    for g in gates.values():
        g.logits.data = torch.tensor([-3.0, 0.4, 1.0, 2.0], dtype=torch.float64)
    model.eval()
    x = torch.randn(3, 4, dtype=torch.float64)
    before = model(x)
    assert prune_gates(model) == {f"{name}.gate": 3 for name in gates}
    assert_close(model(x), before, rtol=0, atol=0)
    assert_close(fold_gates(model)(x), before, rtol=1e-12, atol=1e-12)
    assert (model[0].mlp.fc2.weight[0] == 0).all()
    assert (model[0].mlp.fc2.weight[1] != 0).all()


def test_pruning_asks_every_module_that_offers_it():
    model = nn.Sequential(FeatureSelectionGate(3, rectifier="relu"), SparseLowRank(3, 2, rank=4))
    model[0].logits.data.copy_(torch.tensor([-1.0, 0.2, 0.5]))
    model[1].lora_gate.weight.data.copy_(torch.tensor([0.0, -0.3, 0.2, -2.0]))
    nn.init.normal_(model[1].lora_B)
    x = torch.randn(5, 3)
    before = model(x)
    assert prune_gates(model) == {"0": 2, "1": 3}  # with exact zeros alone the output stays
    assert_close(model(x), before)
    assert prune_gates(model, threshold=0.3) == {"0": 1, "1": 1}
    assert (model[1].lora_gate.weight.tolist(), model[1](x).shape) == ([-2.0], (5, 2))


def test_gates_follow_device_dtype_and_mode_of_their_host():
    for gate in inject_gates(two_blocks().to(torch.bfloat16).eval()).values():
        assert gate.logits.dtype == torch.bfloat16
        assert not gate.training
    assert all(gate.logits.is_meta for gate in inject_gates(Block().to("meta")).values())


def test_gated_models_compile_into_one_graph():
    model = two_blocks()
    inject_gates(model)
    x = torch.randn(3, 4)
    assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


def test_gates_of_ones_own_are_left_alone():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = FeatureSelectionGate(4)

    assert isinstance(fold_gates(Own()).gate, FeatureSelectionGate)


def test_a_model_without_such_blocks_is_refused(refuses):
    refuses(
        ValueError,
        (
            r"of Linear matches .* expected a ViT, Swin, ConvNeXt",
            lambda: inject_gates(nn.Linear(2, 2)),
        ),
        (
            r"matches \['head'\]; it offers 0.attn.proj, 0.mlp.fc2",
            lambda: inject_gates(two_blocks(), where=["head"]),
        ),
    )


def test_a_second_injection_is_refused_and_changes_nothing(refuses):
    model = two_blocks()
    inject_gates(model, where=["1.mlp.fc2"])
    refuses(ValueError, (r"1\.mlp\.fc2 has a gate already", lambda: inject_gates(model)))
    assert sum(isinstance(m, FeatureSelectionGate) for m in model.modules()) == 1


def test_a_stage_that_nothing_can_absorb_is_refused_and_nothing_is_changed():
    class Stage(nn.Module):
        def __init__(self, in_dim):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(in_dim, 4, 1), nn.Conv2d(4, 4, 1)
            self.downsample = None

    class Trunk(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer1, self.layer2 = nn.Sequential(Stage(4)), nn.Sequential(Stage(4))

    trunk = Trunk()
    inject_gates(trunk)
    state = copy.deepcopy(trunk.state_dict())
    for where, message in (("layer1", "both paths of layer2"), ("layer2", "'fc' of 4 inputs")):
        with pytest.raises(ValueError, match=f"the gate of {where} cannot be folded.*{message}"):
            fold_gates(trunk, where=[where])
    assert_close(dict(trunk.state_dict()), dict(state), rtol=0, atol=0)
