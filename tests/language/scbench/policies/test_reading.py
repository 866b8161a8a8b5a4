"""Which pages a token reads."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from core_gates.attention.seer.gate import pool_blocks
from core_gates.errors import GatesError
from harness.files.piece import Piece
from language.scbench.policies.cache import LayerState
from language.scbench.policies.registry import policy_of
from language.seer.attach import attach_block_gates, block_gates, detach_block_gates
from language.seer.block_files import save_block_gates
from language.seer.rivals import page_bound
from tests.language.scbench.policies.conftest import GREEDY, LATENT

GOLDEN = Path(__file__).parents[3] / "golden" / "attention_sequence"


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_bound_of_quest():
    with np.load(GOLDEN / "kivi_quest.npz") as arrays:
        for bits in ("b2", "b4"):
            q, k, bound, largest = (
                torch.from_numpy(arrays[f"{bits}.{name}"]).double()
                for name in ("quest_q", "k", "quest_page_upper_bound", "quest_page_true_max")
            )
            high, low = pool_blocks(k.transpose(1, 2), 16, ("max", "min")).chunk(2, -1)
            own = page_bound(q.transpose(1, 2).unsqueeze(3), low, high)[:, :, 0]
            assert_close(own, bound, rtol=1e-9, atol=1e-9)
            assert (own >= largest).all()


@given(
    st.integers(0, 10**6),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(0, 8),
    st.integers(1, 4),
)
@settings(max_examples=40, deadline=None)
def test_no_product_exceeds_the_bound_of_quest(seed, page, pages, rest, group):
    q, k = drawn(1, 2 * group, 1, 5, seed=seed), drawn(1, 2, page * pages + rest, 5, seed=seed + 1)
    bound = policy_of("quest", page=page).page_scores(LayerState(None, 0, 1, 1.0), q, k)
    whole = k.shape[2] // page * page
    products = (q.unflatten(1, (2, group)) @ k.unsqueeze(2).mT)[..., 0, :whole]
    assert (bound >= products.unflatten(-1, (-1, page)).amax(-1).amax(2) - 1e-5).all()


def test_bounds_of_quest_grow_with_the_cache(tiny, tokens, small):
    model, policy = tiny(), small("quest")
    cache = policy.make_cache(model)
    model(tokens[:, :50], cache=cache)
    for at in range(50, 70):
        model(tokens[:, at : at + 1], cache=cache)
    state = cache.layers[1].states[0]
    keys = state.held["keys"][:, :, :64].transpose(1, 2)
    assert torch.equal(state.held["bounds"], pool_blocks(keys, 8, ("max", "min")))
    assert policy.cache_bytes(cache) == sum(t.numel() * 4 for t in cache.tensors)
    read = [(max(3, -(-n // 8) // 2) - 1) * 8 + (n - 1) % 8 + 1 for n in range(51, 71)]
    assert cache.read == pytest.approx(sum(read) / sum(range(51, 71)))


@pytest.mark.parametrize("family", [("Llama", {}), ("DeepseekV3", LATENT)])
@pytest.mark.parametrize("name", ["quest", "oracle"])
def test_a_token_reads_the_pages_and_nothing_else(name, family, tiny, tokens, small, masked, watch):
    model, policy = tiny(family[0], **family[1]), small(name)
    read = watch(policy, "decode")
    cache = policy.make_cache(model)
    model(tokens[:, :69], cache=cache)
    assert not read
    own = model(tokens[:, 69:], cache=cache).logits
    causal = torch.ones(70, 70, dtype=torch.bool).tril()
    visible = [causal.expand(2, 4, 70, 70).clone() for _ in range(3)]
    for index, pages in read.items():
        assert (pages.sum(-1) == 4).all()  # half of nine
        assert pages[..., -1].all()
        seen = pages.repeat_interleave(8, -1)[..., :70].repeat_interleave(4 // pages.shape[1], 1)
        visible[index][:, :, 69] = seen
    assert_close(own, masked(model, tokens, visible)[:, 69:], rtol=1e-4, atol=1e-5)


def test_the_oracle_reads_what_is_attended_to():
    q, k = drawn(2, 4, 1, 8), drawn(2, 2, 50, 8, seed=1)
    k[0, 1, 17] = 20 * q[0, 2, 0]
    state, policy = LayerState(None, 0, 1, 0.3), policy_of("oracle", keep=0.1, page=5)
    scores, pages = policy.page_scores(state, q, k), policy.decode(state, q, k)
    weights = (q.unflatten(1, (2, 2)) @ k.unsqueeze(2).mT * 0.3).softmax(-1)
    assert_close(scores, weights.unflatten(-1, (10, 5)).amax(-1)[:, :, :, 0].amax(2))
    assert scores[0, 1].argmax() == 3
    assert pages[0, 1, 3]
    assert (pages.sum(-1) == 3).all()


@pytest.fixture
def gated(tiny):
    model = tiny()
    generator = torch.Generator().manual_seed(3)
    for gate in attach_block_gates(model, "decode", block_size=8).values():
        for weight in gate.gate.parameters():
            weight.data.copy_(torch.randn(weight.shape, generator=generator))
    return model


def test_gates_read_a_part_and_the_first_block(gated, tiny, tokens):
    plain, all_read = tiny()(tokens).logits[:, 64:], {}
    for keep, sinks in ((1, 1), (0.5, 1), (0.5, 0)):
        policy = policy_of("seer", keep=keep, sinks=sinks)
        cache = policy.make_cache(gated)
        gated(tokens[:, :64], cache=cache)
        assert cache.read is None or keep == 1
        kept = copy.deepcopy(cache)
        runs = []
        for own in (cache, kept):
            steps = [gated(tokens[:, at : at + 1], cache=own).logits for at in range(64, 70)]
            runs.append(torch.cat(steps, 1))
        assert torch.equal(*runs)
        all_read[keep, sinks] = runs[0]
        assert cache.seconds == 0
        assert cache.get_seq_length() == 70
        assert cache.full_bytes == 3 * 2 * 2 * 2 * 70 * 16 * 4
        assert policy.cache_bytes(cache) > cache.full_bytes
        assert (cache.read == 1) if keep == 1 else (0.5 < cache.read < 0.65)
    assert_close(all_read[1, 1], plain, rtol=1e-4, atol=1e-4)
    assert (all_read[0.5, 1] - plain).abs().max() > 1e-3
    assert (all_read[0.5, 1] - all_read[0.5, 0]).abs().max() > 1e-3


def test_sinks_are_the_first_blocks_without_padding(gated):
    policy_of("seer", keep=0.4, sinks=2).make_cache(gated)
    selector = next(m for m in gated.modules() if type(m).__name__ == "SinkSelector")
    logits = drawn(2, 3, 1, 10)
    logits[0, ..., :3] = torch.finfo(logits.dtype).min
    kept = selector(logits)[:, :, 0]
    assert kept[0, :, 3:5].all()
    assert not kept[0, :, :3].any()
    assert kept[1, :, :2].all()
    assert ((kept.sum(-1) - 4) <= 1).all()


def test_gates_of_a_file_and_gates_that_are_missing(gated, tiny, tokens, tmp_path, small):
    path, model = save_block_gates(gated, tmp_path / "gates.safetensors"), tiny()
    with pytest.raises(GatesError, match="has no block gates"):
        policy_of("seer").make_cache(model)
    policy = policy_of("seer", gates=str(path))
    logits = [
        [m(tokens[:, part], cache=cache).logits for part in (slice(60), slice(60, 61))][1]
        for m in (gated, model)
        for cache in (policy.make_cache(m),)
    ]
    assert torch.equal(*logits)
    with pytest.raises(GatesError, match="leaves its block gate out"):
        gated(tokens, cache=small("snapkv").make_cache(gated))
    detach_block_gates(gated)
    for one in (gated, model):
        one(tokens, cache=small("snapkv").make_cache(one))
    attach_block_gates(model, "prefill")
    with pytest.raises(GatesError, match="choose for prompts, expected gates for decoding"):
        policy_of("seer").make_cache(model)


def test_gates_of_files_give_way_to_other_policies(gated, tiny, tokens, tmp_path, small, answers):
    first, second = (str(tmp_path / f"{n}.safetensors") for n in (1, 2))
    save_block_gates(gated, first)
    for gate in block_gates(gated).values():
        gate.gate.load_state_dict({k: x.flip(0) for k, x in gate.gate.state_dict().items()})
    save_block_gates(gated, second)
    policies = [policy_of("seer", gates=file) for file in (first, second)] + [small("snapkv")]
    model = tiny()

    def read(policy):
        return torch.stack(
            model.generate(
                tokens, cache=policy.make_cache(model), max_new_tokens=4, **GREEDY
            ).logits
        )

    alone = [answers(tiny(), tokens, policy)[:4] for policy in policies]
    for index in (2, 0, 1, 0, 2, 1, 2):
        assert torch.equal(read(policies[index]), alone[index])
    assert not torch.equal(alone[0], alone[1])
    cache = policies[0].make_cache(model)
    policies[2].make_cache(model)
    with pytest.raises(GatesError, match="gates of this cache were taken off"):
        model(tokens, cache=cache)


def test_other_gates_under_the_same_name_are_other_settings(tmp_path):
    policy, seen = policy_of("seer", gates=str(tmp_path / "gates")), []
    for content in (b"1", b"2", b"1"):
        (tmp_path / "gates").write_bytes(content)
        seen.append(Piece("seer", settings=policy.settings()).fingerprint)
    assert seen[0] == seen[2] != seen[1]
    plain = {"name": "seer", "keep": 0.5, "sinks": 1, "gates": None}
    assert Piece("seer", settings=policy_of("seer").settings()).settings == {"policy": plain}
