from collections import Counter

from diffusion.data.concepts import (
    Combination,
    concepts,
    held_out_pairs,
    style,
    subject,
    training_pairs,
    with_second_style,
)
from diffusion.data.paraphrases import PARAPHRASES
from diffusion.data.scenes import scenes
from diffusion.data.shapes import BASE_SHAPES, SHAPES
from diffusion.data.styles import BASE_STYLES, NEW_FILLS, STYLES, WHOLE


def test_the_base_sees_no_concept():
    names = {one.name for one in concepts()}
    assert not names & {*BASE_SHAPES, *BASE_STYLES}
    for scene in scenes("adapter"):
        assert not names & {scene.shape, *scene.styles}


def test_there_are_forty_concepts():
    assert Counter(one.kind for one in concepts()) == {"subject": 16, "style": 24}
    assert len({one.name for one in concepts()}) == 40


def test_scenes_of_a_concept_show_it_alone():
    assert {one.shape for one in subject("fish").scenes("test")} == {"fish"}
    assert {one.styles[0] for one in subject("fish").scenes("test")} == set(BASE_STYLES)
    assert {one.styles for one in style("dotted").scenes("gate")} == {("dotted",)}
    assert {one.shape for one in style("dotted").scenes("gate")} == set(BASE_SHAPES)


def test_scenes_of_parts_differ():
    for concept in concepts():
        parts = [set(concept.scenes(part)) for part in ("adapter", "gate", "test")]
        assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]


def test_pairs_for_tests_are_never_trained_on():
    tested, trained = held_out_pairs(), training_pairs()
    assert (len(set(tested)), len(set(trained))) == (48, 336)
    assert not set(tested) & set(trained)
    for pairs, place in ((tested, 0), (tested, 1)):
        counts = Counter(one.adapters[place] for one in pairs)
        assert set(counts.values()) == ({3} if place == 0 else {2})
    for adapter in {name for one in tested for name in one.adapters}:
        assert any(adapter in one.adapters for one in trained)


def test_one_style_of_three_adapters_is_of_the_whole_image():
    for shift in range(10):
        for one in with_second_style([*held_out_pairs(), *training_pairs()], shift):
            first, second = one.styles
            assert first in NEW_FILLS
            assert second in WHOLE
    three = with_second_style([Combination("fish", ("sepia",))])[0]
    assert three.adapters == ("fish", three.styles[0], "sepia")
    assert three.name == f"fish + {three.styles[0]} + sepia"


def test_scenes_of_a_combination_show_all_of_it():
    found = Combination("boat", ("dotted", "sepia")).scenes("test")
    assert len(found) == 12
    assert {(one.shape, one.styles) for one in found} == {("boat", ("dotted", "sepia"))}


def test_paraphrases_do_not_name_what_they_describe():
    assert list(PARAPHRASES) == [one.name for one in concepts()]
    words = {*SHAPES, *STYLES}
    for name, texts in PARAPHRASES.items():
        assert len(set(texts)) == 3
        for text in texts:
            assert not words & set(text.replace(",", "").split()), (name, text)
