"""What the metadata tell, damaged and hostile ones included."""

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion.lora_file.inspection import Description, describe


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
    assert len(tags) == 1_000
    assert next(iter(tags)) == "tag 4999"


@given(
    st.dictionaries(
        st.sampled_from(["modelspec.title", "ss_tag_frequency", "ss_trigger_words"]), st.text()
    )
)
def test_no_text_raises(metadata):
    told = describe(metadata)
    text = "".join((told.title, *told.triggers, *told.tags, *told.folders))
    assert not any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in text)
