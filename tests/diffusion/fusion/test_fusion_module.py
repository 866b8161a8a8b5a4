"""Gates that train alone: the loss, the schedule, exact resumption, one task a step, ranks."""

import dataclasses
from functools import partial

import lightning as L
import pytest
import torch
from torch.testing import assert_close

from core_gates.adapters import AdapterCapacity, GatedLoraLinear
from core_gates.errors import GatesError
from diffusion.fusion import GatedFusion
from diffusion.fusion.fusion_module import FusionModule
from diffusion.fusion.fusion_tasks import FusionDraws, FusionTask, PairDataModule
from diffusion.models.embedded_base import transformer_of
from diffusion.models.flow_matching import flow_matching_losses
from diffusion.models.text_encoders import TextStates
from diffusion.rivals import make_rival
from harness.experiment.job import Job
from harness.runs.terminal import quiet_lightning
from tests.diffusion.random_adapters import random_adapter

STEPS = 6


def states(count, seed):
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randn(count, 5, 384, generator=draw)
    return TextStates(tokens, torch.randn(count, 384, generator=draw))


def tasks():
    draw = torch.Generator().manual_seed(9)
    return [
        FusionTask(pair, torch.randn(5, 12, 4, 4, generator=draw), states(5, k), states(3, 10 + k))
        for k, pair in enumerate((("a", "b"), ("a", "c"), ("b", "c")))
    ]


def build(steps=STEPS, contrast=False, room=2, gates=None, **options):
    torch.manual_seed(0)
    model = transformer_of("unit").eval()
    library = {
        "a": random_adapter(model, 1),
        "b": random_adapter(model, 2, rank=1),
        "c": random_adapter(model, 3, where="single"),
    }
    fusion = GatedFusion(model, {}, capacity=AdapterCapacity(room, 2), **(gates or {}))
    options = {"learning_rate": 0.05, "contrast": contrast} | options
    return FusionModule(fusion, library, steps=steps, **options)


def data(steps=STEPS, batch_size=4, **options):
    return PairDataModule(tasks(), states(1, 99), steps=steps, batch_size=batch_size, **options)


def fit(module, datamodule, **trainer):
    quiet_lightning()
    options = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "use_distributed_sampler": False,
    } | trainer  # fmt: skip
    L.Trainer(**options).fit(module, datamodule)
    return module


def test_gates_train_alone_and_the_model_is_left_as_it_was():
    module = build(steps=40)
    model, before = module.fusion.model, {}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fixed = flow_losses(module)
    fit(module, data(40))
    assert set(module.state_dict()) == {f"fusion.{n}" for n in module.fusion.state_dict()}
    assert not module.fusion.attached
    assert not any(isinstance(m, GatedLoraLinear) for m in model.modules())
    assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert flow_losses(module) < 0.993 * fixed


def test_rivals_train_by_the_same_module():
    model = transformer_of("unit").eval()
    library = {"a": random_adapter(model, 1), "b": random_adapter(model, 2)}
    rival = make_rival("x_lora", model, library)
    module = FusionModule(rival, library, steps=3, learning_rate=0.05)
    start = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    fit(module, PairDataModule(tasks()[:1], states(1, 99), steps=3, batch_size=2))
    assert not rival.attached
    assert start.keys() == module.state_dict().keys()
    assert any(not torch.equal(start[key], found) for key, found in module.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_times_of_a_shift_are_later():
    plain, late = (
        FusionDraws(tasks(), states(1, 99), steps=1, batch_size=200, shift=shift)[0].at.t
        for shift in (1.0, 3.0)
    )
    assert_close(late, 3 * plain / (1 + 2 * plain))


def flow_losses(module):
    """The mean loss of one large fixed draw of all tasks."""
    draws = FusionDraws(tasks(), states(1, 99), steps=3, batch_size=40, caption_dropout=0, seed=5)
    losses = []
    with torch.no_grad(), module.fusion as fusion:
        for batch in draws:
            fusion.set_adapters(module.adapters_of(batch.adapters))
            losses.append(flow_matching_losses(fusion.model, batch.at, batch.text).mean())
    return float(torch.stack(losses).mean())


class StopError(Exception):
    """A process that is killed."""


class Killed(L.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            raise StopError


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"contrast": True},
        {"gates": {"factors": True, "switch": True}, "weight_rate": 0.01, "roles": {"a": "style"}},
    ],
)
def test_a_killed_training_ends_with_the_same_bits(tmp_path, monkeypatch, options):
    whole = Job(tmp_path / "whole").fit(build(**options), data(), max_epochs=1)
    monkeypatch.setattr("harness.experiment.job.SAVED_EVERY", 0.0)
    for step in (2, 5):
        module = build(**options)
        with pytest.raises(StopError):
            Job(tmp_path / "killed").fit(module, data(), max_epochs=1, callbacks=[Killed(step)])
        assert not module.fusion.attached
    resumed = Job(tmp_path / "killed").fit(build(**options), data(), max_epochs=1)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    start = build(**options).state_dict()
    assert all(not torch.equal(start[name], tensor)
               for name, tensor in whole.state_dict().items() if "weight_" in name)  # fmt: skip


def test_the_loss_is_that_of_the_right_caption_and_a_hinge_for_the_wrong_one():
    batch = next(iter(data().train_dataloader()))
    found = {}
    for contrast, margin in ((False, 0.5), (True, 0.5), (True, 3.0)):
        module = build(contrast=contrast, margin=margin)
        module.log = lambda *_: None
        with module.fusion:
            found[contrast, margin] = module.training_step(batch, 0)
            model = module.fusion.model
            right = flow_matching_losses(model, batch.at, batch.text)
            wrong = flow_matching_losses(model, batch.wrong_at, batch.wrong_text)
    assert_close(found[False, 0.5], right.mean())
    for margin in (0.5, 3.0):
        assert_close(found[True, margin], right.mean() + (margin - wrong).clamp(min=0).mean())
    assert found[True, 3.0] > found[True, 0.5]


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 0.5), ("cosine", 0.5)])
def test_the_learning_rate_falls_to_nothing(schedule, middle):
    found = build(steps=8, schedule=schedule).configure_optimizers()
    optimizer, rates = found["optimizer"], []
    for _ in range(9):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        found["lr_scheduler"]["scheduler"].step()
    assert (rates[0], rates[4], rates[-1]) == (0.05, pytest.approx(0.05 * middle), 0)
    assert rates[1] == pytest.approx(0.05 * (7 / 8 if schedule == "linear" else 0.961940), rel=1e-5)


def test_every_task_comes_once_a_round_and_latents_are_not_repeated_before_all_came():
    draws = FusionDraws(tasks(), states(1, 99), steps=9, batch_size=7, caption_dropout=0.3)
    names = [batch.adapters for batch in draws]
    assert all(len(one) == 3 for one in [set(names[i : i + 3]) for i in (0, 3, 6)])
    assert names[:3] != names[3:6] or names[3:6] != names[6:9]
    assert draws[4].at.x.equal(draws[4].at.x)
    assert not draws[4].at.x.equal(draws[5].at.x)
    batch, task = draws[0], draws.task_of(0)
    latents = batch.at.x - batch.at.t.view(-1, 1, 1, 1) * batch.at.target
    gaps = (latents.unsqueeze(1) - task.latents).abs().amax((2, 3, 4))
    assert torch.bincount(gaps.argmin(1), minlength=5).tolist().count(2) == 2
    assert gaps.amin(1).max() < 1e-5
    again = batch.wrong_at.x - batch.wrong_at.t.view(-1, 1, 1, 1) * batch.wrong_at.target
    assert_close(again, latents, rtol=1e-4, atol=1e-5)
    assert not torch.equal(batch.wrong_at.t, batch.at.t)


def test_some_captions_are_left_empty():
    empty = states(1, 99)
    draws = FusionDraws(tasks(), empty, steps=1, batch_size=1000, caption_dropout=0.3)
    assert 0.25 < (draws[0].text.pooled == empty.pooled).all(1).float().mean() < 0.35
    assert not (draws[0].wrong_text.pooled == empty.pooled).all(1).any()


def test_parts_of_processes_make_up_the_batch_of_one():
    options = {"steps": 4, "batch_size": 6}
    whole = FusionDraws(tasks(), states(1, 99), **options)
    parts = [
        FusionDraws(tasks(), states(1, 99), rank=rank, world_size=3, **options) for rank in range(3)
    ]
    for step in range(4):
        expected, found = whole[step], [part[step] for part in parts]
        assert {one.adapters for one in found} == {expected.adapters}
        for name in ("at", "text", "wrong_at", "wrong_text"):
            pieces = zip(*(getattr(one, name) for one in found), strict=True)
            for tensor, several in zip(getattr(expected, name), pieces, strict=True):
                assert torch.equal(torch.cat(several), tensor)


def test_roles_are_told_in_a_fraction_of_steps_and_weights_have_a_rate_of_their_own(monkeypatch):
    module = build(gates={"factors": True}, roles={"a": "subject", "b": "style"}, weight_rate=1e-3)
    told = []
    describe = module.fusion.describe
    monkeypatch.setattr(
        module.fusion, "describe", lambda **o: (told.append(o["roles"]), describe(**o))
    )
    start = {name: tensor.clone() for name, tensor in module.fusion.state_dict().items()}
    fit(module, data(told=0.5))
    assert {} in told
    assert {"a": "subject", "b": "style"} in told or {"a": "subject"} in told
    moved = {
        end: max(
            float((tensor - start[name]).abs().max())
            for name, tensor in module.fusion.state_dict().items()
            if name.endswith(end)
        )
        for end in ("weight_cross", "factors", "bias")
    }
    assert 0 < moved["weight_cross"] < 0.005
    assert moved["factors"] > 0.05
    rates = [group["lr"] for group in module.configure_optimizers()["optimizer"].param_groups]
    assert rates == [0.05, 1e-3]
    every = FusionDraws(tasks(), states(1, 99), steps=200, batch_size=1, told=0.5)
    assert 60 < sum(batch.roles_known for batch in every) < 140
    assert all(batch.roles_known for batch in data(20).train_dataloader())


def test_what_adapters_have_in_common_is_one_more():
    def mean(adapters):
        first = next(iter(adapters.values()))
        return dataclasses.replace(first, metadata={"of": " ".join(adapters)})

    module = build(room=3, common=mean)
    fit(module, data(1))
    assert list(module.fusion.adapters)[2:] == ["common"]
    names = tuple(module.fusion.adapters)[:2]
    assert module.fusion.adapters["common"].metadata["of"] == " ".join(names)


def test_activations_are_computed_again_with_the_same_gradients():
    batch = next(iter(data().train_dataloader()))
    grads = []
    for checkpointing in (False, True):
        module = build(checkpointing=checkpointing, gates={"factors": True})
        module.log = lambda *_: None
        module.on_fit_start()
        assert module.fusion.model.gradient_checkpointing == checkpointing
        module.training_step(batch, 0).backward()
        module.on_fit_end()
        assert not module.fusion.model.gradient_checkpointing
        grads.append({name: p.grad for name, p in module.named_parameters()})
    assert_close(grads[0], grads[1])
    assert any(grad.abs().max() > 1e-3 for grad in grads[0].values())


def test_faults_are_one_line(one_line):
    module, plain = build(), dataclasses.replace(tasks()[0], wrong=None)
    text = one_line(GatesError, module.adapters_of, ("a", "z"))
    assert text == "a task names the adapter 'z', which is not given"
    draws = partial(FusionDraws, empty=states(1, 99), steps=1)
    assert "at least one task" in one_line(GatesError, draws, [])
    assert "multiple of 2" in one_line(GatesError, draws, tasks(), batch_size=3, world_size=2)
    assert "give one each" in one_line(
        GatesError, FusionTask, ("a",), torch.zeros(2, 1), states(1, 0)
    )
    closed = GatedFusion(module.fusion.model, {}, mode="sum")
    assert "nothing to train" in one_line(GatesError, FusionModule, closed, {}, steps=1)
    assert "one for each caption and adapter" in one_line(
        GatesError, FusionTask, ("a",), torch.zeros(2, 1), states(2, 0), None, torch.zeros(2, 2)
    )
    contrast = build(contrast=True)
    contrast.log = lambda *_: None
    batch = draws([plain], batch_size=2)[0]
    with contrast.fusion:
        assert "no wrong captions" in one_line(GatesError, contrast.training_step, batch, 0)
