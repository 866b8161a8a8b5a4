import pytest
import timm
import torch
from safetensors.torch import save_file

from endoscopy.models import MultiStreamSizer, fsg_vit, load_timm_weights

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
SMALL = {"channels": [8, 8, 8, 8]}


def resnet(streams, **options):
    return MultiStreamSizer("resnet10t", streams, trunk_options=SMALL, hidden_dim=8, **options)


@pytest.fixture
def resnet_file(tmp_path):
    donor = timm.create_model("resnet10t", num_classes=7, **SMALL)
    save_file(donor.state_dict(), tmp_path / "resnet.safetensors")
    return donor, tmp_path / "resnet.safetensors"


def test_trunks_take_the_weights_and_gates_keep_their_start(resnet_file):
    donor, path = resnet_file
    model = resnet(("rgb", "rgb_mask"))
    logits = model.branches["rgb"].layer2.gate.logits.clone()
    stem = model.branches["rgb_mask"].conv1[0].weight.clone()
    assert list(load_timm_weights(model, path, ["rgb"])) == ["rgb"]
    report = load_timm_weights(model, path)
    for name, trunk in model.branches.items():
        assert torch.equal(trunk.layer1[0].conv1.weight, donor.layer1[0].conv1.weight)
        assert sum("gate.logits" in tensor for tensor in report[name].fresh) == 4
    assert torch.equal(model.branches["rgb"].conv1[0].weight, donor.conv1[0].weight)
    assert torch.equal(model.branches["rgb_mask"].conv1[0].weight, stem)
    assert "conv1.0.weight" in report["rgb_mask"].fresh
    assert "conv1.0.weight" not in report["rgb"].fresh
    assert torch.equal(model.branches["rgb"].layer2.gate.logits, logits)
    images = torch.randn(2, 3, 32, 32)
    ungated = resnet(("rgb",), gates="none")
    load_timm_weights(ungated, path)
    donor.reset_classifier(0)
    assert torch.equal(ungated.eval().branches["rgb"](images), donor.eval()(images))


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_files_of_torch(tmp_path, wrapper):
    donor = timm.create_model("vit_tiny_patch16_384", num_classes=5, **VIT)
    state = donor.state_dict()
    torch.save({wrapper: state} if wrapper else state, tmp_path / "vit.pth")
    model = fsg_vit(trunk_options=VIT)
    report = load_timm_weights(model, tmp_path / "vit.pth")["rgb"]
    assert report.loaded == len(state) - 2  # the classifier
    assert torch.equal(model.branches["rgb"].pos_embed, donor.pos_embed)


def test_position_embeddings_are_resampled_to_the_image(tmp_path):
    donor = timm.create_model("vit_tiny_patch16_384", num_classes=0, **VIT)
    donor.pos_embed.data = torch.ones_like(donor.pos_embed)
    save_file(donor.state_dict(), tmp_path / "vit.safetensors")
    model = fsg_vit(trunk_options=VIT | {"img_size": 64})
    report = load_timm_weights(model, tmp_path / "vit.safetensors")["rgb"]
    assert report.resampled == ("pos_embed",)
    assert model.branches["rgb"].pos_embed.shape == (1, 65, 24)
    assert torch.allclose(model.branches["rgb"].pos_embed, torch.ones(()), atol=1e-5)


class Trap:
    def __reduce__(self):
        return (print, ("executed",))


def test_what_does_not_fit_is_named_and_nothing_changes(tmp_path, resnet_file, capsys, refused):
    _, path = resnet_file
    model = fsg_vit(trunk_options=VIT)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (tmp_path / "noise.pth").write_bytes(b"noise")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    torch.save({"model": Trap()}, tmp_path / "trap.pth")
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    for name, change in (("deep", {"depth": 2}), ("narrow", {"mlp_ratio": 2})):
        other = timm.create_model("vit_tiny_patch16_384", **VIT | change)
        save_file(other.state_dict(), tmp_path / f"{name}.safetensors")
    for name, message in (
        ("none.pth", "no weights at .*none.pth: give a"),
        ("noise.pth", "damaged or holds more than tensors"),
        ("empty.safetensors", "damaged or holds more than tensors"),
        ("trap.pth", "damaged or holds more than tensors"),
        ("other.pth", "holds no state dict"),
        ("resnet.safetensors", "does not fit the trunk VisionTransformer: it lacks cls_token"),
        ("deep.safetensors", "it has blocks.1.* besides"),
        ("narrow.safetensors", r"has blocks.0.mlp.fc1.weight \(48, 24\), not \(96, 24\)"),
    ):
        refused(message, load_timm_weights, model, tmp_path / name)
    refused(
        r"no stream \['depth'\]: the network has rgb", load_timm_weights, model, path, ["depth"]
    )
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert not capsys.readouterr().out
