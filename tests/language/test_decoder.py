"""The decoder: states of transformers, padding, caches, experts, checkpointing."""

import runpy
from functools import partial
from pathlib import Path

import pytest
import torch

from core_gates import ExpertChoiceGate, HashGate, StackedExperts, TopKGate
from language import attach_output_gate
from language.decoder import Decoder

MADE = runpy.run_path(str(Path(__file__).parents[1] / "fixtures" / "published_decoders.py"))
ours, theirs, tokens, relative_gap = (
    MADE[name] for name in ("ours", "theirs", "tokens", "relative_gap")
)
DOUBLE = {"dtype": torch.float64}
EXPERTS = partial(StackedExperts, hidden_dim=24)
SMALL = {"hidden_dim": 16, "context": 8}


def filled(family, **settings):
    """Return a decoder whose weights are so large that every part of it shows."""
    torch.manual_seed(3)
    model = ours(family, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3).add_(parameter.ndim == 1)
    return model


def test_a_gate_at_the_heads_is_that_which_is_attached_to_transformers():
    published, model = theirs("Qwen3"), ours("Qwen3", attention_gate="G1", granularity="headwise")
    bare = model.state_dict().keys() - published.state_dict().keys()
    assert bare == {f"model.layers.{layer}.self_attn.gate.weight" for layer in range(3)}
    attach_output_gate(published, granularity="headwise", bias_init=None)
    state = published.state_dict()
    model.load_state_dict({name.replace("output_gate", "gate"): v for name, v in state.items()})
    with torch.inference_mode():
        assert relative_gap(model(tokens()), published(tokens()).logits) < 5e-7


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("family", ["Qwen3", "Qwen3Moe"])
def test_padding_on_any_side_changes_nothing(family, side):
    model, words, lengths = filled(family, **DOUBLE), tokens(3, 11), (11, 6, 1)
    starts = {"left": (0, 5, 10), "right": (0, 0, 0), "both": (0, 3, 4)}[side]
    padding = torch.ones(3, 11, dtype=torch.bool)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        padding[row, start : start + length] = False
    with torch.inference_mode():
        found = model(words, padding_mask=padding)
        last = model(words, padding_mask=padding, last=True)
        assert last.shape == (3, 1, MADE["VOCABULARY"])
        for row in range(3):
            alone = model(words[row : row + 1, ~padding[row]])[0]
            assert (found[row, ~padding[row]] - alone).abs().max() < 1e-12
            assert (last[row, 0] - alone[-1]).abs().max() < 1e-12
        assert (model(words, last=True) - model(words)[:, -1:]).abs().max() < 1e-12


@pytest.mark.parametrize("family", ["Llama", "Qwen3Moe"])
def test_cached_pieces_equal_the_whole(family):
    model, words = filled(family, **DOUBLE), tokens(2, 12)
    padding = torch.zeros(2, 12, dtype=torch.bool)
    padding[1, :3] = True  # prompts of unlike lengths
    padding[0, 9:] = True  # a sequence that has ended
    for mask in (None, padding):
        with torch.inference_mode():
            expected = model(words, padding_mask=mask)
            caches, found = model.caches(), []
            for part in (slice(0, 5), slice(5, 6), slice(6, 12)):
                own = None if mask is None else mask[:, part]
                found.append(model(words[:, part], padding_mask=own, caches=caches))
        seen = torch.ones(2, 12, dtype=torch.bool) if mask is None else ~mask
        assert (torch.cat(found, 1) - expected)[seen].abs().max() < 1e-12
        assert [len(cache) for cache in caches] == [12] * 3


def test_positions_may_be_given():
    model, words = filled("Llama", **DOUBLE), tokens()
    shifted = torch.arange(17) * 2
    with torch.inference_mode():
        plain = model(words)
        assert torch.equal(model(words, positions=torch.arange(17)), plain)
        assert (model(words, positions=torch.arange(17) + 40) - plain).abs().max() < 1e-9
        assert (model(words, positions=shifted) - plain).abs().max() > 1e-2


def test_a_gate_may_route_by_the_token():
    gate = partial(HashGate, num_experts=4, num_ids=260)
    model = filled("Qwen3", gate=gate, experts=EXPERTS)
    words = torch.tensor([[5, 9, 5, 9]])
    router, routed = model.blocks[1].mlp.gate, []
    router.listeners = (lambda routing, _: routed.append(routing.indices),)
    model(words)
    assert torch.equal(routed[0], router(torch.zeros(1, 4, 32), ids=words).indices)
    assert routed[0][0, 0] == routed[0][0, 2] != routed[0][0, 1]


@pytest.mark.parametrize("family", ["Llama", "Qwen3Moe"])
def test_checkpointing_computes_blocks_again_and_the_same_gradients(family):
    found, runs = [], []
    for checkpointing in (False, True):
        model, calls = filled(family, checkpointing=checkpointing, **DOUBLE).train(), []
        model.blocks[1].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(tokens()).logsumexp(-1).sum().backward()
        found.append([p.grad for p in model.parameters()])
        runs.append(len(calls))
        with torch.no_grad():
            model(tokens(), caches=model.caches())
    assert runs == [1, 2]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_tied_weights_are_one_parameter():
    model = ours("Llama", tie_embeddings=True)
    embedding = model.model["embed_tokens"].weight
    assert model.lm_head.weight is embedding
    assert sum(p is embedding for p in model.parameters()) == 1
    model.load_state_dict({n: v.clone() for n, v in model.state_dict().items()}, assign=True)
    model.tie_weights()
    assert model.lm_head.weight is model.model["embed_tokens"].weight


def test_what_does_not_fit_is_refused(refuses):
    coupled = {"gate": partial(ExpertChoiceGate, num_experts=4), "experts": EXPERTS, **SMALL}
    top = partial(TopKGate, num_experts=4)
    refuses(
        ValueError,
        (r"^num_layers must be at least 1, got 0$", lambda: Decoder(9, 8, 0, 2, **SMALL)),
        (r"^context must be at least 1", lambda: Decoder(9, 8, 1, 2, hidden_dim=4, context=0)),
        (r"num_kv_heads=3 must divide num_heads=2", lambda: Decoder(9, 8, 1, 2, 3, **SMALL)),
        (r"even head_dim, got 3$", lambda: Decoder(9, 6, 1, 2, **SMALL)),
        (r"gate and experts: experts is missing", lambda: Decoder(9, 8, 1, 2, gate=top, **SMALL)),
        (r"gate is missing", lambda: Decoder(9, 8, 1, 2, experts=EXPERTS, **SMALL)),
        (
            r"^moe_every=3 leaves none of 2 blocks experts$",
            lambda: Decoder(9, 8, 2, 2, gate=top, experts=EXPERTS, moe_every=3, **SMALL),
        ),
        (
            r"model\.layers\.0\.mlp\.gate \(ExpertChoiceGate\).*allow_leak=True$",
            lambda: Decoder(9, 8, 1, 2, **coupled),
        ),
        (r"^got 2 caches for 3 blocks", lambda: ours("Llama")(tokens(), caches=[1, 2])),
    )
    assert Decoder(9, 8, 1, 2, allow_leak=True, **coupled)(tokens() % 9).shape == (3, 17, 9)
