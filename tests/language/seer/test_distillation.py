"""Records of a frozen model, and gates that learn from them, on one process and on two."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from core_gates.attention.seer.gate import gate_distillation_loss, prefill_target
from core_gates.ops import block_max_attention
from language.seer.attach import attach_block_gates, block_gates
from language.seer.attention import attend_to_all
from language.seer.distillation import SCALE, BlockGateModule, RecordLoader
from language.seer.recording import (
    logits_of,
    read,
    record_bytes,
    record_sequence,
    rows_of,
)
from language.seer.rivals import (
    BY_SUM,
    GATE,
    SCORES,
    attention_mass,
    chosen,
    scores_by,
)

BLOCK, LENGTH = 4, 26
KINDS = ("prefill", "decode")


def with_gates(tiny, kind, dtype=torch.float32):
    model = tiny().to(dtype)
    attach_block_gates(model, kind, block_size=BLOCK)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_is_what_the_gate_sees_and_where_the_model_attends(kind, tiny, tokens):
    model = with_gates(tiny, kind)
    kept, seen_by = record_sequence(model, tokens[0]), {}
    assert sum(value.numel() for value in kept.values()) * 4 == record_bytes(model, LENGTH) - (
        4 * 2 * len(rows_of(LENGTH)) if kind == "decode" else 0  # positions count twice
    )

    def attend(gate, seen):
        seen_by[gate.name] = seen
        return attend_to_all(seen)

    read(model, tokens[0], attend)
    for name, gate in block_gates(model).items():
        seen = seen_by[name]
        own = {
            part.rpartition(".")[2]: value[None]
            for part, value in kept.items()
            if part.startswith(name)
        }
        with torch.inference_mode():
            logits, scored = gate.gate(*seen.raw()), logits_of(gate.gate, own)
        rows = rows_of(LENGTH) if kind == "decode" else slice(None)
        assert_close(scored, logits[:, :, rows])
        weights = torch.softmax(
            (seen.q @ seen.k.repeat_interleave(2, 1).mT * seen.scale).masked_fill(
                torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), -torch.inf
            ),
            -1,
        )
        if kind == "prefill":
            largest = block_max_attention(seen.q, seen.k, seen.v, BLOCK, scale=seen.scale).block_max
            assert_close(own["target"], prefill_target(largest))
        else:
            by_block = torch.nn.functional.pad(weights, (0, 2)).unflatten(-1, (-1, BLOCK)).amax(-1)
            by_group = by_block.unflatten(1, (2, 2)).amax(2)[:, :, rows]
            assert_close(own["target"], by_group / by_group.sum(-1, keepdim=True))
        if kind == "decode":
            continue
        mass = attention_mass(gate, seen)
        assert_close(mass.sum((2, 3)), torch.ones(1, 4))
        for fraction in (0.2, 1.0):
            kinds = SCORES | {GATE: partial(scores_by, gates={name: gate.gate})}
            with torch.inference_mode():
                masks = {n: chosen(score(gate, seen), fraction) for n, score in kinds.items()}
            assert len({int(mask.sum()) for mask in masks.values()}) == 1
            most = max(float((mask * mass).sum()) for mask in masks.values())
            assert float((masks[BY_SUM] * mass).sum()) == pytest.approx(most, rel=1e-6)
            for sunk in [one for one in masks if one.startswith("sink") and fraction < 1]:
                assert masks[sunk][..., 0].all() or int(masks[sunk][0, 0, -1].sum()) == 1


def batch_of(model, tokens):
    parts = [record_sequence(model, one) for one in tokens]
    return {name: torch.stack([part[name] for part in parts]).clone() for name in parts[0]}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_published_one_and_gates_learn(kind, tiny, tokens):
    model = with_gates(tiny, kind)
    before = {n: w.clone() for n, w in model.named_parameters() if "block_gate" not in n}
    batch = batch_of(model, tokens)
    gates = {name: gate.gate for name, gate in block_gates(model).items()}
    module = BlockGateModule(gates, learning_rate=0.1)
    found, names = module(batch), list(gates)
    name = names[1]
    own = {part: batch[f"{name}.{part}"] for part in ("queries", "keys", "target")}
    own["rows"] = batch.get(f"{name}.rows")
    elements = torch.nn.functional.kl_div(
        logits_of(gates[name], own).log_softmax(-1), own["target"], reduction="none"
    )
    skipped = elements.shape[2] // 4 if kind == "prefill" else 0
    assert_close(found[1], elements[:, :, skipped:].mean())
    assert gate_distillation_loss(
        logits_of(gates[name], own), own["target"], skip=0.25 if skipped else 0.0
    ).item() == pytest.approx(found[1].item())
    optimizer = torch.optim.Adam(module.parameters(), 0.02)
    module.log = module.log_dict = lambda *_, **__: None
    assert_close(module.training_step(batch, 0), SCALE * found.sum())
    for _ in range(60):
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()
    assert module(batch).sum() < 0.5 * found.sum()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], weight) for n, weight in before.items())


def steps(parallel, kind):
    """Train gates for three steps in float64, on all ranks together."""
    torch.manual_seed(0)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False).double()
    gates = attach_block_gates(model, kind, block_size=BLOCK)
    inner = {name: gate.gate.double() for name, gate in gates.items()}
    batch = batch_of(model, torch.randint(64, (4, LENGTH)))
    module = parallel(BlockGateModule(inner))
    optimizer = torch.optim.SGD(module.parameters(), 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        share = {name: parallel.share(value) for name, value in batch.items()}
        (SCALE * module(share).sum()).backward()
        optimizer.step()
    return dict(inner["layers.1.self_attn"].state_dict())


@pytest.mark.distributed
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_are_one(kind, two_ranks):
    found = two_ranks(steps, kind, tolerance=1e-10)
    assert found["weight_k"].dtype == torch.float64


def test_batches_are_in_the_order_of_seed_and_epoch_and_continue_inside():
    def load(number):
        return {"x": torch.tensor([number])}

    loader = RecordLoader(load, 7, 2, seed=3)
    first = [batch["x"].flatten().tolist() for batch in loader]
    assert len({number for batch in first for number in batch}) == 6
    halves = [RecordLoader(load, 7, 2, seed=3, rank=rank, world=2) for rank in (0, 1)]
    ranks = [[batch["x"].item() for batch in half] for half in halves]
    assert [[a, b] for a, b in zip(*ranks, strict=True)] == first
    again = RecordLoader(load, 7, 2, seed=3)
    again.load_state_dict({"position": 1, "epoch": 0})
    assert [batch["x"].flatten().tolist() for batch in again] == first[1:]
    again.set_epoch(1)
    assert [batch["x"].flatten().tolist() for batch in again] != first
