"""Encoders of histories: closed forms, masks, empty histories, candidates of one user."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.testing import assert_close

from recsys.schema import History
from recsys.sequence import MeanEncoder, TargetAttention, TransformerEncoder, build_encoder

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
    states = encoder.states(events[:1], mask[:1])
    found = encoder.pooled(states, mask[:1], target)
    expected = encoder(events[:1].expand(4, -1, -1), mask[:1].expand(4, -1), target)
    assert_close(found.expand(4, -1), expected, rtol=0, atol=1e-12)
    assert encoder.needs_target == (len(found) == 4)
    if encoder.needs_target:
        assert float((found[0] - found[1]).abs().max().detach()) > 1e-3
        with pytest.raises(ValueError, match="item to be ranked"):
            encoder(events, mask)


def test_gradients(encoder):
    events, mask, target = inputs(2)
    arguments = (events.requires_grad_(), mask, target.requires_grad_())
    assert gradcheck(encoder, arguments, atol=1e-6)


def test_the_mean_is_that_of_the_events():
    events, mask, _ = inputs()
    found = MeanEncoder(DIM)(events, mask)
    assert_close(found[0], events[0].mean(0))
    assert_close(found[1], events[1, 3:].mean(0))
    assert torch.equal(found[2], torch.zeros_like(found[2]))


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
        weights = mine.softmax(0) if softmax else mine
        expected = weights @ events[row, LENGTH - count :]
        assert_close(encoder(events, mask, target)[row], expected, rtol=0, atol=1e-12)


def test_the_transformer_knows_the_order_and_a_missing_newest_event():
    torch.manual_seed(0)
    encoder = TransformerEncoder(DIM, max_length=LENGTH).double()
    nn.init.normal_(encoder.positions)
    events, mask, _ = inputs()
    swapped = events[:, [1, 0, 2, 3, 4]]
    gap = (encoder(swapped, mask) - encoder(events, mask)).abs().amax(1)
    assert float(gap[0].detach()) > 1e-3
    late = torch.tensor([[False, True, True, True, False]])
    states = encoder.states(events[:1], late)
    assert torch.equal(encoder.pooled(states, late, None)[0], states[0, 3])


def test_encoders_are_built_as_the_schema_names_them():
    made = build_encoder(History("h", of="v", encoder="mean"), 4)
    assert isinstance(made, MeanEncoder)
    made = build_encoder(History("h", of="v", encoder="target_attention"), 4, {"softmax": True})
    assert isinstance(made, TargetAttention)
    assert made.softmax
    made = build_encoder(History("h", of="v", encoder="transformer", max_length=9), 4)
    assert isinstance(made, TransformerEncoder)
    assert len(made.positions) == 9


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
