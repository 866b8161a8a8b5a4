"""What tokens of a prompt attend to, compared with a mask."""

import pytest
import torch
from torch.testing import assert_close

from language.scbench.policies import patterns
from language.scbench.policies.registry import policy_of

SIZES = {"sinks": 3, "window": 9}


def pattern(length, sinks, window, last=0):
    row, key = torch.arange(length)[:, None], torch.arange(length)
    near = (key < sinks) | (key > row - window) | (row >= length - last)
    return near & (key <= row)


@pytest.mark.parametrize("rows", [1000, 16])
@pytest.mark.parametrize(
    ("name", "options", "sizes"),
    [
        ("a-shape", SIZES, (3, 9)),
        ("tri-shape", SIZES | {"last": 10}, (3, 9, 10)),
        ("a-shape", {"keep": 0.3, "sinks": 0}, (0, 21)),
        ("tri-shape", {"sinks": 40, "window": 20, "last": 100}, (40, 20, 100)),
    ],
)
def test_a_prompt_attends_as_by_a_mask(
    name, options, sizes, rows, tiny, tokens, masked, monkeypatch
):
    monkeypatch.setattr(patterns, "ROWS", rows)
    model, policy = tiny(), policy_of(name, **options)
    cache = policy.make_cache(model)
    own = model(tokens, cache=cache).logits
    visible = [pattern(70, *sizes).expand(2, 4, -1, -1)] * 3
    assert_close(own, masked(model, tokens, visible), rtol=1e-4, atol=1e-5)
    assert cache.layers[0].states[0].held["keys"].shape[2] == 70


def test_a_pattern_wider_than_the_prompt_is_plain(tiny, tokens):
    model = tiny()
    plain = model(tokens).logits
    for name in ("a-shape", "tri-shape"):
        assert torch.equal(model(tokens, cache=policy_of(name).make_cache(model)).logits, plain)
