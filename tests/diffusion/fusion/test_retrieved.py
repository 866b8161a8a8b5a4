"""Sets of adapters that a search retrieves, opened by a gate on a model."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from core_gates.adapters import AdapterCapacity, RelevanceGate
from core_gates.errors import GatesError
from diffusion.fusion import GatedFusion
from diffusion.fusion.baking import bake
from diffusion.fusion.fusion_tasks import FusionDraws, FusionTask
from diffusion.fusion.retrieved import Retrieved, retrieve
from diffusion.lora_file import LoraFileError
from diffusion.models.text_encoders import TextStates

ENCODER = "0123456789abcdef"


@pytest.fixture
def vectors():
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(6, generator=draw) for name in "abcdefgh"}


@pytest.fixture
def text():
    return torch.randn(2, 6, generator=torch.Generator().manual_seed(1))


def test_the_best_are_retrieved_with_what_the_gate_is_told(vectors, text):
    found = retrieve(text, vectors, 3, encoder=ENCODER)
    cosine = nn.functional.cosine_similarity
    every = {name: cosine(text, vector[None]).mean() for name, vector in vectors.items()}
    assert list(found.names) == sorted(every, key=every.get, reverse=True)[:3]
    assert found.encoder == ENCODER
    for k, name in enumerate(found.names):
        assert_close(found.cosines[:, k], cosine(text, vectors[name][None]))
        for j, other in enumerate(found.names):
            close = cosine(vectors[name], vectors[other], dim=0)
            assert_close(found.similarities[k, j], close)
    assert_close(found.of(torch.tensor([1, 1])).cosines, found.cosines[[1, 1]])
    assert len(retrieve(text, {"a": vectors["a"]}, 8).names) == 1


def test_what_cannot_be_retrieved_is_refused_in_a_line(vectors, text, one_line):
    assert "expected 1 to 8" in one_line(GatesError, retrieve, text, vectors, 9)
    assert "expected 1 to 8" in one_line(GatesError, retrieve, text, vectors, 0)
    assert "no embeddings" in one_line(GatesError, retrieve, text, {}, 6)
    assert "one encoder" in one_line(GatesError, retrieve, text[:, :4], vectors, 6)


@pytest.fixture
def fused(model, bundle, vectors, text):
    """Three retrieved adapters of a model under a trained gate, and what was retrieved."""
    found = retrieve(text, vectors, 3, encoder=ENCODER)
    fusion = GatedFusion(
        model, {name: bundle(seed) for seed, name in enumerate(found.names)}, mode="relevance"
    )
    fusion.context = RelevanceGate(0.1, 0.2, 0.3, ENCODER)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return fusion, found


@torch.no_grad()
def test_each_caption_of_a_batch_has_its_own_openness(model, inputs, fused):
    fusion, found = fused
    plain = model(**inputs)[0]
    with fusion:
        together_closed = model(**inputs)[0]
        fusion.suit(found)
        together = model(**inputs)[0]
        for row in range(2):
            fusion.suit(found.of(torch.tensor([row])))
            alone = model(**{name: value[row : row + 1] for name, value in inputs.items()})[0]
            assert_close(together[row : row + 1], alone)
        fusion.suit(None)
        assert_close(model(**inputs)[0], together_closed)
    assert not torch.allclose(together, together_closed)
    assert torch.equal(model(**inputs)[0], plain)


@torch.no_grad()
def test_the_order_of_retrieved_adapters_changes_no_image(model, inputs, fused):
    fusion, found = fused
    order = torch.tensor([2, 0, 1])
    with fusion:
        fusion.suit(found)
        expected = model(**inputs)[0]
        names = [found.names[place] for place in order]
        fusion.set_adapters({name: fusion.adapters[name] for name in names})
        swapped = Retrieved(
            tuple(names), found.cosines[:, order], found.similarities[order][:, order], ENCODER
        )
        fusion.suit(swapped)
        assert_close(model(**inputs)[0], expected)


@torch.no_grad()
def test_gate_and_strengths_are_saved_and_loaded_together(model, inputs, fused, tmp_path):
    fusion, found = fused
    with fusion:
        fusion.suit(found)
        expected = model(**inputs)[0]
    path = fusion.save_gates(tmp_path / "gates.safetensors")
    loaded = GatedFusion(model, fusion.adapters, mode="relevance", gates=path)
    assert loaded.context.fingerprint == ENCODER
    with loaded:
        loaded.suit(found)
        assert_close(model(**inputs)[0], expected)


def test_a_gate_of_another_encoder_or_set_is_refused_in_a_line(model, fused, one_line, tmp_path):
    fusion, found = fused
    other = found._replace(encoder="f" * 16)
    assert "trained for the encoder 0123456789abcdef" in one_line(GatesError, fusion.suit, other)
    unknown = found._replace(encoder="")
    assert "found an unknown one" in one_line(GatesError, fusion.suit, unknown)
    fewer = found._replace(names=found.names[::-1])
    assert "in their order" in one_line(GatesError, fusion.suit, fewer)
    plain = GatedFusion(model, fusion.adapters, mode="strengths")
    assert "mode='relevance'" in one_line(GatesError, plain.suit, found)
    path = plain.save_gates(tmp_path / "strengths.safetensors")
    for mode, file in (
        ("relevance", path),
        ("gated", fusion.save_gates(tmp_path / "own.safetensors")),
    ):
        refusal = one_line(GatesError, GatedFusion, model, fusion.adapters, mode=mode, gates=file)
        assert f"not '{mode}': give that" in refusal
    assert "no mean gates" in one_line(GatesError, bake, fusion)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("width", -0.1, "width of its gate is not positive"), ("width", 0.0, "is not positive"),
     ("embedder", 300, "the name of its encoder is damaged")],
)  # fmt: skip
def test_a_damaged_gate_is_refused_in_a_line(model, fused, one_line, tmp_path, name, value, words):
    fusion, _ = fused
    fusion.context.get_buffer(name).fill_(value)
    path = fusion.save_gates(tmp_path / "gates.safetensors")
    made = partial(GatedFusion, model, fusion.adapters, mode="relevance", gates=path)
    assert words in one_line(LoraFileError, made)


def test_exchanged_adapters_are_a_sum_until_captions_are_told(model, inputs, fused, bundle):
    fusion, found = fused
    other = bundle(9)
    with torch.no_grad(), GatedFusion(model, {"x": other}, mode="sum"):
        expected = model(**inputs)[0]
    more = {str(seed): bundle(seed) for seed in range(4)}
    room = GatedFusion(
        model, fusion.adapters, mode="relevance", everywhere=True, capacity=AdapterCapacity(3, 2)
    )
    with torch.no_grad(), room:
        room.suit(found)
        before = model(**inputs)[0]
        with pytest.raises(GatesError, match="room for 3"):
            room.set_adapters(more)
        assert_close(model(**inputs)[0], before)
        room.set_adapters({"x": other})
        assert_close(model(**inputs)[0], expected)


def test_batches_bring_what_is_known_of_their_captions():
    draw = torch.Generator().manual_seed(3)
    latents, text = torch.randn(3, 1, 2, 2, generator=draw), torch.randn(3, 4, generator=draw)
    found = Retrieved(("a", "b"), torch.arange(6.0).view(3, 2), torch.eye(2))
    states = TextStates(text.unsqueeze(1), text)
    task = FusionTask(("a", "b"), latents, states, found=found)
    empty = TextStates(torch.zeros(1, 1, 4), torch.zeros(1, 4))
    batch = FusionDraws([task], empty, steps=1, batch_size=8, caption_dropout=0.0)[0]
    rows = [int((text == row).all(1).nonzero()) for row in batch.text.pooled]
    assert_close(batch.found.cosines, found.cosines[rows])
    assert batch.found.names == found.names
