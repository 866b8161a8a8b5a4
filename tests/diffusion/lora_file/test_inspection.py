"""What a file holds: its blocks, its metadata, and all of it."""

import json
import math
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from diffusion.lora_file import ContainerError, Factors, FamilyError, LoraBundle, shrink_bundle
from diffusion.lora_file.inspection import (
    OUTSIDE,
    Description,
    block_of,
    describe,
    examine,
    relative_errors,
    sums_of_squares,
)


def test_blocks():
    names = [
        "x_embedder", "single_transformer_blocks.10.proj_out", "transformer_blocks.2.attn.to_q",
        "transformer_blocks.10.attn.to_q", "single_transformer_blocks.2.norm.linear", "proj_out",
        "transformer_blocks.2.attn.to_k",
    ]  # fmt: skip
    assert block_of(names[1]) == "single_transformer_blocks.10"
    sums = sums_of_squares({name: float(n) for n, name in enumerate(names)})
    assert list(sums) == [
        "transformer_blocks.2", "transformer_blocks.10", "single_transformer_blocks.2",
        "single_transformer_blocks.10", OUTSIDE,
    ]  # fmt: skip
    assert (sums["transformer_blocks.2"], sums[OUTSIDE]) == (pytest.approx(math.hypot(2, 6)), 5)


def test_errors_of_blocks_are_those_of_their_weights():
    generator = torch.Generator().manual_seed(0)
    modules = {
        f"transformer_blocks.{block}.attn.to_{one}": Factors(
            torch.randn(4, 16, generator=generator) * (block + 1) ** 2,
            torch.randn(16, 4, generator=generator),
        )
        for block in range(2)
        for one in "qk"
    }
    bundle = LoraBundle("flux", modules)
    small, errors = shrink_bundle(bundle, rank=2)
    found = relative_errors(errors, bundle.norms())
    for block in range(2):
        own = [name for name in modules if name.startswith(f"transformer_blocks.{block}.")]
        one = torch.stack([bundle.delta_weight(name) for name in own])
        two = torch.stack([small.delta_weight(name) for name in own])
        exact = float((one - two).norm() / one.norm())
        assert found[f"transformer_blocks.{block}"] == pytest.approx(exact, rel=1e-4)


def test_nothing_is_lost_of_nothing():
    assert relative_errors({"proj_out": 0.0}, {"proj_out": 0.0}) == {OUTSIDE: 0.0}


def test_keys_of_modelspec_and_of_trainers():
    frequencies = {"10_sks dog": {" sks dog": 9, "lawn": 4}, "5_sks dog": {"lawn ": 7}, "reg": {}}
    told = describe(
        {
            "modelspec.title": "Dog",
            "ss_output_name": "dog-v2",
            "modelspec.trigger_phrase": "sks dog, a photo",
            "trigger_word": "sks dog",
            "modelspec.tags": "lawn, animal",
            "ss_tag_frequency": json.dumps(frequencies),
            "modelspec.license": "CC0-1.0",
            "ss_base_model_version": "flux1",
            "ss_training_comment": "None",
            "modelspec.description": "A dog.",
            "modelspec.author": "me",
        }
    )
    assert told == Description(
        "Dog",
        ("sks dog", "a photo"),
        {"lawn": 11, "sks dog": 9, "animal": 0},
        ("sks dog",),
        "CC0-1.0",
        "flux1",
        "A dog.",
        "me",
    )
    assert list(told.tags) == ["lawn", "sks dog", "animal"]


def test_names_of_trainers_stand_in():
    assert describe({"ss_output_name": "dog-v2"}).title == "dog-v2"
    assert describe({"modelspec.title": " ", "ss_output_name": "None"}).title == ""
    assert describe({"ss_trigger_words": '["a, b", "c"]'}).triggers == ("a, b", "c")
    assert describe({"ss_trigger_words": "[broken"}).triggers == ("[broken",)
    assert describe({}) == Description()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '"a"', '{"a": 1}', '{"a": {"b": "c"}}', '{"a": {"b": -1}}',
     '{"a": {"b": true}}', '{"a": {"b": 1e999}}', "[" * 100_000],
    ids=range(11),
)  # fmt: skip
def test_damaged_frequencies_are_passed_over(text):
    assert describe({"ss_tag_frequency": text}).tags == {}


def test_texts_are_short_and_in_one_line():
    told = describe({"modelspec.title": "a\nb\x1b[31m" + "c" * 10_000})
    assert told.title.startswith("a b[31mccc")
    assert len(told.title) == 400
    many = json.dumps({"x": {f"tag {n}": n + 1 for n in range(5_000)}})
    tags = describe({"ss_tag_frequency": many}).tags
    assert (len(tags), next(iter(tags))) == (1_000, "tag 4999")


@given(
    st.dictionaries(
        st.sampled_from(["modelspec.title", "ss_tag_frequency", "ss_trigger_words"]), st.text()
    )
)
def test_no_text_raises(metadata):
    told = describe(metadata)
    text = "".join((told.title, *told.triggers, *told.tags, *told.folders))
    assert not any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in text)


FORMATS = Path(__file__).parents[2] / "golden" / "autolora" / "formats"


def test_plain_values_have_everything():
    found = examine(FORMATS / "kohya_flux_full.safetensors")
    state = json.loads(json.dumps(found.state(), allow_nan=False))
    assert (state["file"], state["family"]) == ("kohya_flux_full.safetensors", "flux")
    assert (state["tensors"], state["title"]) == (56, "demo_style")
    assert (state["auto_v2"], len(state["auto_v3"])) == (state["sha256"][:10], 12)
    assert set(state["layers"]["proj_out"]) == {
        "rank", "in_features", "out_features", "scale", "norm", "dora"
    }  # fmt: skip
    assert [loader["effect"] for loader in state["loaders"]] == ["part"]


def test_a_hash_that_is_right_is_not_odd(tmp_path):
    tensors = {
        f"transformer.transformer_blocks.0.attn.to_q.lora_{x}.weight": torch.ones(4, 4)
        for x in "AB"
    }
    save_file(tensors, tmp_path / "a.safetensors", {"modelspec.title": "x"})
    found = examine(tmp_path / "a.safetensors")
    stated = {"sshs_model_hash": found.tensors_sha256.upper()}
    save_file(tensors, tmp_path / "b.safetensors", stated)
    again = examine(tmp_path / "b.safetensors")
    assert again.auto_v3 == found.auto_v3
    assert again.auto_v2 != found.auto_v2
    assert not any("changed after" in odd for odd in again.odd)
    save_file(tensors, tmp_path / "b.safetensors", {"sshs_model_hash": "ab" * 32})
    assert any("changed after" in odd for odd in examine(tmp_path / "b.safetensors").odd)


def test_other_families_are_recognized(tmp_path):
    tensors = {f"blocks.0.self_attn.q.lora_{end}.weight": torch.ones(4, 4) for end in "AB"}
    save_file(tensors, tmp_path / "a.safetensors", {"modelspec.license": "MIT"})
    found = examine(tmp_path / "a.safetensors")
    assert (found.family, [*found.layers]) == ("wan", ["blocks.0.self_attn.q"])
    assert found.description.license == "MIT"
    with pytest.raises(FamilyError, match="is an adapter for wan"):
        examine(tmp_path / "a.safetensors", "flux")


def test_unsafe_files_are_refused(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"PK\x03\x04" * 10)
    with pytest.raises(ContainerError, match="pickle"):
        examine(tmp_path / "a.safetensors")


@pytest.mark.fault("46 D3")
@pytest.mark.parametrize(
    ("metadata", "triggers"),
    [
        ({"10_dogs": {"a dog": 3, " sks dog ": 9, "grass": 9}, "2_more": {"sks dog": 4}},
         ("sks dog",)),
        ({"10_dogs": {"a dog in the grass": 1, "a dog on a sofa": 1}}, ()),
    ],
)  # fmt: skip
def test_the_trigger_of_a_kohya_file_is_its_most_frequent_tag(metadata, triggers):
    told = {"ss_tag_frequency": json.dumps(metadata)}
    assert describe(told).triggers == triggers
    assert describe(told | {"modelspec.trigger_phrase": "stated"}).triggers == ("stated",)
