"""Decoders of EvoMoE and its rivals: what they cost, what spawning changes, when training ends."""

import math
from functools import partial

import lightning as L
import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import core_gates.ops.flops  # noqa: F401 (formulas of the grouped ops)
from core_gates import MoELayer, collect_routing
from core_gates.moe import advance_gates
from harness.experiment import Job
from language.data import TrainingLoader
from studies.evomoe.budget import kept_choices, step_flops
from studies.evomoe.budget_training import BudgetModule, held_out_bits
from studies.evomoe.methods import METHODS, Sizes, decoder_of, plan_of
from studies.evomoe.spawning import leak, spawning_changes

TINY = Sizes(updates=64, batch=2, context=32, dim=16, heads=2, layers=2, hidden=24)


def tokens_of(count, length, seed=0):
    return torch.randint(257, (count, length), generator=torch.Generator().manual_seed(seed))


def built(name, sizes=TINY):
    torch.manual_seed(0)
    return decoder_of(name, sizes)


def counted(model, x):
    """FLOPs of a training step by PyTorch's counter, and kept choices."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), collect_routing(model) as found, counter:  # that is counted
        F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).backward()
    return counter.get_total_flops(), sum(kept_choices(r) for many in found.values() for r in many)


@pytest.mark.parametrize("name", METHODS)
def test_flops_are_those_of_the_counter(name):
    model = built(name)
    total, kept = counted(model, tokens_of(2, 33))
    assert kept <= 2 * 32 * (1 if name != "no-spawn" else 8) * (2 if name == "top2" else 1)
    dropped = name in ("switch", "stable")  # rows without an expert count for the counter
    closed = step_flops(model, 2, 32, 2 * 32 if dropped else kept)
    assert closed == pytest.approx(total, rel=1e-9)


def test_flops_after_spawning_are_those_of_all_experts():
    model = built("evomoe")
    for gate in (block.mlp.gate for block in model.blocks if isinstance(block.mlp, MoELayer)):
        gate.step.fill_(gate.boundaries[0] - 1)
    advance_gates(model)
    total, kept = counted(model, tokens_of(2, 33))
    assert (kept, step_flops(model, 2, 32, kept)) == (2 * 32 * 8, pytest.approx(total, rel=1e-9))
    assert step_flops(model, 2, 32, kept) == plan_of(TINY).full


@pytest.mark.parametrize("name", METHODS)
def test_appended_tokens_change_no_earlier_logit(name):
    assert leak(built(name), tokens_of(2, 64)) <= 1e-6


@pytest.mark.parametrize("combine", ["gumbel", "softmax"])
def test_spawning_changes_no_loss(combine):
    model = built("evomoe")
    for weight in model.parameters():
        weight.data *= 3  # experts that matter
    options = {"combine": combine, "num_experts": 8}
    found = spawning_changes(model, tokens_of(2, 33), temperature=2.0, **options)
    assert found.keys() == {"train", "eval"}
    assert max(found.values()) < 1e-6
    colder = spawning_changes(model, tokens_of(2, 33), temperature=0.1, **options)
    assert colder["train"] > 1e-6
    assert colder["eval"] < 1e-6


def test_the_loss_changes_where_nothing_is_spawned(monkeypatch):
    monkeypatch.setattr("core_gates.moe.spawn.spawn_experts", lambda experts, **options: None)
    model = built("evomoe")
    for weight in model.parameters():
        weight.data *= 3
    options = {"combine": "gumbel", "temperature": 2.0, "num_experts": 8}
    found = spawning_changes(model, tokens_of(2, 33), **options)
    assert min(found.values()) > 1e-3


class Windows(L.LightningDataModule):
    def train_dataloader(self):
        return TrainingLoader(tokens_of(1, 6000, 1)[0].numpy(), 32, 2)

    val_dataloader = train_dataloader


class Kill(L.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


def train(name, folder, *callbacks):
    L.seed_everything(0, verbose=False)
    module = BudgetModule(built(name), METHODS[name], 1e-2, plan_of(TINY).budget, tokens_of(2, 33))
    options = {"max_epochs": -1, "limit_val_batches": 0, "callbacks": list(callbacks)}
    Job(folder).fit(module, Windows(), **options)
    return module


@pytest.mark.parametrize(("name", "zeros"), [("evomoe", 0.1), ("no-mask", 0.0)])
def test_experts_are_masked_copies_of_the_first(refuses, name, zeros, tmp_path):
    found = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, module, *args):
            layer = module.model.blocks[1].mlp
            if trainer.global_step == layer.gate.boundaries[0]:
                found.append(layer.experts.down_proj.detach().clone())
                raise RuntimeError("seen")

    refuses(RuntimeError, ("seen", lambda: train(name, tmp_path, Look())))
    first, second = found[0][:2]
    assert float((found[0] == 0).double().mean()) == pytest.approx(zeros, abs=0.02)
    both = (first != 0) & (second != 0)
    assert torch.equal(first[both], second[both])


def test_killed_at_the_spawn_and_at_hardening_it_ends_with_the_same_bits(
    refuses, tmp_path, monkeypatch
):
    monkeypatch.setattr("harness.experiment.job.SAVED_EVERY", 0.0)
    spawn, hardening = built("evomoe").blocks[1].mlp.gate.boundaries
    whole = train("evomoe", tmp_path / "whole").state_dict()
    for step in (spawn - 1, spawn, hardening):
        refuses(RuntimeError, ("killed", partial(train, "evomoe", tmp_path / "broken", Kill(step))))
    found = train("evomoe", tmp_path / "broken").state_dict()
    assert found.keys() == whole.keys()
    assert not [key for key, value in whole.items() if not torch.equal(found[key], value)]


@pytest.mark.parametrize("name", ["evomoe", "top2", "stable"])
def test_training_ends_within_a_percent_of_its_budget(name, tmp_path):
    module = train(name, tmp_path)
    assert module.ended
    assert float(module.spent) / plan_of(TINY).budget == pytest.approx(1, abs=0.01)
    flops, updates, bits, active = module.curve.T.tolist()
    assert (flops, flops[-1]) == (sorted(flops), module.spent)
    assert bits[-1] == pytest.approx(held_out_bits(module.model, module.held_out))
    steady = updates[0] * flops[-1] == pytest.approx(updates[-1] * flops[0])
    assert steady or name != "top2"  # all of whose updates cost the same
    assert active[-1] == {"evomoe": 1, "top2": 2}.get(name, active[-1])
    if name == "evomoe":
        assert active[0] == 1
        assert max(active) > 4
        assert updates[-1] >= plan_of(TINY).updates(METHODS[name])
    gates = [b.mlp.gate for b in module.model.blocks if isinstance(b.mlp, MoELayer)]
    assert all(p.requires_grad != (name == "stable") for g in gates for p in g.parameters())
    spent = module.spent.clone()
    (tmp_path / "fit0" / "done").unlink()
    again = train(name, tmp_path)  # killed after the last step, before the result was kept
    assert again.spent == spent
    assert torch.equal(again.curve, module.curve)


def test_ablations_lack_one_part_each():
    boundaries = {n: built(n).blocks[1].mlp.gate.boundaries for n in METHODS if n[:3] == "no-"}
    assert boundaries["no-spawn"][0] == 0
    assert boundaries["no-anneal"][0] == boundaries["no-anneal"][1] > 0
    assert 0 < boundaries["no-mask"][0] < boundaries["no-mask"][1]
    assert METHODS["no-mask"].mask_prob == 0 < METHODS["evomoe"].mask_prob
    assert METHODS["no-mask"]._replace(mask_prob=0.1) == METHODS["evomoe"]


def test_a_hash_balances_by_frequencies():
    torch.manual_seed(0)
    gate = decoder_of("hash", TINY, [97.0] + 256 * [1.0]).blocks[1].mlp.gate
    alone = gate.table[0]
    assert int((gate.table == alone).sum()) == 1
    assert math.isclose(float(torch.bincount(gate.table[1:].flatten()).double().max()), 37)
