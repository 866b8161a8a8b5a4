"""Gradient routing of a tiny gated ViT against vectors of the canonical and published rules."""

import json

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from core_gates import GradientRouting, inject_gates


def build(models, gate_names, tensors, config, dtype):
    """The model with the weights of the file; both optimizers; gradients at their steps."""
    sizes = [config[name] for name in ("img", "patch", "embed_dim", "depth", "heads")]
    model = models["vit"](*sizes, config.get("num_classes", 1)).to(dtype)
    gates = [gate.logits for gate in inject_gates(model).values()]
    weights = [p for p in model.parameters() if all(p is not gate for gate in gates)]
    before = {k[7:].removeprefix("model."): v for k, v in tensors.items() if k[:7] == "before."}
    _, unexpected = model.load_state_dict(
        {gate_names(name): tensor for name, tensor in before.items()}, strict=False
    )
    assert not unexpected
    decay = config.get("wd", 0.0)
    optimizer = torch.optim.Adam(weights, config["lr"], weight_decay=decay)
    gate_optimizer = torch.optim.Adam(gates, config.get("lr_gr", config.get("lr_gate")))
    seen = {"main": [], "gate": []}
    for kind, o in (("main", optimizer), ("gate", gate_optimizer)):
        o.register_step_pre_hook(lambda *_, steps=seen[kind]: steps.append(gradients(model)))
    return model, optimizer, gate_optimizer, seen


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_holds(actual, tensors, prefix, gate_names, *, factor=1.0, **tolerance):
    """Compare all tensors of a prefix with those of the same name."""
    names = [name for name in tensors if name.startswith(prefix)]
    assert names
    for name in names:
        own = gate_names(name.removeprefix(prefix).removeprefix("model."))
        expected = factor * tensors[name]
        assert_close(actual[own], expected, **tolerance, msg=lambda m, n=own: f"{n}: {m}")


@pytest.mark.parametrize("name", ["gr_canonical_reg_s101", "gr_canonical_ce_s102"])
def test_canonical(name, vectors, models, gate_names):
    tensors = vectors(f"endoscopy/{name}")
    config = json.loads(tensors["hp"])
    model, optimizer, gate_optimizer, seen = build(
        models, gate_names, tensors, config, torch.float64
    )
    routing = GradientRouting(
        optimizer, gate_optimizer, clip=config["clip_main"], gate_clip=config["clip_gate"]
    )
    i = 0
    while f"s{i}.x" in tensors:
        x, target = tensors[f"s{i}.x"], tensors[f"s{i}.t"]

        def loss(model, x=x, target=target):
            if config["task"] == "reg":
                return F.smooth_l1_loss(model(x).squeeze(-1), target)
            return F.cross_entropy(model(x), target)

        step = routing.step(model, loss)
        exact = {"rtol": 1e-8, "atol": 0.0}
        assert_close(step.gate_loss, tensors[f"s{i}.loss_gate"], **exact)
        assert_close(step.gate_grad_norm, tensors[f"s{i}.gate_norm"], **exact)
        assert_close(step.loss, tensors[f"s{i}.loss_main"], **exact)
        assert_close(step.grad_norm, tensors[f"s{i}.main_norm"], **exact)
        clipped = min(1.0, config["clip_gate"] / (float(step.gate_grad_norm) + 1e-6))
        exact["atol"] = 1e-13  # attention keys have a bias whose gradient is zero but for rounding
        assert_holds(seen["gate"][i], tensors, f"s{i}.ggate.", gate_names, factor=clipped, **exact)
        assert_holds(model.state_dict(), tensors, f"s{i}.after.", gate_names, **exact)
        assert not set(seen["gate"][i]) & set(seen["main"][i])
        i += 1
    assert len(seen["gate"]) == i > 0


def size_loss(prediction, target, config):
    """Weighted size loss; the published trainer gives it scaled targets, so no weight applies."""
    alpha, beta, gamma = config[:3]
    error = prediction - target
    smooth = F.smooth_l1_loss(prediction, target, reduction="none")
    return (alpha * error.abs() + beta * error.square() + gamma * smooth).mean()


def crop(images, masks):
    """The boxes of the masks, grown by half their size on every side, in full resolution."""
    size, crops = images.shape[-1], []
    for image, mask in zip(images, masks[:, 0], strict=True):
        slices = []
        for line in (mask.any(1), mask.any(0)):
            inside = line.nonzero()
            first, last = int(inside.min()), int(inside.max())
            margin = int(0.5 * (last - first))
            slices.append(slice(max(0, first - margin), last + margin + 1))
        box = image[None, :, *slices]
        crops.append(F.interpolate(box, (size, size), mode="bilinear", align_corners=True))
    return torch.cat(crops)


@pytest.mark.parametrize("seed", [81, 82, 84])
def test_reference(seed, vectors, models, gate_names):
    tensors = vectors(f"endoscopy/gr_trainer_reference_s{seed}")
    config = json.loads(tensors["hp"])
    model, optimizer, gate_optimizer, seen = build(
        models, gate_names, tensors, config, torch.float32
    )
    routing = GradientRouting(
        optimizer,
        gate_optimizer,
        mode="reference",
        clip=config["clip_grad"],
        gate_clip=config["clip_gr_grad"],
    )
    tolerance = {"rtol": 2e-4, "atol": 2e-6}
    aperture = tensors.get("circ_mask", torch.ones(()))
    for i, lr in enumerate(tensors["lr_main_used"].tolist()):
        optimizer.param_groups[0]["lr"] = lr
        x = crop(tensors[f"batch{i}.image"] * aperture, tensors[f"batch{i}.mask"])
        assert torch.equal(x, tensors.get(f"batch{i}.cropped", x))
        target = 2 * (tensors[f"batch{i}.target_mm"] - 0.5) / 19.5 - 1

        def loss(model, config, x=x, target=target):
            return size_loss(model(x).squeeze(-1), target, config)

        routing.step(
            model,
            lambda m, loss=loss: loss(m, config["loss_cfg"]),
            lambda m, loss=loss: loss(m, config["gr_loss_cfg"]),
        )
        if i == 0:
            assert_holds(seen["gate"][0], tensors, "grad_gate_step0.", gate_names, **tolerance)
            assert_holds(seen["main"][0], tensors, "grad_main_step0.", gate_names, **tolerance)
        after = model.state_dict()
        for name in (n for n in tensors if n.startswith(f"after{i}.") and "qkv.bias" in n):
            # The loss does not depend on the bias of attention keys. Its float32 gradient is the
            # rounding of one machine, and Adam makes full steps of it: only their length is sure.
            own = after[gate_names(name.removeprefix(f"after{i}.model."))].chunk(3)[1]
            theirs = tensors[name].chunk(3)[1]
            assert (own - theirs).abs().max() <= 2 * (i + 1) * lr
            own.copy_(theirs)
        assert_holds(after, tensors, f"after{i}.", gate_names, **tolerance)
