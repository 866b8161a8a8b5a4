"""Calibration: errors of every number of blocks at once, and budgets that minimize their sum."""

import itertools
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from core_gates.attention.seer.decode import BlockSelector
from core_gates.errors import GatesError
from language.seer.attach import attach_block_gates, block_gates
from language.seer.attention import attend_to_all
from language.seer.budgets import CHOOSERS, UNTRAINED, causal_density, digest_of, scores_of
from language.seer.calibration import budgets_of, loss_errors
from language.seer.recording import attending
from language.seer.rivals import gate_scores

BLOCK, LENGTH = 4, 26


@pytest.fixture(scope="module")
def model(tiny):
    made = tiny().double()
    generator = torch.Generator().manual_seed(2)
    for gate in attach_block_gates(made, block_size=BLOCK).values():
        gate.gate.double().weight_k.data.copy_(
            torch.randn(gate.gate.weight_k.shape, generator=generator)
        )
    return made


@pytest.fixture(scope="module")
def errors(model, tokens):
    return loss_errors(model, tokens[0])


def loss_of(model, tokens, attend):
    with attending(model, attend):
        logits = model(tokens[None], use_cache=False).logits[0, :-1]
    return F.cross_entropy(logits, tokens[1:], reduction="sum")


def test_errors_are_those_of_attention_to_the_blocks_one_by_one(model, errors, tokens):
    """Of every layer, head, chooser and number of blocks, with gradients that were nudged for."""
    seen_by, outs = {}, {}

    def keep(gate, seen):
        seen_by[gate.name], outs[gate.name] = seen, attend_to_all(seen)
        return outs[gate.name]

    for weight in model.parameters():
        weight.requires_grad_(True)
    gradients = torch.autograd.grad(loss_of(model, tokens[0], keep), outs.values())
    model.requires_grad_(False)
    assert [*errors] == [*seen_by]
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    for (name, seen), gradient in zip(seen_by.items(), gradients, strict=True):
        gate, out = block_gates(model)[name], outs[name][0]
        assert errors[name].shape == (3, 4, 7)
        for place, m in itertools.product(range(3), range(1, 8)):
            scores = scores_of(CHOOSERS[place], partial(gate_scores, gate, seen), seen, BLOCK)
            rule = BlockSelector(k=m, sinks=min(1, m - 1), recent=1, dense_rows=0)
            mask = rule(scores)[0].repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
            mask = mask[:, :LENGTH, :LENGTH] & ~hidden
            for head in range(4):
                k, v = seen.k[0, head // 2], seen.v[0, head // 2]
                pairs = (seen.q[0, head] @ k.T * seen.scale).masked_fill(~mask[head], -torch.inf)
                moved = pairs.softmax(-1) @ v - out[head]
                expected = (moved * gradient[0, head]).sum(-1).square().sum()
                assert_close(errors[name][place, head, m - 1], expected, rtol=1e-8, atol=1e-16)


def test_an_error_is_the_sum_of_squares_of_what_each_query_changes_the_loss(model, errors, tokens):
    """Of one head, by differences of losses: each query reads two blocks, a bit more and less."""
    (name, step), rule = (next(iter(errors)), 1e-3), BlockSelector(k=2, sinks=1, recent=1)
    rule.dense_rows = 0

    def loss(row, part):
        def attend(gate, seen):
            out = attend_to_all(seen)
            if gate.name == name:
                mask = rule(scores_of("window", None, seen, BLOCK))[0, 0, row // BLOCK]
                mask = mask.repeat_interleave(BLOCK)[:LENGTH] & (torch.arange(LENGTH) <= row)
                pairs = seen.q[0, 0, row] @ seen.k[0, 0].T * seen.scale
                few = pairs.masked_fill(~mask, -torch.inf).softmax(-1) @ seen.v[0, 0]
                out[0, 0, row] += part * (few - out[0, 0, row])
            return out

        return float(loss_of(model, tokens[0], attend))

    with torch.no_grad():
        slopes = [(loss(row, step) - loss(row, -step)) / (2 * step) for row in range(LENGTH)]
    expected = sum(slope**2 for slope in slopes)
    assert expected > 1e-6
    assert float(errors[name][0, 0, 1]) == pytest.approx(expected, rel=1e-4)


def test_budgets_are_those_of_least_error_among_all_of_the_density(model):
    """Of two heads with convex errors, by trying all pairs."""
    heads = torch.arange(1, 8).double()
    table = torch.stack([6 / heads, 1 / heads, 20 / heads**2, 3 / heads]) ** 1.5
    errors = {"a": table[None, :2], "b": table[None, 2:]}
    for density in (0.3, 0.45, 0.7):
        budgets = budgets_of(errors, model, density, CHOOSERS[:1])
        found = torch.cat([*budgets.blocks.values()])
        read = causal_density(heads, 7)
        assert read[found - 1].mean() <= density + 1e-9
        own = float(sum(table[h, m - 1] for h, m in enumerate(found.tolist())))
        best = min(
            float(sum(table[h, m - 1] for h, m in enumerate(all_heads)))
            for all_heads in itertools.product(range(1, 8), repeat=4)
            if float(sum(read[m - 1] for m in all_heads)) <= 4 * density + 1e-9
        )
        assert own <= best * 1.1
        assert budgets.gates == ""


def test_budgets_sum_to_the_density_and_heads_choose_by_what_errs_least(model, errors):
    for density in (0.35, 0.5, 0.8):
        for choosers in (UNTRAINED, CHOOSERS):
            budgets = budgets_of(errors, model, density, choosers)
            blocks = torch.cat([*budgets.blocks.values()])
            read = float(causal_density(blocks.double(), 7).mean())
            assert density - 2 / 28 <= read <= density + 1e-9  # within a block of one of 8 heads
            for name, which in budgets.choosers.items():
                at = errors[name][:, torch.arange(4), budgets.blocks[name] - 1]
                assert torch.equal(which, at[: len(choosers)].argmin(0))
            uses = any((which == 2).any() for which in budgets.choosers.values())
            gates = {name: gate.gate for name, gate in block_gates(model).items()}
            assert budgets.gates == (digest_of(gates) if uses else "")
    everything = budgets_of(errors, model, 1.0)
    assert all(
        bool((errors[name].amin(0)[range(4), m - 1] <= errors[name].amin(0).amin(-1) + 1e-12).all())
        for name, m in everything.blocks.items()
    )


def test_a_density_out_of_range_is_refused(model, errors):
    for density in (0.1, 1.2):
        with pytest.raises(GatesError, match=r"expected 0.25, one block of 7 a row, to 1"):
            budgets_of(errors, model, density)
