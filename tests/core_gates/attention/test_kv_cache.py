import copy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from core_gates.attention import GatedAttention, KeyValueCache
from tests.core_gates.drawn import filled

DIM, T = 12, 9
EXACT = {torch.float32: {"rtol": 0, "atol": 1e-6}, torch.float64: {"rtol": 0, "atol": 1e-13}}
PADDING = torch.zeros(3, T, dtype=torch.bool)
PADDING[0, :3] = True
PADDING[1, :1] = PADDING[1, 7:] = True
OPTIONS = [
    {"position": "none"},
    {"position": "G1", "granularity": "headwise"},
    {"position": "G2", "qk_norm": True},
    {"position": "G3", "rope_theta": None},
    {"position": "G4", "num_kv_heads": 4},
    {"position": "G5", "qkv_bias": True},
]


def attention(**options):
    torch.manual_seed(0)
    module = GatedAttention(DIM, 4, **({"num_kv_heads": 2, "head_dim": 4} | options))
    return filled(module, scale=0.25)


def in_parts(module, x, sizes, padding):
    """Return the results of the parts of ``x``, each of which is added to one cache."""
    cache, results = KeyValueCache(), []
    parts = [None] * len(sizes) if padding is None else padding.split(sizes, 1)
    for part, mask in zip(x.split(sizes, 1), parts, strict=True):
        results.append(module(part, padding_mask=mask, cache=cache))
    assert len(cache) == x.shape[1]
    return torch.cat(results, 1)


@pytest.mark.fault("core A15")
@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("sizes", [[1] * T, [4, 1, 1, 3], [0, 9], [5, 0, 4]], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tokens_one_by_one_equal_the_whole(options, sizes, padding, dtype):
    module = attention(**options).to(dtype)
    x = torch.randn(3, T, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)
    if padding is not None:
        x[padding] = torch.nan
    with torch.no_grad():
        whole = module(x, padding_mask=padding)
        assert_close(in_parts(module, x, sizes, padding), whole, **EXACT[dtype])
    assert whole.isfinite().all()


@pytest.mark.fault("core A15")
def test_padding_of_the_prompt_alone():
    """Once the prompt is read, tokens need no mask; positions may be those without padding."""
    module = attention()
    x = torch.randn(3, T, DIM, generator=torch.Generator().manual_seed(1))
    mask = PADDING.clone()
    mask[:, 4:] = False
    places = (~mask).cumsum(-1) - 1
    with torch.no_grad():
        whole = module(x, padding_mask=mask, positions=places)
        cache = KeyValueCache()
        module(x[:, :4], padding_mask=mask[:, :4], positions=places[:, :4], cache=cache)
        rest = module(x[:, 4:], positions=places[:, 4:], cache=cache)
        assert_close(rest, whole[:, 4:], **EXACT[torch.float32])
        # and the first mask may come late
        late = KeyValueCache()
        module(x[2:, :4], cache=late)
        now = torch.tensor([[False, True, True, True, True]])
        module(x[2:, 4:], padding_mask=now, cache=late)
        assert late.padding_mask.tolist() == [[False] * 5 + [True] * 4]


def test_gradients_pass_through_the_cache():
    module = attention().double()
    x = torch.randn(3, T, DIM, dtype=torch.float64)
    (expected,) = torch.autograd.grad(module(x).square().sum(), module.k_proj.weight)
    result = in_parts(module, x, [3, 6], None)
    (found,) = torch.autograd.grad(result.square().sum(), module.k_proj.weight)
    assert_close(found, expected)


def test_a_cache_of_something_else_is_refused():
    module, cache = attention(), KeyValueCache()
    module(torch.zeros(3, 2, DIM), cache=cache)
    with pytest.raises(ValueError, match=r"holds .* \(3, 2, 4\), got tokens of \(2, 2, 4\)"):
        module(torch.zeros(2, 2, DIM), cache=cache)
    assert len(cache) == 2
    with pytest.raises(ValueError, match="a cache needs causal attention"):
        attention(causal=False)(torch.zeros(2, 2, DIM), cache=KeyValueCache())


@pytest.mark.parametrize(("length", "padded"), [(1, False), (3, False), (3, True)])
def test_query_heads_share_the_keys_of_the_cache(monkeypatch, length, padded):
    """The queries of one key head become its rows; keys stay where the cache has them."""
    module, cache, seen = attention(), KeyValueCache(), []
    x = torch.randn(2, 6 + length, DIM, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(2, 6 + length, dtype=torch.bool)
    mask[0, :2] = padded
    attend = F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        seen.append((q.shape[1:3], k.data_ptr(), v.data_ptr()))
        return attend(q, k, v, **options)

    with torch.no_grad():
        expected = module(x, padding_mask=mask)[:, 6:]
        module(x[:, :6], padding_mask=mask[:, :6] if padded else None, cache=cache)
        monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
        assert_close(module(x[:, 6:], cache=cache), expected, **EXACT[torch.float32])
    assert seen == [((2, 2 * length), cache.keys.data_ptr(), cache.values.data_ptr())]


def extend(cache, tokens):
    """Add tokens (T,) to a cache of one head of one feature; return what it holds."""
    added = torch.tensor(tokens, dtype=torch.float32).view(1, 1, -1, 1)
    keys, values, _ = cache.extend(added, -added)
    assert torch.equal(values, -keys)
    return keys.flatten().tolist()


def test_earlier_tokens_are_copied_only_where_memory_is_full():
    cache, places = KeyValueCache(), set()
    with torch.no_grad():
        for token in range(100):
            assert extend(cache, [token]) == list(range(token + 1))
            places.add(cache.keys.data_ptr())
    assert len(places) < 15


@torch.no_grad()
def test_continuations_of_one_cache_do_not_disturb_each_other():
    cache = KeyValueCache()
    for token in range(8):
        extend(cache, [token])
    branch, cut, swapped = copy.copy(cache), copy.copy(cache), copy.copy(cache)
    cut.keys, cut.values = cut.keys[:, :, :3], cut.values[:, :, :3]
    swapped.keys, swapped.values = swapped.keys + 10, swapped.values - 10
    assert (extend(cache, [8]), extend(branch, [-1])) == (list(range(9)), [*range(8), -1])
    assert (extend(cut, [-2]), extend(swapped, [18])) == ([0, 1, 2, -2], list(range(10, 19)))
    assert (extend(cache, [9]), extend(branch, [-3])) == (list(range(10)), [*range(8), -1, -3])


def test_what_was_generated_without_gradients_may_be_continued_with_them():
    cache = KeyValueCache()
    with torch.inference_mode():
        assert (extend(cache, [0, 1]), extend(cache, [2])) == ([0, 1], [0, 1, 2])
    with torch.no_grad():
        assert extend(cache, [3]) == [0, 1, 2, 3]
    weight = torch.ones(1, 1, 1, 1, requires_grad=True)
    keys, _, _ = cache.extend(4 * weight, weight)
    assert torch.autograd.grad(keys.square().sum(), weight)[0].item() == 32
