"""Sizing networks trained by Lightning, with gradient routing, stopped and resumed."""

import contextlib

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.testing import assert_close

from endoscopy.metrics import confusion_matrix, macro_f1, object_table
from endoscopy.metrics.classification import TRUTH
from endoscopy.models import gate_parameters, tiny_resnet, tiny_vit
from endoscopy.training.losses import SizeWeightedLoss
from endoscopy.training.sizing_module import SizingModule, split
from endoscopy.training.targets import Classes, LogSize, Ordinal, ScaledMillimeters
from harness.command import GatesRunTrainer
from harness.runs.callbacks import RunCheckpoint
from harness.runs.loops import ResumableCSVLogger
from harness.runs.terminal import quiet_lightning

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]
MODES = ["dual", "reference", "joint", "every_k", "off"]
DUAL = ["dual", *(pytest.param(mode, marks=pytest.mark.slow) for mode in MODES[1:])]


class Watch(L.Callback):
    """Keeps the gradients and states before each optimizer's step, and what was logged."""

    def __init__(self):
        self.steps, self.logged, self.rates = [], [], []

    def on_train_start(self, trainer, module):
        for name, optimizer in zip(("weights", "gates"), trainer.optimizers, strict=False):

            def note(*_, name=name):
                grads = {n: p.grad.clone() for n, p in named(module) if p.grad is not None}
                self.steps.append((name, grads, state_of(module)))

            optimizer.register_step_pre_hook(note)

    def on_train_batch_start(self, trainer, *_):
        self.rates.append([o.param_groups[0]["lr"] for o in trainer.optimizers])

    def on_train_batch_end(self, trainer, *_):
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})


class InEvaluation(L.Callback):
    """Trains without statistics of the batch."""

    def on_train_batch_start(self, trainer, module, *_):
        module.eval()


def named(module):
    return list(module.model.named_parameters())


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.model.state_dict().items()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.fixture
def fit(frames, tmp_path):
    def run(module, data=None, callbacks=(), **options):
        watch = Watch()
        settings = {
            "max_epochs": 1,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
        } | options
        torch.manual_seed(5)
        watch.trainer = L.Trainer(**settings, callbacks=[watch, *callbacks])
        watch.trainer.fit(module, data or frames())
        return watch

    return run


def gates_and_weights(module):
    gates = set(gate_parameters(module.model))
    return gates, {name for name, _ in named(module)} - gates


def test_gates_and_weights_never_touch_each_others_gradients(fit, small_sizer):
    module = SizingModule(small_sizer())
    gates, weights = gates_and_weights(module)
    before = state_of(module)
    watch = fit(module, limit_train_batches=1)
    (first, gate_grads, at_gates), (second, weight_grads, at_weights) = watch.steps
    assert (first, second) == ("gates", "weights")
    assert (set(gate_grads), set(weight_grads)) == (gates, weights)
    assert not changed(before, at_gates)  # no buffer either
    moved = {name for name in gates if gate_grads[name].abs().max() > 0}
    assert changed(at_gates, at_weights) - moved == {
        name for name in before if "running" in name or "tracked" in name
    }
    assert moved >= {"head.gate1.logits", "branches.rgb.layer4.gate.logits"}
    assert changed(at_weights, state_of(module)) >= {"head.fc3.weight", "branches.rgb.conv1.weight"}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_learns_and_counts_one_step_a_batch(fit, frames, small_sizer, mode):
    module = SizingModule(
        small_sizer(),
        gradient_routing=mode,
        every_k=2,
        learning_rate=0.01,
        gate_learning_rate=0.05,
    )
    gates, _ = gates_and_weights(module)
    before = state_of(module)
    watch = fit(module, frames(shuffle=True), max_epochs=12)
    assert watch.trainer.global_step == 12 * 4 == module.routing.num_steps
    losses = [row["train/loss"] for row in watch.logged]
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])
    assert bool(changed(before, state_of(module)) & gates) == (mode != "off")
    passes = [name for name, _, _ in watch.steps].count("gates")
    assert passes == {"every_k": 24, "off": 0}.get(mode, 48)


def test_the_gate_pass_replays_dropout_and_leaves_buffers_alone(fit, small_sizer):
    """With gates that do not move, training is that of a plain loop, bit for bit."""
    arguments = {"gate_learning_rate": 0.0, "learning_rate": 0.01}
    dual = SizingModule(small_sizer(dropout=0.5), **arguments)
    off = SizingModule(small_sizer(dropout=0.5), gradient_routing="off", **arguments)
    masks = []
    dual.model.head.fc2[1].register_forward_hook(lambda _m, i, out: masks.append(out == 0))
    for module in (dual, off):
        fit(module, max_epochs=2)
    assert not changed(state_of(dual), state_of(off))
    for gate_pass, main_pass in zip(masks[::2], masks[1::2], strict=True):
        assert torch.equal(gate_pass, main_pass)
    assert len(masks) == 16
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("mode", DUAL)
def test_accumulation_equals_one_batch(fit, frames, small_sizer, mode):
    """Also where the parts differ in size; evaluation statistics, so that rows do not mix."""
    results = []
    for accumulate in (1, 4):
        module = SizingModule(
            small_sizer(),
            gradient_routing=mode,
            accumulate=accumulate,
            clip=0.5,
            gate_clip=0.1,
        )
        fit(module, frames(dtype=torch.float64), callbacks=[InEvaluation()], precision="64-true")
        results.append(state_of(module))
    assert changed(results[0], state_of(SizingModule(small_sizer()).double()))
    assert_close(results[1], results[0], rtol=0, atol=1e-9)


def test_split_keeps_all_rows_in_order(frames):
    batch = frames().batch(*range(7))
    parts = split(batch, 3)
    assert [len(part["size_mm"]) for part in parts] == [3, 2, 2]
    joined = torch.cat([part["streams"]["rgb"] for part in parts])
    assert torch.equal(joined, batch["streams"]["rgb"])
    assert torch.equal(torch.cat([part["frame"] for part in parts]), batch["frame"])
    assert len(split(frames().batch(0, 1), 5)) == 2


def plugin(kind, scale):
    """Mixed precision on the CPU, where Lightning does not offer float16 or a scaler."""
    half = MixedPrecision("16-mixed" if kind == "fp16" else "bf16-mixed", "cpu")
    half.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    if kind == "fp32":
        half.autocast_context_manager = contextlib.nullcontext
    return half


@pytest.mark.parametrize("mode", DUAL)
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_the_loss_scale_changes_nothing(fit, small_sizer, kind, mode):
    results = []
    for exponent in (0, 8, 16):
        module = SizingModule(small_sizer(), gradient_routing=mode, clip=0.3, gate_clip=0.02)
        watch = fit(module, plugins=[plugin(kind, 2.0**exponent)], limit_train_batches=3)
        assert watch.trainer.precision_plugin.scaler.get_scale() == 2.0**exponent
        results.append(state_of(module))
    assert changed(results[0], state_of(SizingModule(small_sizer())))
    for other in results[1:]:
        assert_close(other, results[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["dual", "reference", "joint"])
def test_gradients_of_half_precision_agree_with_single(fit, mode):
    """Of a ViT: batch normalization of a fresh network turns rounding into several percent."""
    seen = {}
    for kind in ("fp32", "fp16"):
        torch.manual_seed(0)
        model = tiny_vit(("rgb",), trunk_options={"img_size": 32, "depth": 2})
        module = SizingModule(model, gradient_routing=mode)
        watch = fit(module, plugins=[plugin(kind, 2.0**8)], limit_train_batches=1)
        seen[kind] = {name: grads for name, grads, _ in watch.steps}
    for group in ("gates", "weights"):
        exact, half = seen["fp32"][group], seen["fp16"][group]
        assert exact.keys() == half.keys()
        largest = max(grad.norm() for grad in exact.values())
        for name, grad in exact.items():
            assert (half[name] - grad).norm() <= 1e-2 * grad.norm() + 1e-6 * largest, name
        assert any(not torch.equal(half[name], grad) for name, grad in exact.items())


@pytest.mark.parametrize("mode", MODES)
def test_an_overflow_skips_both_optimizers_and_lowers_the_scale_once(fit, small_sizer, mode):
    module = SizingModule(small_sizer(), gradient_routing=mode)
    parameters = {name: p.detach().clone() for name, p in named(module)}
    watch = fit(module, plugins=[plugin("fp16", 2.0**40)], limit_train_batches=1)
    assert not watch.steps
    assert watch.trainer.precision_plugin.scaler.get_scale() == 2.0**39
    assert all(torch.equal(parameters[name], p) for name, p in named(module))


def test_the_schedule_of_the_weights_restarts_and_gates_keep_their_rate(fit, small_sizer):
    module = SizingModule(
        small_sizer(), learning_rate=1e-3, min_learning_rate=1e-4, gate_learning_rate=0.02, cycles=2
    )
    watch = fit(module, max_epochs=4)
    steps = np.arange(16)
    epoch = np.where(steps > 0, (steps - 1) / 4, 0)  # stepped after a batch with its epoch
    expected = 1e-4 + 0.9e-3 * (1 + np.cos(np.pi * (epoch % 2) / 2)) / 2
    assert [rates[0] for rates in watch.rates] == pytest.approx(expected.tolist())
    assert {rates[1] for rates in watch.rates} == {0.02}


def test_another_loss_may_move_the_gates(fit, frames, small_sizer):
    arguments = {"learning_rate": 0.0, "weight_decay": 0.0, "optimizer": "sgd", "clip": 1.0}
    target, heavier = (ScaledMillimeters(SizeWeightedLoss(weights=(w, w))) for w in (1.0, 50.0))
    norms = []
    for gate_target in (None, heavier):
        module = SizingModule(small_sizer(), target, gate_target, gate_clip=1.0, **arguments)
        watch = fit(module, frames(batch_size=24), limit_train_batches=1)
        norms.append([watch.logged[0][f"train/{n}"] for n in ("gate_grad_norm", "gate_loss")])
        main_loss = watch.logged[0]["train/loss"]
        assert main_loss == pytest.approx(norms[0][1], rel=0.01)  # its gates moved a little before
    assert norms[1][0] > 10 * norms[0][0]
    assert norms[1][1] > 10 * norms[0][1]


def test_the_l0_penalty_closes_gates(fit, small_sizer):
    closed = {}
    for weight in (0.0, 1.0):
        module = SizingModule(
            small_sizer(gates="l0"),
            gradient_routing="joint",
            gate_learning_rate=0.2,
            l0_weight=weight,
        )
        closed[weight] = fit(module, max_epochs=10).trainer.callback_metrics["gate/nearly_closed"]
    assert closed[1.0] > 0.9 > 0.1 > closed[0.0]


def test_validation_scores_objects_as_the_evaluation_does(fit, frames, small_sizer):
    data = frames()
    module = SizingModule(small_sizer(), learning_rate=0.01, gate_learning_rate=0.5)
    watch = fit(module, data, max_epochs=3, limit_val_batches=1.0)
    batch = data.batch(*range(24))
    raw = module.eval()(batch).detach()
    columns = {"unique_id": "object", "gt": "size_mm", "censored": "censored"}
    rows = pd.DataFrame({name: batch[key].numpy() for name, key in columns.items()})
    table = object_table(rows.assign(predicted_mm=module.target.decode(raw).numpy()))
    known = table[~table["censored"]]
    assert len(known) == 7  # the last object has a lower bound
    matrix = confusion_matrix(TRUTH.classes(table["gt"]), TRUTH.classes(table["predicted_mm"]))
    scores = torch.cat([p.detach().sigmoid() for p in gate_parameters(module.model).values()])
    expected = {
        "val/mae_mm": (known["predicted_mm"] - known["gt"]).abs().mean(),
        "val/macro_f1": float(macro_f1(matrix)),
        "val/loss": float(module.target.loss(raw, batch["size_mm"], batch["censored"])),
        "gate/mean": float(scores.mean()),
        "gate/low": float(scores.quantile(0.05)),
        "gate/high": float(scores.quantile(0.95)),
        "gate/nearly_closed": float((scores < 0.1).float().mean()),
    }
    logged = {name: float(watch.trainer.callback_metrics[name]) for name in expected}
    assert logged == pytest.approx(expected, rel=1e-5)


def test_a_diverged_network_scores_badly_but_does_not_stop(fit, small_sizer):
    module = SizingModule(small_sizer(), learning_rate=float("inf"), gradient_routing="off")
    watch = fit(module, limit_val_batches=1.0)
    assert watch.trainer.callback_metrics["val/mae_mm"].isnan()
    assert watch.trainer.callback_metrics["val/macro_f1"] == 0


@pytest.mark.parametrize(
    "target", [LogSize(), Ordinal(), Classes()], ids=lambda t: type(t).__name__
)
def test_predictions(frames, small_sizer, target, tmp_path):
    module = SizingModule(small_sizer(outputs=target.outputs), target)
    data = frames()
    trainer = L.Trainer(
        logger=False, enable_progress_bar=False, accelerator="cpu", default_root_dir=tmp_path
    )
    outputs = trainer.predict(module, data)
    assert torch.equal(torch.cat([o["frame"] for o in outputs]), torch.arange(24))
    whole = target.decode(module.eval()(data.batch(*range(24)))).detach()
    assert_close(torch.cat([o["predicted_mm"] for o in outputs]), whole)
    assert ("probabilities" in outputs[0]) == (target.outputs > 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": Classes()}, "Classes needs 3 outputs, the network has 1"),
        ({"gate_target": Ordinal()}, "Ordinal needs 2 outputs, the network has 1"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"optimizer": "lamb"}, "optimizer one of adam, adamw, sgd; got .* 'lamb'"),
        ({"l0_weight": 1.0}, "an L0 penalty needs gates that close at random"),
        ({"cut_offs_mm": (10.0, 5.0)}, "cut-offs must be positive and ascending"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_arguments_are_checked(small_sizer, arguments, message, refused):
    refused(message, SizingModule, small_sizer(), **arguments, error=ValueError)


def test_what_cannot_be_trained_is_refused(fit, small_sizer, refused):
    refused(
        "no gates to learn: gradient_routing must be 'off'",
        SizingModule,
        tiny_resnet(gates="se"),
        error=ValueError,
    )
    refused(
        r"set trainer\.max_epochs", fit, SizingModule(small_sizer()), max_epochs=-1, max_steps=2
    )
    refused(
        "cycles must lie between 1 and the 1 epochs, got 3",
        fit,
        SizingModule(small_sizer(), cycles=3),
        error=ValueError,
    )


class SmallSizing(SizingModule):
    """A network of few weights with dropout, gates in its trunk and head."""

    def __init__(self, mode):
        sizes = {"widths": [4, 4, 8], "depths": [1, 1]}
        model = tiny_resnet(("rgb",), hidden_dim=8, trunk_options=sizes)
        model.head.fc2 = torch.nn.Sequential(model.head.fc2, torch.nn.Dropout(0.3))
        super().__init__(model, gradient_routing=mode, every_k=3, clip=0.5, cycles=2)


@pytest.fixture
def fit_resumable(frames, tmp_path):
    """Train in ``tmp_path/name``; a second call of that name resumes it."""
    quiet_lightning()

    def run(name, mode, *, max_steps=-1, half=False):
        folder = tmp_path / name
        seed_everything(5)
        options = {}
        if half:
            plugin = MixedPrecision("16-mixed", "cpu")
            # Grows every two steps until it overflows, so that its state matters.
            plugin.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=2)
            options = {"plugins": [plugin]}
        trainer = GatesRunTrainer(
            max_steps=max_steps,
            max_epochs=4,
            accelerator="cpu",
            log_every_n_steps=1,
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=folder,
            logger=ResumableCSVLogger(folder),
            callbacks=[RunCheckpoint(every_n_steps=2, monitor="val/mae_mm")],
            **options,
        )
        last = folder / "checkpoints" / "last.ckpt"
        resume = str(last) if last.is_file() else None
        data = frames(batch_size=4, shuffle=True)
        trainer.fit(SmallSizing(mode), data, ckpt_path=resume, weights_only=True)
        return folder

    return run


@pytest.mark.parametrize(
    ("mode", "half"),
    [
        ("every_k", False),
        ("dual", True),
        *(pytest.param(mode, False, marks=pytest.mark.slow) for mode in ("dual", "reference")),
    ],
)
def test_stopped_trainings_end_like_unbroken_ones(fit_resumable, same_checkpoint, mode, half):
    """An epoch has six steps: stopped within an epoch, twice, and at its end."""
    whole = fit_resumable("whole", mode, half=half)
    for stop in (2, 9, 12):
        fit_resumable("broken", mode, half=half, max_steps=stop)
    broken = fit_resumable("broken", mode, half=half)
    assert (whole / "metrics.csv").read_text() == (broken / "metrics.csv").read_text()
    for name in ("last.ckpt", "best.ckpt"):
        same_checkpoint(whole / "checkpoints" / name, broken / "checkpoints" / name)
    saved = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == saved["gradient_routing"]["num_steps"] == 24
    assert len(saved["optimizer_states"]) == saved["lr_schedulers"][0]["T_0"] == 2
    if half:
        assert saved["MixedPrecision"]["scale"] > 2.0**14
