"""Pairs of digits, the gates that name them, and the table of their losses."""

import numpy as np
import pytest
import torch

from core_gates import GatesError, collect_routing
from language.module import losses_of_gates
from studies.digits.gate_recipes import RECIPES, build_gate, gate_classes
from studies.digits.multi_digits import NUM_IDS, MultiDigits, glyphs, pairs
from studies.digits.two_digit_network import TwoDigitNetwork, right

SIZES = (1100, 300, 397)


def network_of(name, **options):
    torch.manual_seed(0)
    recipe = RECIPES[name]
    return TwoDigitNetwork(name, {**recipe.options, **options}, recipe.losses, num_steps=20)


@pytest.fixture(scope="module")
def batch():
    return pairs(glyphs("train", SIZES), 512, (0,))


def test_no_glyph_is_in_two_parts():
    parts = [glyphs(part, SIZES).numbers for part in ("train", "validation", "test")]
    assert [len(part) for part in parts] == list(SIZES)
    assert len(np.unique(np.concatenate(parts))) == 1797


def test_a_pair_is_two_overlaid_glyphs(batch):
    source = glyphs("train", SIZES)
    first, second = (int(np.flatnonzero(source.numbers == n)[0]) for n in batch.glyphs[0].tolist())
    canvas = batch.x[0].reshape(10, 10)
    assert batch.labels[0].tolist() == [source.labels[first], source.labels[second]]
    np.testing.assert_array_equal(canvas[:2, :8], source.images[first][:2])
    np.testing.assert_array_equal(canvas[8:, 2:], source.images[second][6:])
    both = np.maximum(source.images[first][2:, 2:], source.images[second][:6, :6])
    np.testing.assert_array_equal(canvas[2:8, 2:8], both)
    assert canvas[:2, 8:].eq(0).all()
    assert 0 <= int(batch.ids.min()) <= int(batch.ids.max()) < NUM_IDS


def test_a_batch_depends_on_its_seed_and_its_number_alone():
    data = MultiDigits(SIZES, 3, 8, seed=1)
    again = list(MultiDigits(SIZES, 3, 8, seed=1).train_dataloader())
    assert torch.equal(data.batches[2].x, again[2].x)
    assert not torch.equal(again[1].x, again[2].x)
    assert not torch.equal(MultiDigits(SIZES, 3, 8, seed=2).batches[2].x, again[2].x)


def test_every_gate_of_the_core_has_a_recipe():
    assert RECIPES.keys() == gate_classes().keys()


@pytest.mark.parametrize("name", RECIPES)
def test_every_gate_learns_by_its_losses(name, batch):
    network = network_of(name).train()
    with collect_routing(network) as routings:
        network(batch.x, batch.ids)
    found = losses_of_gates(routings, network.losses)
    assert found.keys() == RECIPES[name].losses.keys()
    network.training_step(batch, 0).backward()
    for part in ("weight", "bias"):
        assert getattr(network, part).grad.abs().sum() > 0
    trained = [p for n, p in network.gates.named_parameters() if "permutation" not in n]
    assert not trained or any(p.grad is not None and p.grad.any() for p in trained)
    assert right(network.eval(), batch).shape == (512, 2)


def test_slots_are_what_a_layer_of_experts_makes_of_them(batch):
    network = network_of("SoftMoEGate").eval()
    routing = network.gates[0](batch.x)
    mixed = network._mixed(routing, batch.x, torch.empty(512, 8, 64))
    expected = torch.zeros(512, 64)
    for expert in range(8):
        slots = routing.dispatch[:, expert].T @ batch.x
        made = (slots @ network.weight[expert] + network.bias[expert]).relu()
        expected += routing.weights[:, expert] @ made
    torch.testing.assert_close(mixed, expected)


def test_faults_are_refused(batch, refuses):
    refuses(
        GatesError,
        ("expected two or more", lambda: TwoDigitNetwork("TopKGate", {}, {}, num_experts=1)),
        ("k must lie between", lambda: network_of("TopKGate", k=9)),
        ("tau", lambda: build_gate("SoftmaxGate", {"tau": -1.0}, dim=4, num_experts=2,
                                   num_steps=5)),
        ("threshold must lie", lambda: network_of("DenseToSparseGate", threshold=0.125)),
        ("a part without glyphs", lambda: glyphs("test", (1000, 100, 0))),
    )  # fmt: skip
    network = network_of("SoftmaxGate")
    bad = batch._replace(x=torch.full_like(batch.x, torch.nan))
    refuses(GatesError, ("the loss of step 1 is nan", lambda: network.training_step(bad, 0)))
