"""Rankers, and encoders of their histories."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from core_gates.errors import GatesError
from recsys.inputs import InputLayer, Rows
from recsys.ranker import Ranker, input_width
from recsys.schema import History, Product
from recsys.sequence import MeanEncoder, TargetAttention, TransformerEncoder, build_encoder

from .conftest import TOY

DIM, LENGTH = 6, 5
MAKERS = {
    "mean": lambda: MeanEncoder(DIM),
    "din": lambda: TargetAttention(DIM, hidden_dim=7),
    "din softmax": lambda: TargetAttention(DIM, hidden_dim=7, softmax=True),
    "last": lambda: TransformerEncoder(DIM, max_length=LENGTH, layers=2, heads=2),
    "target": lambda: TransformerEncoder(DIM, max_length=LENGTH, width=4, pool="target"),
}


@pytest.fixture(params=MAKERS)
def encoder(request):
    torch.manual_seed(0)
    made = MAKERS[request.param]().double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def inputs(number=4):
    """Histories of 5, 2, 0 and 1 events, padded at the front."""
    torch.manual_seed(1)
    events = torch.randn(number, LENGTH, DIM, dtype=torch.float64)
    counts = torch.tensor([5, 2, 0, 1])[:number]
    mask = torch.arange(LENGTH) >= LENGTH - counts[:, None]
    return events, mask, torch.randn(number, DIM, dtype=torch.float64)


def test_what_lies_outside_of_the_mask_changes_nothing(encoder):
    events, mask, target = inputs()
    expected = encoder(events, mask, target)
    assert expected.shape == (4, encoder.out_dim)
    for padding in (0.0, 1e6):
        other = torch.where(mask[..., None], events, padding)
        assert_close(encoder(other, mask, target), expected, rtol=0, atol=1e-12)
    other = events + mask[..., None] * torch.randn_like(events)
    changed = (encoder(other, mask, target) - expected).abs().amax(1) > 1e-3
    assert changed.tolist() == [True, True, False, True]


def test_an_empty_history_gives_finite_values_and_gradients(encoder):
    events, mask, target = inputs()
    events.requires_grad_()
    out = encoder(events, torch.zeros_like(mask), target)
    assert bool(out.isfinite().all())
    out.sum().backward()
    grads = [events.grad, *(p.grad for p in encoder.parameters() if p.grad is not None)]
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert float(events.grad.abs().max()) == 0
    learned = getattr(encoder, "empty", torch.zeros(DIM, dtype=torch.float64))
    assert torch.equal(out, learned.expand_as(out))


def test_padding_more_at_the_front_changes_nothing(encoder):
    events, mask, target = inputs()
    short = encoder(events[1:, 3:], mask[1:, 3:], target[1:])
    assert_close(encoder(events, mask, target)[1:], short, rtol=0, atol=1e-12)


def test_one_user_with_many_candidates_equals_complete_rows(encoder):
    events, mask, target = inputs()
    found = encoder.pooled(encoder.states(events[:1], mask[:1]), mask[:1], target)
    expected = encoder(events[:1].expand(4, -1, -1), mask[:1].expand(4, -1), target)
    assert_close(found.expand(4, -1), expected, rtol=0, atol=1e-12)
    assert encoder.needs_target == (len(found) == 4)
    if encoder.needs_target:
        assert float((found[0] - found[1]).abs().max().detach()) > 1e-3
        with pytest.raises(ValueError, match="item to be ranked"):
            encoder(events, mask)


@pytest.mark.parametrize("softmax", [False, True])
def test_target_attention_is_the_network_of_the_paper(softmax):
    torch.manual_seed(0)
    encoder = TargetAttention(DIM, hidden_dim=7, softmax=softmax).double()
    events, mask, target = inputs()
    t = target[:, None].expand_as(events)
    joined = torch.cat([events, t, events - t, events * t], -1)
    scores = encoder.score(nn.functional.silu(encoder.hidden(joined)))[..., 0]
    for row, count in ((0, 5), (1, 2), (3, 1)):
        mine = scores[row, LENGTH - count :]
        expected = (mine.softmax(0) if softmax else mine) @ events[row, LENGTH - count :]
        assert_close(encoder(events, mask, target)[row], expected, rtol=0, atol=1e-12)


def test_the_transformer_knows_the_order_and_a_missing_newest_event():
    torch.manual_seed(0)
    encoder = TransformerEncoder(DIM, max_length=LENGTH).double()
    nn.init.normal_(encoder.positions)
    events, mask, _ = inputs()
    gap = (encoder(events[:, [1, 0, 2, 3, 4]], mask) - encoder(events, mask)).abs().amax(1)
    assert float(gap[0].detach()) > 1e-3
    late = torch.tensor([[False, True, True, True, False]])
    states = encoder.states(events[:1], late)
    assert torch.equal(encoder.pooled(states, late, None)[0], states[0, 3])
    long = History("h", of="v", encoder="transformer", max_length=9)
    assert len(build_encoder(long, DIM).positions) == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"colour": 1}, "history 'h' cannot be built: .*colour"),
        ({"heads": 3}, "3 heads do not divide a width of 4"),
        ({"pool": "first"}, "pool is 'first'; choose one of last, target"),
        ({"layers": 0}, "layers must be at least 1"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build_encoder(History("h", of="v", encoder="transformer"), 4, options)


def test_a_history_that_is_too_long_is_refused():
    encoder = TransformerEncoder(DIM, max_length=2)
    events, mask, _ = inputs()
    with pytest.raises(ValueError, match="5 events is longer than max_length=2"):
        encoder(events.float(), mask)


RANKERS = {
    "mean": {},
    "din": {"encoder": "target_attention"},
    "last": {"encoder": "transformer"},
    "target": {"encoder": "transformer", "encoders": {"watched": {"pool": "target"}}},
    "copies": {"encoder": "target_attention", "copies": 4},
    "prior": {"prior": ("user", "city", "activity"), "prior_dim": 11},
    "both": {"prior": ("user", "city"), "prior_dim": 10, "copies": 2},
}


@pytest.fixture(params=RANKERS)
def ranker(request):
    return TOY["toy_ranker"](**RANKERS[request.param])


def test_inputs_are_embeddings_then_histories_then_numbers_then_products():
    ranker = TOY["toy_ranker"]()
    rows = TOY["rows"](20)
    v = ranker.inputs(*rows)
    (layer,) = ranker.layers
    assert v.shape == (20, layer.out_dim)
    tables = layer.bank.named_tables()
    assert torch.equal(v[:, layer.slices["user"]], tables["user"][rows.sparse[:, 1]])
    assert torch.equal(v[:, layer.slices["last_video"]], tables["video"][rows.sparse[:, 3]])
    assert torch.equal(v[:, layer.slices["duration"]], rows.dense[:, 1:2])
    assert torch.equal(v[:, layer.slices["activity missing"]], rows.dense[:, 2:3])
    watched = rows.sequences[0]
    sums = [tables["video"][row[row != 1]].sum(0) / max(1, (row != 1).sum()) for row in watched]
    assert_close(v[:, layer.slices["watched"]], torch.stack(sums))
    starts, ends = zip(*((s.start, s.stop) for s in layer.slices.values()), strict=True)
    assert starts[1:] == ends[:-1]
    assert v.shape[1] == list(layer.slices.values())[-1].stop == input_width(ranker.schema)
    left, *right = (v[:, layer.slices[name]] for name in ("last_video", "video", "author"))
    product = v[:, layer.slices["(last_video) * (video + author)"]]
    assert_close(product, 10 * left * (right[0] + right[1]))
    assert product.abs().max() > 1e-3


def test_candidates_of_one_user_equal_complete_rows(ranker):
    user, candidates = TOY["rows"](1, seed=5), TOY["rows"](37, seed=6)
    user = Rows(user.sparse, user.dense, TOY["rows"](2, seed=7).sequences)
    user = Rows(user.sparse, user.dense, tuple(s[1:] for s in user.sequences))
    with torch.no_grad():
        expected = ranker(*TOY["as_user"](user, candidates))
        assert_close(ranker.score_candidates(user, candidates), expected, rtol=0, atol=1e-6)
        part = ranker.user_inputs(user)
        assert_close(ranker.score_candidates(part, candidates), expected, rtol=0, atol=1e-6)
    other = user._replace(sequences=tuple(torch.ones_like(s) for s in user.sequences))
    gap = (ranker.score_candidates(other, candidates) - expected).abs().max()
    assert float(gap.detach()) > 1e-3  # the history of the user matters


def test_what_is_of_the_user_is_not_read_from_candidates(ranker):
    user, candidates = TOY["rows"](1, seed=5), TOY["rows"](9, seed=6)
    expected = ranker.score_candidates(user, candidates)
    sparse, dense = candidates.sparse.clone(), candidates.dense.clone()
    sparse[:, [1, 3, 5, 7]], dense[:, [0, 2]] = 0, torch.nan
    assert torch.equal(ranker.score_candidates(user, Rows(sparse, dense)), expected)


def test_each_copy_has_its_own_embeddings():
    ranker, rows = TOY["toy_ranker"](copies=3), TOY["rows"](8)
    v = ranker.inputs(*rows)
    assert v.shape == (8, 3, ranker.layers[0].out_dim)
    assert not torch.equal(v[:, 0], v[:, 1])
    assert torch.equal(v[:, 2], ranker.layers[2](*rows))
    assert len(ranker.tables()) == 9


def test_the_prior_is_that_of_the_named_features(refuses):
    ranker, rows = TOY["toy_ranker"](**RANKERS["prior"]), TOY["rows"](8)
    v, seen = ranker.inputs(*rows), []
    ranker.net.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    ranker(*rows)
    expected = torch.cat(
        [v[:, ranker.input_layers[0].slices[n]] for n in ("user", "city", "activity")], 1
    )
    assert torch.equal(seen[0], expected)
    refuses(
        ValueError,
        (
            "takes a prior of 5 inputs, but the features user have 6",
            lambda: TOY["toy_ranker"](prior=("user",), prior_dim=5),
        ),
        ("users are no inputs", lambda: TOY["toy_ranker"](prior=("users",), prior_dim=6)),
    )


@pytest.mark.parametrize("feature", ["user", "video"])
def test_a_network_that_routes_by_identity_gets_the_rows_of_its_feature(feature):
    options = {"gate": "HashGate", "gate_options": {"num_ids": 60}, "num_experts": 3}
    sizes = TOY["SIZES"]
    torch.manual_seed(0)
    ranker = Ranker.build(
        TOY["schema"](), sizes, 4, "MMoE", {**options, "gate_feature": feature}
    ).eval()
    user, candidates = TOY["rows"](1, seed=5), TOY["rows"](9, seed=6)
    rows, seen = TOY["as_user"](user, candidates), []
    ranker.net.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[2]))
    expected = ranker(*rows)
    assert_close(ranker.score_candidates(user, candidates), expected)
    column = {"video": 0, "user": 1}[feature]
    assert all(torch.equal(ids, rows.sparse[:, column]) for ids in seen)
    with pytest.raises(ValueError, match=r"routes by 'users', but the features .* are video, user"):
        Ranker.build(TOY["schema"](), sizes, 4, "MMoE", {**options, "gate_feature": "users"})


@pytest.mark.fault("video R13")
@pytest.mark.parametrize("feature", ["video", "user"])
def test_gates_have_an_id_for_each_row_of_their_table(feature):
    """Known when the ranker is built or grows, not when the last row comes along."""
    sizes, rows = dict(TOY["SIZES"]), TOY["SIZES"][feature]

    def build(num_ids):
        options = {"gate": "HashGate", "num_experts": 3, "gate_feature": feature}
        options["gate_options"] = {"num_ids": num_ids}
        return Ranker.build(TOY["schema"](), sizes, 4, "MMoE", options)

    words = f"routes by '{feature}', whose table has {rows} rows, but its gates know {rows - 1} ids"
    with pytest.raises(ValueError, match=words):
        build(rows - 1)
    ranker = build(rows + 3)
    ranker.grow({feature: rows + 3})
    with pytest.raises(GatesError, match=rf"has {rows + 4} rows, .* num_ids of {rows + 4} or more"):
        ranker.grow({feature: rows + 4})
    assert ranker.sizes[feature] == rows + 3


def test_a_folded_ranker_gives_the_same_and_leaves_the_original(ranker):
    rows = TOY["rows"](12)
    expected = ranker(*rows)
    folded = ranker.folded()
    assert isinstance(folded.net.norm, torch.nn.Identity)
    assert isinstance(ranker.net.norm, torch.nn.BatchNorm1d)
    assert not any(p.requires_grad for p in folded.parameters())
    assert all(p.requires_grad for p in ranker.parameters())
    assert_close(folded(*rows), expected, rtol=0, atol=1e-5)
    small = ranker.folded(int8=True)
    assert small.tables() == []
    assert 0 < float((small(*rows) - expected).abs().max().detach()) < 0.2


def test_tables_and_dense_parameters_are_all_parameters_once(ranker):
    tables, dense = ranker.tables(), ranker.dense_parameters()
    assert {id(p) for p in tables} | {id(p) for p in dense} == {id(p) for p in ranker.parameters()}
    assert len(tables) + len(dense) == len(list(ranker.parameters()))
    counts = ranker.count_params()
    assert sum(counts.values()) == sum(p.numel() for p in ranker.parameters())
    assert counts["tables"] == sum(table.numel() for table in tables)
    assert counts["net"] == sum(p.numel() for p in ranker.net.parameters())


def test_growth_leaves_scores_bit_equal(ranker):
    rows = TOY["rows"](20)
    expected = ranker(*rows).detach()
    ranker.grow({"video": 75, "user": 41, "author": 50})
    assert ranker.sizes["video"] == 75
    assert torch.equal(ranker(*rows), expected)
    new = rows._replace(sparse=rows.sparse.clone())
    new.sparse[:, 0] = 74
    assert not torch.equal(ranker(*new), expected)


def test_a_ranker_is_counted_without_memory():
    ranker = Ranker(
        TOY["schema"](), TOY["SIZES"] | {"video": 10**9}, 4, TOY["ToyNet"], device="meta"
    )
    assert ranker.count_params()["tables"] > 4 * 10**9


def test_what_does_not_fit_is_refused(refuses):
    schema, sizes = TOY["schema"](), TOY["SIZES"]
    refuses(
        ValueError,
        ("dense_width is 3; the schema has 4", lambda: InputLayer(schema, sizes, 3)),
        (
            "encoders names seen, no history",
            lambda: InputLayer(schema, sizes, 4, encoders={"seen": {}}),
        ),
    )

    def multiplied(left, right):
        return dataclasses.replace(schema, products=(Product(left, right),))

    refuses(
        ValueError,
        ("different widths: user 6, video 4; give", lambda: multiplied("user", "video")),
        ("are named twice: user", lambda: multiplied("user", ("video", "user"))),
        ("made of movie, no sparse feature", lambda: multiplied("user", "movie")),
        ("features on both sides", lambda: Product((), ("video",))),
    )
    ranker, rows = TOY["toy_ranker"](), TOY["rows"](3)
    refuses(
        ValueError,
        (
            r"dense \(3, 3\) must be \(B, 4\)",
            lambda: ranker(rows.sparse, rows.dense[:, :3], rows.sequences),
        ),
        (
            "got 1 sequences, expected 2",
            lambda: ranker(rows.sparse, rows.dense, rows.sequences[:1]),
        ),
        ("expected the one row of a user, got 3", lambda: ranker.user_inputs(rows)),
    )
