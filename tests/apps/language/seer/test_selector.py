"""The rule that `generate --sparse` names: what gates for decoding always read."""

from types import SimpleNamespace

import pytest

from apps.language.generate import selector_of


@pytest.mark.parametrize(
    ("rule", "recent"),
    [("token_budget=512", 12), ("token_budget=1030", 24), ("k=8", 6), ("threshold=.1", 2)],
)
def test_most_of_a_decoding_budget_is_spent_on_the_last_blocks(rule, recent):
    decode, prefill = (
        SimpleNamespace(kind=kind, gate=SimpleNamespace(block_size=32))
        for kind in ("decode", "prefill")
    )
    selector = selector_of(rule, decode)
    assert (selector.sinks, selector.recent) == (1, recent)
    selector = selector_of(rule, prefill)
    assert (selector.sinks, selector.recent) == (0, 0)
