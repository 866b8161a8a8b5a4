"""Our sizing networks against vectors of the published implementation."""

from functools import partial
from math import prod

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from endoscopy.models import fsg_resnet18, fsg_vit
from endoscopy.models.gate_kinds import gate_trunk

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
    assert_close(logits, tensors["logits"], **EXACT)
    assert_close(loss, tensors["loss"], **EXACT)
    loss.backward()
    check_gradients(model, tensors, own_name, EXACT)


def fill(tensors, rename):
    """The weights of the ResNet files, which hold a recipe instead."""
    weights = {}
    shapes = zip(tensors["param_names"], tensors["param_shapes"], strict=True)
    for k, (name, shape) in enumerate(shapes):
        shape = [int(n) for n in shape.strip("(),").split(",")]
        i = np.arange(prod(shape), dtype=np.float64)
        u = np.sin(float(tensors["fill_a"]) * i + float(tensors["fill_b"]) * (k + 1))
        u = torch.from_numpy(u.reshape(shape))
        if name.startswith("fsag"):
            u = 0.8 * u
        elif len(shape) > 1:
            u = u * (2 / prod(shape[1:])) ** 0.5
        else:
            u = 1 + 0.1 * u if name.endswith("weight") else 0.05 * u
        weights[rename(name)] = u
    return weights


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
    missing, unused = model.load_state_dict(fill(tensors, own_name), strict=False)
    assert all(n.endswith(("kept", "running_mean", "running_var", "tracked")) for n in missing)
    assert all(n.endswith("gate.logits") for n in unused)  # of streams that are not there
    y = model({stream: tensors[f"in.{stream}"] for stream in streams})
    assert_close(y, tensors["y"], **tolerance)
    (y * tensors["gy"]).sum().backward()
    check_gradients(model, tensors, own_name, tolerance)
