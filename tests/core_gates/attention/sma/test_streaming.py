from itertools import product

import pytest
import torch
from torch.testing import assert_close

from core_gates.attention.sma.layer import prefill, step


@pytest.mark.parametrize(
    ("position", "weighting"), [*product(["rotary", "simple", "local"], ["softmax", "relu2"])]
)
@pytest.mark.parametrize("num_prompt", [0, 1, 11])
def test_tokens_one_by_one_equal_the_whole(position, weighting, num_prompt, lively_layer):
    layer = lively_layer(position=position, weighting=weighting)
    x = torch.randn(3, 24, 8, dtype=torch.float64)
    with torch.no_grad():
        whole = layer(x)
        counts = layer.configurator(layer.mix(x)).mask.sum(-1)
        assert counts.max() > layer.unit.window + 1  # the window forgets
        assert len(set(counts.tolist())) > 1
        y, state = prefill(layer, x[:, :num_prompt])
        results = [y]
        for token in x[:, num_prompt:].unbind(1):
            y, state = step(layer, token, state)
            results.append(y.unsqueeze(1))
    assert_close(torch.cat(results, 1), whole)
    assert state.num_tokens == 24


def test_the_state_does_not_grow(lively_layer):
    layer = lively_layer()
    _, state = prefill(layer, torch.randn(2, 30, 8, dtype=torch.float64))
    _, later = step(layer, torch.randn(2, 8, dtype=torch.float64), state)
    assert [t.shape for t in later[:4]] == [t.shape for t in state[:4]]
    assert state.keys.shape == (2, layer.unit.window, 4)


def test_layers_without_a_recurrent_form_are_refused(lively_layer):
    for options in ({"causal": False}, {"truncation": 4}):
        with pytest.raises(ValueError, match="has no recurrent form"):
            prefill(lively_layer(**options), torch.zeros(1, 3, 8, dtype=torch.float64))


@pytest.mark.fault("core A14")
@pytest.mark.parametrize("num_prompt", [0, 5])
def test_padding_is_ignored_token_by_token_too(num_prompt, lively_layer):
    layer = lively_layer()
    padding = torch.zeros(3, 12, dtype=torch.bool)
    padding[0, :4] = padding[1, 8:] = True
    x = torch.randn(3, 12, 8, dtype=torch.float64).masked_fill(padding[..., None], torch.nan)
    with torch.no_grad():
        y, state = prefill(layer, x[:, :num_prompt], padding_mask=padding[:, :num_prompt])
        results = [y]
        for token in range(num_prompt, 12):
            y, state = step(layer, x[:, token], state, padding_mask=padding[:, token])
            results.append(y.unsqueeze(1))
        found = torch.cat(results, 1)
        assert_close((found, found[:1, 4:]), (layer(x, padding_mask=padding), layer(x[:1, 4:])))
        assert not found[padding].any()
