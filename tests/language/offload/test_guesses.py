"""Guesses: they change what is fetched and when, never what is computed."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from core_gates import CrossLayerPredictor, GatesError, TopKGate
from language.offload.allocation import ALLOCATIONS, allocate
from language.offload.caches import make_cache
from language.offload.guesses import (
    ORDER,
    Profile,
    RoutedTokens,
    fetched,
    last_tokens,
    make_predictor,
    rarest,
)
from language.offload.setup import Setup

E, K, LAYERS, SLAB = 6, 2, 3, 9216
GOLDEN = Path(__file__).parents[2] / "golden" / "moe_inference_sora"
IDS = torch.randint(64, (2, 7), generator=torch.Generator().manual_seed(1))
TOKENS = torch.tensor([7, 8, 9])
PROFILE = Profile(
    torch.tensor([[0, 1], [1, 2], [4, 1]]).expand(LAYERS, -1, -1), last_tokens(TOKENS)
)
MODELS = ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "DeepseekV2", "DeepseekV3", "GptOss")


def logits_of(model, ids=IDS, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def tokens_of(model):
    return model.generate(IDS[:1], max_new_tokens=6, do_sample=False)


@pytest.fixture
def load(checkpoint, offloaded):
    """``load(slots, width, **options)``: a tiny model with slots for each layer and for guesses."""

    def call(slots=K, width=K, name="Qwen3Moe", **options):
        budget = (slots * LAYERS + width) * SLAB
        if name.startswith("Deepseek") or name == "GptOss":
            budget = 0.9
        guessed = width if "predictor" in options else None
        return offloaded(checkpoint(name), budget=budget, width=guessed, **options)

    return call


@pytest.mark.parametrize(
    "predictor", ["all", "cross-layer", "path", "frequency", "ngram", "ngram-first"]
)
def test_no_predictor_changes_what_is_computed(predictor, load, resident, checkpoint):
    whole, model = resident(checkpoint()), load(predictor=predictor, profile=PROFILE)
    for _ in range(2):
        assert torch.equal(logits_of(model), logits_of(whole))
        assert torch.equal(tokens_of(model), tokens_of(whole))
    counts = model.offload.counts
    assert counts.guesses >= counts.guessed > 0
    assert counts.bytes == (counts.loads + counts.guesses) * SLAB
    assert 0 <= counts.unread <= (counts.guesses - counts.guessed) * SLAB


@pytest.mark.parametrize("name", MODELS)
def test_routers_of_all_classes_guess_what_they_choose(name, load, resident, checkpoint):
    model, seen = load(name=name, predictor="cross-layer"), []
    offload = model.offload
    offload.observers.append(lambda layer, one: seen.append(one))
    assert torch.equal(logits_of(model), logits_of(resident(checkpoint(name))))
    assert len(seen) == len(offload.layers)
    assert offload.counts.guesses > 0
    for layer, one in enumerate(seen[1:]):  # on the input of a layer itself, it guesses its choice
        guess = offload.guesses.predict(layer, one)
        assert torch.equal(guess.sort().values, one.routed.sort().values)


def test_guesses_are_not_counted_by_the_model(load, resident, checkpoint):
    model, whole = load(predictor="cross-layer"), resident(checkpoint())
    with torch.no_grad():
        own, stock = (m(IDS, output_router_logits=True) for m in (model, whole))
    assert len(own.router_logits) == len(stock.router_logits) == LAYERS
    assert torch.equal(own.aux_loss, stock.aux_loss)


@pytest.mark.parametrize("predictor", ["all", "cross-layer", "frequency"])
def test_guesses_never_displace_what_is_used(predictor, load):
    plain, guessing = (
        load(slots=4, width=0),
        load(slots=4, width=3, predictor=predictor, profile=PROFILE),
    )
    for model in (plain, guessing):
        for _ in range(2):
            tokens_of(model)
    without, counts = plain.offload.counts, guessing.offload.counts
    assert (counts.hits, counts.loads + counts.guessed) == (without.hits, without.loads)
    assert 0 < counts.guessed <= counts.guesses


def test_padding_fetches_nothing(load):
    model, mask = load(predictor="cross-layer"), torch.ones_like(IDS)
    mask[0, :4] = 0
    logits_of(model, attention_mask=mask)
    assert torch.equal(model.offload.guesses.padding, mask.flatten() == 0)
    logits_of(model)
    assert not len(model.offload.guesses.padding)
    ranked = torch.tensor([[5, 4], [0, 1], [3, 1]])
    hidden = torch.tensor([True, False, False])
    assert fetched(ranked, K, K, E, hidden) == [1, 0, 3]
    assert fetched(ranked, K, K, E) == [1, 0, 3, 4, 5]
    assert fetched(ranked, K, K, E, torch.ones(3, dtype=torch.bool)) == []


def test_one_token_fetches_spare_guesses_and_a_prompt_none():
    ranked = torch.tensor([[5, 4, 2, 0]])
    assert (fetched(ranked, K, 3, E), fetched(ranked.repeat(2, 1), K, 3, E)) == ([5, 4, 2], [4, 5])


@pytest.mark.fault("46 O1")
@pytest.mark.parametrize("predictor", ["all", "frequency"])
def test_a_prompt_fetches_every_absent_expert_where_tokens_are_not_distinguished(predictor, load):
    expected = torch.arange(16)
    assert fetched(expected.expand(32, -1), 2, 16, 16, alike=True) == expected.tolist()
    for padding, found in (([True, False], expected.tolist()), ([True, True], [])):
        two = expected.expand(2, -1)
        assert fetched(two, 2, 16, 16, torch.tensor(padding), alike=True) == found
    model, staged = load(E, E, predictor=predictor, profile=PROFILE), []
    offload = model.offload
    offload.observers.append(lambda layer, _: staged.append(sorted(offload.guesses.staged)))
    logits_of(model)
    assert staged[1:] == [[(layer, expert) for expert in range(E)] for layer in (1, 2)]


@pytest.mark.fault("46 O1")
@pytest.mark.parametrize("predictor", ["path", "ngram"])
def test_equal_tokens_fetch_what_they_are_guessed_to_use_and_no_more(predictor, load):
    """That their guesses are equal does not make the predictor one that distinguishes no tokens."""
    ranked = torch.arange(16).expand(32, -1)
    assert fetched(ranked, 2, 16, 16) == [0, 1]
    model, staged = load(E, E, predictor=predictor, profile=PROFILE), []
    offload = model.offload
    offload.observers.append(lambda layer, _: staged.append(len(offload.guesses.staged)))
    logits_of(model, torch.full((2, 1), 5))
    assert staged[1:] == [K, K]


def test_guesses_that_are_given_up_are_not_read(load, monkeypatch):
    model = load(predictor="all", width=E)
    offload, read, seen = model.offload, model.offload.store.read_into, []

    def slow(layer, expert, slab):
        seen.append((layer, expert))
        threading.Event().wait(0.005)
        read(layer, expert, slab)

    monkeypatch.setattr(offload.store, "read_into", slow)
    logits_of(model, IDS[:1, :1])
    counts = offload.counts
    offload.close()
    assert counts.unread > 0
    assert counts.bytes - counts.unread == len(seen) * SLAB


def test_a_guess_that_cannot_be_read_is_no_error_until_it_is_needed(load, monkeypatch):
    model = load(predictor="all", width=E)
    expected, used = logits_of(model), []
    model.offload.observers.append(
        lambda layer, seen: used.append((layer, seen.routed.unique().tolist()))
    )
    logits_of(model, IDS[:1, :2])
    unused = next((layer, e) for layer, es in used[1:] for e in range(E) if e not in es)
    read = model.offload.store.read_into

    def fail(layer, expert, slab):
        if (layer, expert) == unused:
            raise OSError("unplugged")
        read(layer, expert, slab)

    monkeypatch.setattr(model.offload.store, "read_into", fail)
    logits_of(model, IDS[:1, :2])
    layer, expert = unused
    everything = torch.arange(64).unsqueeze(0)
    with pytest.raises(GatesError, match=rf"expert {expert} of model\.layers\.{layer}.*unplugged"):
        logits_of(model, everything)
    monkeypatch.undo()
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("how", ALLOCATIONS)
@pytest.mark.parametrize("policy", ["LRU", "LFU", "LIFO", "ARC"])
@pytest.mark.parametrize("name", ["fate_small", "fate_wide"])
def test_golden_hits_with_guesses(name, policy, how):
    with np.load(GOLDEN / f"{name}.npz") as golden:
        layers, experts, k, width = (int(golden[n]) for n in ("L", "E", "top_k", "prefetch_width"))
        actual = torch.from_numpy(golden["actual_topk"])
        slots = allocate(how, int(golden["budget"]), layers=layers, experts=experts, least=k)
        for layer in range(layers):
            cache = make_cache(policy.lower(), slots[layer])
            there = [cache.use(one).hit for one in actual[layer].flatten().tolist()]
            if layer:
                gate = TopKGate(golden["gate_input"].shape[-1], experts, k=k, dtype=torch.float64)
                gate.weight.data = torch.from_numpy(golden["router_weight"][layer])
                x = torch.from_numpy(golden["gate_input"][layer - 1])
                ranked = CrossLayerPredictor(gate, width=width)(x).indices
                guesses = [fetched(one.unsqueeze(0), k, width, experts) for one in ranked]
                pairs = zip(actual[layer].flatten().tolist(), there, strict=True)
                there = [hit or e in guesses[n // k] for n, (e, hit) in enumerate(pairs)]
            expected = golden[f"hit_or_prefetched_{policy}_{how}"][:, layer]
            assert there == expected.flatten().tolist()


@pytest.mark.parametrize("name", ["fate_small", "fate_wide"])
def test_golden_experts_in_2_bits(name):
    with np.load(GOLDEN / f"{name}.npz") as golden:
        for order, mask in zip(golden["prefill_order"], golden["prefill_int2_mask"], strict=True):
            assert rarest(order[order >= 0].tolist()) == set(mask.nonzero()[0].tolist())


def test_tables_count_what_a_profile_used():
    path = make_predictor("path", E, profile=PROFILE)
    frequency = make_predictor("frequency", E, profile=PROFILE)
    seen = RoutedTokens(torch.tensor([[4, 0], [2, 2]]), torch.full((2, ORDER), -1))
    assert frequency(0, seen)[:, :2].tolist() == [[1, 0], [1, 0]]
    assert path(0, seen)[:, :2].tolist() == [[1, 0], [1, 2]]  # 4 with 4, 1; 0 with 0, 1
    assert_close(path(0, seen).sort().values, torch.arange(E).expand(2, -1))
    now, after = [[0, 1], [0, 2], [1, 2], [0, 3]], [[5, 5], [4, 4], [4, 4], [4, 4]]
    both = Profile(torch.tensor([now, after]), torch.full((4, ORDER), -1))
    path = make_predictor("path", E, profile=both)
    for routed, best in (([1, 0], 5), ([0, 4], 4)):  # 0 and 1 together; 0 alone
        assert (
            int(path(0, RoutedTokens(torch.tensor([routed]), torch.full((1, ORDER), -1)))[0, 0])
            == best
        )


def test_a_table_of_the_last_tokens_backs_off():
    tokens = last_tokens(torch.tensor([1, 2, 1, 2, 3, 2, 4, 4, 4, 4]))
    assert tokens[:3].tolist() == [[1, -1, -1, -1], [2, 1, -1, -1], [1, 2, 1, -1]]
    used = torch.tensor([0, 1, 0, 1, 0, 2, 3, 3, 3, 3]).unsqueeze(1)
    profile = Profile(torch.stack([used, used]), tokens)
    ahead = torch.tensor([[4, 5]])
    predict, first = (
        make_predictor(name, E, profile=profile, ahead=lambda *_: ahead)
        for name in ("ngram", "ngram-first")
    )
    for pair, best in (
        *(([2, 1], [1, 2, 3, 0]), ([2, 3], [2, 1, 3, 0])),  # the pair, then the token
        *(([2, 9], [1, 2, 3, 0]), ([1, 4], [0, 3, 1, 2])),  # the token, then frequency
        ([9, 1], [3, 0, 1, 2]),  # frequency
    ):
        seen = RoutedTokens(torch.tensor([[0]]), torch.tensor([[*pair, 7, 7]]))
        assert predict(0, seen)[0, :4].tolist() == first(0, seen)[0, :4].tolist() == best
        assert torch.equal(first(1, seen), ahead)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 999), vocabulary=st.sampled_from([2, 4]), far=st.sampled_from([1, 2**61])
)
def test_a_table_counts_all_contexts(seed, vocabulary, far):
    generator = torch.Generator().manual_seed(seed)
    rows = last_tokens(far * torch.randint(vocabulary, (60,), generator=generator))
    used = torch.randint(E, (60,), generator=generator)
    known, wanted = Profile(used[:40].view(1, -1, 1).expand(2, -1, -1), rows[:40]), rows[40:]
    found = make_predictor("ngram", E, profile=known)(0, RoutedTokens(used[40:, None], wanted))
    for row, guess in zip(wanted, found, strict=True):
        scores = torch.zeros(E)
        for length in range(ORDER + 1):
            same = (rows[:40, :length] == row[:length]).all(1)
            scores = (used[:40][same].bincount(minlength=E) + scores) / (same.sum() + 1)
        assert torch.equal(guess, scores.argsort(descending=True, stable=True))


def test_the_last_tokens_are_known_from_call_to_call(load):
    model, seen = load(predictor="ngram", profile=PROFILE), []
    guesses = model.offload.guesses
    model.offload.observers.append(lambda _, one: seen.append(one.tokens.tolist()))
    for part, expected in (
        (IDS, last_tokens(IDS).flatten(0, 1)),
        (IDS[:, :1], torch.cat([IDS[:, :1], IDS[:, 4:].flip(1)], 1)),
        (IDS[:, 1:2], torch.cat([IDS[:, :2].flip(1), IDS[:, 5:].flip(1)], 1)),
        (IDS[:1, :1], torch.tensor([[IDS[0, 0], -1, -1, -1]])),  # another batch
    ):
        logits_of(model, part)
        assert seen[-LAYERS:] == [expected.tolist()] * LAYERS
    embedded = model.get_input_embeddings()(IDS)
    with torch.no_grad():
        model(inputs_embeds=embedded)
    assert seen[-1] == [[-1] * ORDER] * IDS.numel()
    assert guesses.tokens_of(3).tolist() == [[-1] * ORDER] * 3


@pytest.mark.fault("46 O5")
def test_a_width_of_nothing_is_refused(refuses):
    line = "^width 3 is for guesses: give a predictor, or leave it out$"
    refuses(
        GatesError,
        (line, lambda: Setup(width=3)),
        (line, lambda: Setup(policy="static", transfer="int4", predictor="none", width=3)),
    )
    assert Setup(predictor="all", width=3).guesses(2, 6) == 3


@pytest.mark.fault("46 O5")
def test_a_setup_of_other_types_is_refused_when_it_is_made(refuses):
    refuses(
        GatesError,
        *(
            (
                rf"^width is {shown}, expected a whole number of guesses or null$",
                lambda width=width: Setup(predictor="all", width=width),
            )
            for width, shown in (("3", "'3'"), (2.5, r"2\.5"), (True, "True"))
        ),
        ("^predictor is 'al'; choose one of none, all", lambda: Setup(predictor="al")),
        ("^transfer is 'int8'; choose one of stored", lambda: Setup(transfer="int8")),
        ("^policy is 3; choose one of lru", lambda: Setup(policy=3)),
    )


def test_bad_inputs_are_one_line(load, refuses):
    model = load()
    model.model.layers[1].mlp.gate.weight.data.fill_(torch.nan)
    refuses(
        GatesError,
        ("predictor is 'luck'; choose one of none, all", lambda: load(predictor="luck")),
        ("'path' needs a profile", lambda: load(predictor="path")),
        ("'oracle' knows the future", lambda: load(predictor="oracle")),
        ("width is 1, expected 2 to 6", lambda: load(predictor="all", width=1)),
        (
            r"need 2 each and guesses 6 more: give at least 110,592",
            lambda: load(slots=1, width=6, predictor="all"),
        ),
        (r"weights of model\.layers\.1\.mlp\.experts are not finite", lambda: logits_of(model)),
    )
