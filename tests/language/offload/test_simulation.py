"""Simulated time: closed forms, the order of the runtime, the choice of `auto`, files of traces."""

import json
import pickle
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core_gates.errors import GatesError
from language.offload.caches import POLICIES
from language.offload.guesses import Profile, last_tokens
from language.offload.loading import load_offloaded
from language.offload.setup import ON_DEMAND, Setup, Sizes
from language.offload.simulation import Cost, Replayed, Simulation, choose, left_out
from language.offload.traces import Step, Trace, read_trace, record, write_trace

SIZES = Sizes(layers=3, experts=6, k=2, bytes=100, weights=50)
FAST, SLOW = Cost(1.0, 1e12), Cost(1.0, 50.0)
GOLDEN = Path(__file__).parents[2] / "golden" / "moe_inference_sora"
PREDICTORS = ("all", "cross-layer", "path", "frequency", "ngram", "oracle")


def document(tokens=30, seed=0, prompt=4, right=0.7):
    """Random routings of which ``right`` are guessed."""
    generator = torch.Generator().manual_seed(seed)
    shape = (SIZES.layers, tokens, SIZES.experts)
    popular = torch.linspace(2, 0, SIZES.experts)
    scores = torch.randn(shape, generator=generator) + popular
    guesses = scores[1:] + (1 - right) * 3 * torch.randn(shape, generator=generator)[1:]
    routed, ranked = (one.argsort(-1, descending=True) for one in (scores, guesses))
    words = last_tokens(torch.randint(9, (tokens,), generator=generator))
    return Step(routed[..., : SIZES.k], ranked[..., :4], words).split(prompt)


def replayed(seed=0, **options):
    profile = Trace(SIZES, [document(seed=n) for n in (100, 101)]).profile()
    return Replayed(document(seed=seed, **options), SIZES, profile)


def run(one, setup=ON_DEMAND, budget=9, cost=SLOW, **options):
    return Simulation(one, setup, budget, cost, **options).run()


def test_on_demand_takes_what_the_formula_says():
    one = replayed(prompt=1)
    times = run(one)
    loads = times.uses - times.hits
    assert times.bytes == loads * SIZES.bytes
    assert times.wall == pytest.approx(30 * 3 * 1.0 + times.stall)
    # the first of two experts computes while the second is read
    assert loads * 1.5 <= times.stall <= loads * 2.0
    assert run(one, cost=FAST).wall == pytest.approx(90)
    everything = run(one, budget=18)
    assert everything.bytes <= 18 * SIZES.bytes


@settings(max_examples=25)
@given(
    seed=st.integers(0, 99),
    policy=st.sampled_from(sorted(set(POLICIES) - {"belady"})),
    predictor=st.sampled_from(PREDICTORS),
    link=st.floats(5, 1e4),
    prompt=st.integers(1, 9),
)
def test_guesses_change_time_and_nothing_that_is_kept(seed, policy, predictor, link, prompt):
    one, cost = replayed(seed, prompt=prompt), Cost(1.0, link)
    plain = run(one, Setup(policy=policy), 8, cost)
    times = run(one, Setup(policy=policy, predictor=predictor, width=3), 11, cost)
    assert (times.hits, times.uses) == (plain.hits, plain.uses)
    assert 0 <= times.late <= times.guessed <= times.uses - times.hits
    assert times.wall == pytest.approx(90 + times.stall)
    assert times.bytes >= (times.uses - times.hits) * SIZES.bytes
    ideal = max(90, times.bytes / link if predictor == "oracle" and prompt == 1 else 0)
    assert times.wall >= ideal * (1 - 1e-9) - SIZES.bytes / link


@pytest.mark.fault("46 O0")
def test_a_document_is_sent_to_another_process():
    one = replayed()
    setup = Setup(predictor="ngram")
    assert run(pickle.loads(pickle.dumps(one)), setup, 11) == run(one, setup, 11)
    assert run(pickle.loads(pickle.dumps(one)), setup, 11) == run(one, setup, 11)  # after its use


@pytest.mark.fault("46 O1")
@pytest.mark.parametrize("name", ["pregated_top1", "pregated_top2"])
def test_golden_transfers_and_experts_in_memory(name):
    """Before the golden stack is a layer of which k experts are used: it announces the first."""
    with np.load(GOLDEN / f"{name}.npz") as golden:
        layers, experts, k, tokens = (int(golden[n]) for n in ("L", "E", "top_k", "T"))
        sizes = Sizes(layers + 1, experts, k, 1, 1)
        before = torch.arange(k).expand(1, tokens, k)
        words = last_tokens(torch.arange(tokens))

        def of(mode):
            routed = torch.from_numpy(golden[f"{mode}_topk_index"])
            return Replayed([Step(torch.cat([before, routed]), routed, words)], sizes)

        for mode, predictor, wanted in (
            ("conventional", "none", "ondemand"),
            ("conventional", "all", "prefetch_all"),
            ("pregated", "cross-layer", "pregated"),
        ):
            one, setup = (
                of(mode),
                Setup(predictor=predictor, width=None if predictor == "none" else experts),
            )
            times = run(one, setup, layers * experts * 3, FAST)
            assert times.bytes - k == golden[f"transfers_{wanted}"]
            guesses = [len(step) for (step,) in one.orders(predictor)]
            apart = [max(map(len, one.needed[0][1:]))]
            in_memory = [sum(pair) for pair in pairwise(guesses)] or apart
            assert max(in_memory) == golden[f"peak_resident_{wanted}"]


def test_an_oracle_is_not_slower_than_a_router_and_this_than_none():
    one, cost = replayed(prompt=1, right=0.95), Cost(1.0, 200.0)
    walls = [
        run(one, Setup(predictor=predictor, width=width), 10, cost).wall
        for predictor, width in (("oracle", 2), ("cross-layer", 2), ("frequency", 2))
    ]
    assert walls == sorted(walls)
    assert walls[1] < run(one, budget=8, cost=cost).wall


def test_a_mapped_file_shares_its_memory_and_never_reads_ahead():
    one = replayed(prompt=1)
    times = run(one, budget=18, mapped=True)
    assert times.bytes <= 18 * SIZES.bytes
    tight = run(one, budget=6, mapped=True)
    assert tight.stall == pytest.approx(2 * (tight.uses - tight.hits))


@pytest.mark.parametrize("predictor", PREDICTORS[:5])
def test_the_runtime_counts_what_is_simulated(predictor, checkpoint):
    ids = torch.randint(64, (1, 7), generator=torch.Generator().manual_seed(1))
    used = torch.randint(6, (3, 7, 2), generator=torch.Generator().manual_seed(2))
    profile = Profile(used, last_tokens(ids[0]))
    setup = Setup(policy="lfu", predictor=predictor, width=3)
    model = load_offloaded(checkpoint(), budget=12 * 9216, setup=setup, profile=profile)
    offload, seen, ranked = model.offload, [], []
    predict = offload.guesses.predict
    offload.guesses.predict = lambda layer, one: ranked.append(predict(layer, one)) or ranked[-1]
    offload.observers.append(lambda layer, one: seen.append(one))
    model.generate(ids, max_new_tokens=9, do_sample=False)
    offload.close()
    steps = [
        Step(
            torch.stack([one.routed for one in seen[n : n + 3]]),
            torch.stack(ranked[n // 3 * 2 : n // 3 * 2 + 2]),
            seen[n].tokens,
        )
        for n in range(0, len(seen), 3)
    ]
    sizes = offload.sizes
    assert sizes == Sizes(3, 6, 2, 9216, 2304, offload.store.digest)
    times = run(Replayed(steps, sizes, profile), setup, 12, FAST)
    counts = offload.counts
    assert (times.hits, times.guessed) == (counts.hits, counts.guessed)
    assert (times.uses, times.bytes) == (counts.hits + counts.guessed + counts.loads, counts.bytes)


def test_few_bits_take_less_and_rare_experts_fewer():
    one = replayed(prompt=16)
    volumes = [
        run(one, Setup(predictor="cross-layer", transfer=transfer), 10).bytes
        for transfer in ("stored", "int4", "hybrid", "int2")
    ]
    assert volumes == sorted(volumes, reverse=True)
    few, plain = Setup(transfer="int4"), Setup()
    for setup, more in ((few, True), (plain, False)):
        walls = [Simulation(one, setup, 10, Cost(1.0, 100.0, own)).run().wall for own in (0.0, 5.0)]
        assert (walls[1] > walls[0]) is more
    assert volumes[0] / volumes[1] == pytest.approx(100 / 37, rel=0.3)


@pytest.mark.parametrize(
    "link", [100.0, *(pytest.param(link, marks=pytest.mark.slow) for link in (20.0, 400.0, 1e6))]
)
def test_auto_is_not_slower_than_on_demand_on_other_documents(link):
    cost = Cost(1.0, link)
    for budget in (6, 9, 14):
        setup = choose([replayed(seed) for seed in range(4)], budget, cost)
        walls = [
            [run(replayed(n), s, budget, cost).wall for n in (7, 8, 9)] for s in (setup, ON_DEMAND)
        ]
        assert sum(walls[0]) <= sum(walls[1])
    assert choose([replayed()], 18, Cost(1.0, 1e12)) == ON_DEMAND


def test_traces_survive_a_file(tmp_path):
    sizes = SIZES._replace(digest="0a1b")
    trace = Trace(sizes, [document(seed=1), document(seed=2)])
    path = tmp_path / "trace.jsonl"
    write_trace(path, trace)
    found = read_trace(path)
    assert (found.sizes, [len(one) for one in found.documents]) == (sizes, [27, 27])
    for step, other in zip(chain(*found.documents), chain(*trace.documents), strict=True):
        assert torch.equal(step.routed, other.routed)
        assert torch.equal(step.ranked, other.ranked)
        assert torch.equal(step.tokens, other.tokens)
    routed, tokens, digest = found.profile()
    assert (routed.shape, tokens.shape, digest) == ((3, 60, 2), (60, 4), "0a1b")


def test_a_profile_is_of_the_weights_that_it_was_recorded_with(checkpoint, refuses):
    folder, text = checkpoint(), torch.arange(8)
    model = load_offloaded(folder, budget=1.0)
    profile = Trace(model.offload.sizes, [[record(model, text)[0]]]).profile()
    model.offload.close()
    load = partial(load_offloaded, budget=1.0, setup=Setup(policy="static"), profile=profile)
    load(checkpoint(fused=True)).offload.close()  # the same weights in other files
    line = "3 layers and expert 5, the model 3 of 6 experts; weights are .* give one of this model"
    refuses(GatesError, (line, lambda: load(checkpoint("Olmoe"))))


def test_bad_traces_name_their_line(tmp_path, refuses):
    path = tmp_path / "trace.jsonl"
    write_trace(path, Trace(SIZES, [document(tokens=6)]))
    lines = path.read_text().splitlines()

    def with_line(number, **values):
        def read():
            changed = [*lines]
            changed[number - 1] = json.dumps(json.loads(lines[number - 1]) | values)
            path.write_text("\n".join(changed))
            read_trace(path)

        return read

    def with_text(text):
        def read():
            path.write_text(text)
            read_trace(path)

        return read

    experts = json.loads(lines[2])["experts"]
    wrong, twice = [[[0, 9]], *experts[1:]], [[[2, 2]], *experts[1:]]
    refuses(
        GatesError,
        (r"line 3: there is no expert 9 of 6; write it again", with_line(3, experts=wrong)),
        (
            r"line 3: document 0, step 1 after document 0, step 1: steps must grow; write",
            with_line(3, step=1),
        ),
        (
            r"line 2: document 0, step 0 after document 0, step 0: steps must grow",
            with_line(2, step=0),
        ),
        (r"line 3: step must be a whole number, got 2.9; write", with_line(3, step=2.9)),
        (r"line 3: document must be a whole number, got None", with_line(3, document=None)),
        (r"line 3: experts of a token name one twice", with_line(3, experts=twice)),
        (r"line 3: tokens are no 1 rows of 4 whole numbers", with_line(3, tokens=[1])),
        (
            r"line 4: document 0, step 3 after document 5, step 2: steps must grow",
            with_line(3, document=5),
        ),
        (r"line 3: Could not infer dtype of NoneType; write it again", with_line(3, experts=None)),
        (r"line 3: Overflow", with_line(3, tokens=[[2**70, 0]])),
        (r"line 3: experts are no whole numbers of 3 layers", with_line(3, experts=experts[1:])),
        (
            r"line 3: lacks 'guesses'",
            with_text("\n".join([*lines[:2], '{"document": 0, "step": 2, "experts": []}'])),
        ),
        (r"line 1: layers must be at least 1, got 0; write", with_line(1, layers=0)),
        (r"line 1: bytes must be a whole number, got inf", with_line(1, bytes=float("inf"))),
        (
            r"line 3: 1 guesses for a token, \d in the line before",
            with_line(3, guesses=[[[0]], [[1]]]),
        ),
        (r"line 1: .*unexpected keyword", with_line(1, depth=3)),
        (r"line 2: ", with_text(lines[0] + "\nnothing")),
        ("has no steps", with_text(lines[0])),
        ("cannot be read", lambda: read_trace(tmp_path)),
        ("give at least 600 bytes", lambda: run(replayed(), budget=5)),
    )


def test_documents_are_known_by_the_others():
    sizes = Sizes(2, 4, 1, 64, 16)
    steps = [
        [Step(torch.full((2, 3, 1), n), torch.zeros(1, 3, 4).long(), torch.zeros(3, 4).long())]
        for n in (1, 2)
    ]
    found = left_out(steps, sizes)
    assert [int(one.profile.routed.unique()) for one in found] == [2, 1]
    assert int(left_out(steps[:1], sizes)[0].profile.routed.unique()) == 1
