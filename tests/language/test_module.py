"""Training of a decoder, compared with transformers and with closed forms."""

import math
import runpy
import warnings
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from core_gates import (
    DenseToSparseGate,
    GatesError,
    NoisyTopKGate,
    StackedExperts,
    StagedSchedule,
    balance_loss,
    collect_routing,
    z_loss,
)
from language.module import LanguageModule

MADE = runpy.run_path(str(Path(__file__).parents[1] / "fixtures" / "published_decoders.py"))
ours, theirs, tokens = (MADE[name] for name in ("ours", "theirs", "tokens"))
STEPS = 20


class Watch(L.Callback):
    """Gather the loss and the learning rate of every step; disturb a step."""

    def __init__(self, disturb=None):
        self.losses, self.rates, self.logged, self.disturb = [], [], [], disturb

    def on_train_batch_start(self, trainer, module, batch, index):
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])
        if self.disturb:
            self.disturb(module, trainer.global_step)

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.losses.append(float(outputs["loss"]))
        self.logged.append({name: float(v) for name, v in trainer.callback_metrics.items()})


def batches(count=STEPS):
    return DataLoader([tokens(4, 13, seed=step % 3) for step in range(count)], batch_size=None)


def fit(module, count=STEPS, disturb=None, **options):
    """Train on some batches, once; return what was watched."""
    watch = Watch(disturb)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options = {"max_steps": count, "enable_model_summary": False, **quiet, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders
        trainer = L.Trainer(accelerator="cpu", callbacks=[watch], **options)
        trainer.fit(module, batches(count))
    return watch


def train_theirs(model, rate, decay, warmup):
    """Train a model of transformers by a plain loop; return the losses."""
    named = [*model.named_parameters()]
    matrix = {n for n, p in named if p.ndim > 1 and "embed" not in n}
    groups = [
        {"params": [p for n, p in named if n in matrix], "weight_decay": decay},
        {"params": [p for n, p in named if n not in matrix], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    losses = []
    for step, batch in enumerate(batches()):
        rise = (step + 1) / warmup
        fall = 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / (STEPS - warmup))
        for group in optimizer.param_groups:
            group["lr"] = rate * (rise if step < warmup else fall)
        logits = model.train()(batch[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Qwen3Moe"])
def test_twenty_steps_equal_those_of_transformers(family):
    published = theirs(family)
    with torch.no_grad():
        for parameter in published.parameters():
            parameter.mul_(0.3 if parameter.ndim > 1 else 1.0)
    model = ours(family)
    model.load_state_dict(published.state_dict())
    module = LanguageModule(model, 1e-2, weight_decay=0.5, warmup_steps=5)
    found = fit(module, gradient_clip_val=1.0).losses
    expected = train_theirs(published, 1e-2, 0.5, 5)
    assert expected[0] - expected[-1] > 1
    assert found == pytest.approx(expected, abs=1e-5, rel=0)


def test_the_rate_rises_and_falls_to_a_tenth():
    found = fit(LanguageModule(ours("Llama"), 1e-3, warmup_steps=4), 12).rates
    assert found[0] == [pytest.approx(2.5e-4)] * 2
    assert [rates[0] for rates in found[3:5]] == [pytest.approx(1e-3)] * 2
    assert found[8][0] == pytest.approx(5.5e-4)  # half of the way down
    falling = [rates[0] for rates in found[4:]]
    assert falling == sorted(falling, reverse=True)
    module = LanguageModule(ours("Llama"), 1e-3, warmup_steps=0)
    fit(module, 6)
    scheduler = module.lr_schedulers()
    assert scheduler.get_last_lr() == [pytest.approx(1e-4)] * 2


def test_matrices_decay_and_nothing_else():
    experts = partial(StackedExperts, hidden_dim=16, bias=True)
    model = ours("Qwen3Moe", experts=experts, moe_every=2, tie_embeddings=True)
    module = LanguageModule(model, 1e-2, weight_decay=0.3)
    fit(module, 1)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = (
        {names[id(p)] for p in group["params"]} for group in module.optimizers().param_groups
    )
    assert [g["weight_decay"] for g in module.optimizers().param_groups] == [0.3, 0.0]
    block = "model.layers.1."
    projections = {f"self_attn.{name}_proj.weight" for name in "qkvo"}
    inside = {"mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert {n for n in decayed if n.startswith(block)} == {block + n for n in projections | inside}
    assert "model.layers.0.mlp.down_proj.weight" in decayed
    assert kept == {n for n in names.values() if "norm" in n or "bias" in n or "embed" in n}


def test_losses_of_gates_are_weighed_by_name():
    torch.manual_seed(5)
    model = ours("Qwen3Moe")
    module = LanguageModule(model, 1e-9, losses={"balance": 0.5, "z": 0.25})
    found = fit(module, 1)
    with torch.no_grad(), collect_routing(model) as routings:
        (batch,) = batches(1)
        logits = model(batch[:, :-1])
    plain = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    balance, z = (
        sum(loss(routing) for (routing,) in routings.values()) / 3
        for loss in (balance_loss, z_loss)
    )
    assert found.losses[0] == pytest.approx(float(plain + 0.5 * balance + 0.25 * z), abs=1e-5)
    logged = found.logged[0]
    assert logged["train/loss"] == pytest.approx(float(plain), abs=1e-5)
    assert logged["train/balance"] == pytest.approx(float(balance), abs=1e-5)
    assert logged["train/z"] == pytest.approx(float(z), abs=1e-5)


def test_a_gate_may_have_losses_itself():
    gate = partial(NoisyTopKGate, num_experts=4, k=2)
    found = fit(LanguageModule(ours("Qwen3Moe", gate=gate), losses={"load": 0.5}), 2)
    for loss, logged in zip(found.losses, found.logged, strict=True):
        assert logged["train/load"] > 0
        assert loss == pytest.approx(logged["train/loss"] + 0.5 * logged["train/load"], abs=1e-6)
    gate = partial(DenseToSparseGate, num_experts=4)  # its balance comes first
    model = ours("Qwen3Moe", gate=gate)
    found = fit(LanguageModule(model, 1e-9, losses={"balance": 1.0}), 1)
    assert (
        found.logged[0]["train/balance"] > 2
    )  # all experts are used: E, that of others would be 1


def test_unknown_losses_and_those_without_what_they_need_are_refused(refuses):
    def run(family, name, **settings):
        return lambda: fit(LanguageModule(ours(family, **settings), losses={name: 1.0}), 1)

    noisy = {"gate": partial(NoisyTopKGate, num_experts=4, k=2)}
    refuses(
        GatesError,
        (r"^losses weighs 'balanse', but .* have balance, entropy, z$", run("Qwen3Moe", "balanse")),
        (r"have balance, entropy, importance, load, z$", run("Qwen3Moe", "l0", **noisy)),
        (r"^losses weighs 'z', but .* none, since there are no gates$", run("Llama", "z")),
    )


def test_gates_advance_and_experts_are_spawned_once_a_step():
    gate = partial(DenseToSparseGate, num_experts=4, stages=StagedSchedule(3, 10))
    module = LanguageModule(ours("Qwen3Moe", gate=gate), 1e-3)
    router = module.model.blocks[0].mlp.gate
    phases = []
    fit(module, 8, lambda *_: phases.append(router.phase), max_steps=4, accumulate_grad_batches=2)
    assert (phases, int(router.step)) == (["shared"] * 6 + ["annealing"] * 2, 4)
    state = module.optimizers().state
    gate_up = module.model.blocks[0].mlp.experts.gate_up_proj
    first, second = state[gate_up]["exp_avg"][:2]
    assert second.abs().sum() > 0  # the moments of the first, and a step since
    assert (gate_up[0] == gate_up[1]).float().mean() < 0.99
    assert first.shape == second.shape


def test_gradients_are_clipped_in_mixed_precision():
    module = LanguageModule(ours("Llama"), 1e-2, warmup_steps=0)
    watch = fit(module, precision="bf16-mixed", gradient_clip_val=1.0)
    assert watch.losses[-1] < watch.losses[0] - 0.2
    assert next(module.parameters()).dtype == torch.float32


def test_validation_is_in_bits_per_token():
    module = LanguageModule(ours("Llama"), 1e-3)
    torch.nn.init.zeros_(module.model.lm_head.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
        )
        (found,) = trainer.validate(module, batches(2), verbose=False)
    assert found == {"validation/bits_per_token": pytest.approx(math.log2(MADE["VOCABULARY"]))}


def test_windows_longer_than_the_context_are_refused(refuses):
    module = LanguageModule(ours("Llama", context=12))
    fit(module, 1)
    module.model.context = 11
    line = r"^data.context is 12, but the model's is 11: lower [^\n]*init_args.context to 12$"
    refuses(GatesError, (line, lambda: fit(module, 1)))


def test_numbers_out_of_range_are_refused(refuses):
    model = ours("Llama")
    refuses(
        ValueError,
        ("^learning_rate must be positive, got 0$", lambda: LanguageModule(model, 0)),
        ("^weight_decay must not be neg", lambda: LanguageModule(model, weight_decay=-1)),
        ("^warmup_steps must not be neg", lambda: LanguageModule(model, warmup_steps=-1)),
        ("^second_beta must lie in", lambda: LanguageModule(model, betas=(0.9, 1.0))),
        ("^balance must not be neg", lambda: LanguageModule(model, losses={"balance": -1.0})),
    )
    endless = {"max_steps": -1, "max_epochs": -1}
    with pytest.raises(GatesError, match=r"the trainer has none: give it max_steps or max_epochs$"):
        fit(LanguageModule(model), 1, **endless)
