"""A cache that changes nothing is that of transformers; one that drops tokens hides them."""

import copy

import pytest
import torch

from language.scbench.policies.base import cache_argument
from language.scbench.policies.registry import policy_of

GREEDY = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}


def answers(model, tokens, policy=None, **options):
    """Return the logits of six tokens that a model generates."""
    if policy is not None:
        model = copy.deepcopy(model)
        options[cache_argument(model)] = policy.make_cache(model)
    return torch.stack(model.generate(tokens, max_new_tokens=6, **GREEDY, **options).logits)


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize(("name", "options"), [("full", {}), ("streaming", {"keep": 1})])
def test_everything_kept_is_plain_transformers_to_the_bit(name, options, padding, tiny, tokens):
    model, mask = tiny(), torch.ones_like(tokens)
    mask[0, :padding] = 0
    plain = answers(model, tokens, attention_mask=mask)
    own = answers(model, tokens, policy_of(name, **options), attention_mask=mask)
    assert torch.equal(own, plain)
