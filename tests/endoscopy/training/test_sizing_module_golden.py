"""The whole module against vectors of the canonical and of the published gradient routing."""

import json

import lightning as L
import pytest
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader

from endoscopy.models import fsg_vit
from endoscopy.training.losses import SizeWeightedLoss
from endoscopy.training.sizing_module import SizingModule
from endoscopy.training.targets import ScaledMillimeters, SizeTarget

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but"),
]


class Plain(SizeTarget):
    """The losses of the canonical vectors: of numbers without a unit, or of class indices."""

    def __init__(self, task, outputs):
        self.task, self.outputs = task, outputs

    def encode(self, mm):
        return mm

    def decode(self, raw):
        return raw[:, 0]

    def loss(self, raw, mm, censored=None):
        if self.task == "ce":
            return F.cross_entropy(raw, mm.long())
        return F.smooth_l1_loss(raw[:, 0], mm)


class Checks(L.Callback):
    """Calls ``check(module, step)`` after every step."""

    def __init__(self, check):
        self.check, self.gradients = check, {"weights": [], "gates": []}

    def on_train_start(self, trainer, module):
        for name, optimizer in zip(("weights", "gates"), trainer.optimizers, strict=True):

            def note(*_, name=name):
                grads = {n: p.grad.clone() for n, p in module.model.named_parameters()
                         if p.grad is not None}  # fmt: skip
                self.gradients[name].append(grads)

            optimizer.register_step_pre_hook(note)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.check(module, batch_idx)


def build(tensors, config, own_name, outputs=1):
    options = {"img_size": config["img"], "patch_size": config["patch"]}
    options |= {"embed_dim": config["embed_dim"], "depth": config["depth"]}
    model = fsg_vit(outputs=outputs, trunk_options=options | {"num_heads": config["heads"]})
    before = {k[7:].removeprefix("model."): v for k, v in tensors.items() if k[:7] == "before."}
    model.to(before["cls_token"].dtype)
    weights = {own_name(name): tensor for name, tensor in before.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.endswith("kept") for name in missing)
    return model


def train(module, batches, check, tmp_path, **options):
    checks = Checks(check)
    rows = [{"streams": {"rgb": x}, "size_mm": mm} for x, mm in batches]
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[checks],
        **options,
    )
    trainer.fit(module, DataLoader(rows, batch_size=None))
    return checks.gradients


def assert_holds(actual, tensors, prefix, own_name, factor=1.0, **tolerance):
    names = [name for name in tensors if name.startswith(prefix)]
    assert names
    for name in names:
        own = own_name(name.removeprefix(prefix).removeprefix("model."))
        expected = factor * tensors[name]
        assert_close(actual[own], expected, **tolerance, msg=lambda m, n=own: f"{n}: {m}")


@pytest.mark.parametrize("name", ["gr_canonical_reg_s101", "gr_canonical_ce_s102"])
def test_canonical(name, vectors, own_name, tmp_path):
    tensors = vectors(name)
    config = json.loads(tensors["hp"])
    model = build(tensors, config, own_name, config["num_classes"])
    module = SizingModule(
        model,
        Plain(config["task"], config["num_classes"]),
        optimizer="adam",
        learning_rate=config["lr"],
        min_learning_rate=config["lr"],
        weight_decay=0.0,
        gate_learning_rate=config["lr_gate"],
        clip=config["clip_main"],
        gate_clip=config["clip_gate"],
    )
    batches = []
    while f"s{len(batches)}.x" in tensors:
        i = len(batches)
        batches.append((tensors[f"s{i}.x"], tensors[f"s{i}.t"]))
    # The bias of attention keys has a gradient that is zero but for rounding.
    exact = {"rtol": 1e-8, "atol": 1e-13}

    def check(module, i):
        assert_holds(module.model.state_dict(), tensors, f"s{i}.after.", own_name, **exact)

    seen = train(module, batches, check, tmp_path, max_epochs=1, precision="64-true")
    assert len(seen["gates"]) == len(batches) > 0
    for i, grads in enumerate(seen["gates"]):
        factor = min(1.0, config["clip_gate"] / (float(tensors[f"s{i}.gate_norm"]) + 1e-6))
        assert_holds(grads, tensors, f"s{i}.ggate.", own_name, factor, **exact)


@pytest.mark.parametrize("seed", [81, 82, 84])
def test_reference(seed, vectors, own_name, tmp_path):
    """One step; the weights of the published loss are all one, as sizes are scaled before it."""
    tensors = vectors(f"gr_trainer_reference_s{seed}")
    config = json.loads(tensors["hp"])
    targets = [
        ScaledMillimeters(SizeWeightedLoss(*config[key][:3], weights=(1.0, 1.0), space="scaled"))
        for key in ("loss_cfg", "gr_loss_cfg")
    ]
    module = SizingModule(
        build(tensors, config, own_name),
        *targets,
        gradient_routing="reference",
        optimizer="adam",
        learning_rate=config["lr"],
        min_learning_rate=config["lr"] / 20,
        weight_decay=config["wd"],
        gate_learning_rate=config["lr_gr"],
        clip=config["clip_grad"],
        gate_clip=config["clip_gr_grad"],
    )
    tolerance = {"rtol": 2e-4, "atol": 2e-6}

    def check(module, _):
        after = module.model.state_dict()
        for name in (n for n in tensors if n.startswith("after0.") and "qkv.bias" in n):
            # Adam makes full steps of the rounding in the gradient of the keys' bias.
            own = after[own_name(name.removeprefix("after0.model."))].chunk(3)[1]
            theirs = tensors[name].chunk(3)[1]
            assert (own - theirs).abs().max() <= 2 * config["lr"]
            own.copy_(theirs)
        assert_holds(after, tensors, "after0.", own_name, **tolerance)

    batches = [(tensors["batch0.cropped"], tensors["batch0.target_mm"])]
    seen = train(module, batches, check, tmp_path, max_epochs=40, max_steps=1)
    assert_holds(seen["gates"][0], tensors, "grad_gate_step0.", own_name, **tolerance)
    assert_holds(seen["weights"][0], tensors, "grad_main_step0.", own_name, **tolerance)
