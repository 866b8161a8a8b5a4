"""Networks with feature-selection gates against vectors of the published implementation."""

import pytest
from torch.nn import functional as F
from torch.testing import assert_close

from core_gates.surgery import inject_gates
from tests.fixtures.recipe_weights import recipe_weights


def load(model, tensors, prefix, gate_names):
    """Load the tensors of a prefix; what the file does not hold are the gates' masks alone."""
    weights = {
        gate_names(name.removeprefix(prefix)): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert all(name.endswith("gate.kept") for name in missing)
    assert not unexpected


def gradients(model, tensors, gate_names):
    """Iterate over name, gradient and expected gradient of all that the file holds."""
    parameters = dict(model.named_parameters())
    names = [name for name in tensors if name.startswith("g.")]
    assert names
    for name in names:
        parameter = gate_names(name.removeprefix("g."))
        yield parameter, parameters[parameter].grad, tensors[name]


@pytest.mark.parametrize("name", ["fsg_vit_block_d16_h2_s11", "fsg_vit_block_d24_h3_s12"])
def test_block(name, vectors, models, gate_names):
    tensors = vectors(f"endoscopy/{name}")
    block = models["block"](
        tensors["x"].shape[-1],
        int(tensors["heads"]),
        float(tensors["mlp_ratio"]),
        bias="w.attn.qkv.bias" in tensors,
        eps=1e-5,
    ).double()
    assert list(inject_gates(block)) == ["attn.proj", "mlp.fc2"]
    load(block, tensors, "w.", gate_names)
    x = tensors["x"].requires_grad_()
    y = block(x)
    assert_close(y, tensors["y"], rtol=1e-9, atol=1e-11)
    (y * tensors["gy"]).sum().backward()
    assert_close(x.grad, tensors["gx"], rtol=1e-9, atol=1e-11)
    for name, grad, expected in gradients(block, tensors, gate_names):
        assert_close(grad, expected, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_vit(vectors, models, gate_names):
    tensors = vectors("endoscopy/fsg_vit_full_i32p8d24x3_s31")
    vit = models["vit"](32, 8, 24, 3, int(tensors["heads"]), 3).double()
    assert len(inject_gates(vit)) == 6
    load(vit, tensors, "w.", gate_names)
    logits = vit(tensors["x"])
    loss = F.cross_entropy(logits, tensors["target"])
    assert_close(logits, tensors["logits"], rtol=1e-9, atol=1e-11)
    assert_close(loss, tensors["loss"], rtol=1e-9, atol=1e-11)
    loss.backward()
    for name, grad, expected in gradients(vit, tensors, gate_names):
        assert_close(grad, expected, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("name", "streams", "tolerance"),
    [
        ("fsg_resnet18_rgb_eval_s41", {"rgb": 3}, {"rtol": 1e-9, "atol": 1e-11}),
        (
            "fsg_resnet18_mask-depth_train_s42",
            {"mask": 3, "depth": 1},
            {"rtol": 1e-6, "atol": 1e-11},
        ),
    ],
)
def test_resnet(name, streams, tolerance, vectors, models, gate_names):
    tensors = vectors(f"endoscopy/{name}")
    training = "train" in name
    model = models["multi_stream"](streams, 16).double().train(training)
    missing, unused = model.load_state_dict(recipe_weights(tensors, gate_names), strict=False)
    assert all(n.endswith(("kept", "running_mean", "running_var", "tracked")) for n in missing)
    assert all(n.endswith("gate.logits") for n in unused)  # of streams that are not there
    y = model({stream: tensors[f"in.{stream}"] for stream in streams})
    assert_close(y, tensors["y"], **tolerance)
    (y * tensors["gy"]).sum().backward()
    for parameter, grad, expected in gradients(model, tensors, gate_names):
        if training and ".bn1." in parameter:
            # Single entries cancel to near zero; the array as a whole is tenfold better than them.
            assert (grad - expected).norm() <= 1e-7 * expected.norm(), parameter
        else:
            assert_close(grad, expected, **tolerance, msg=lambda m, n=parameter: f"{n}: {m}")
