from collections import Counter

from diffusion.data.concepts import (
    LEFT_OUT,
    Combination,
    concepts,
    held_out_pairs,
    style,
    subject,
    training_pairs,
    with_second_style,
    with_useless,
)
from diffusion.data.paraphrases import PARAPHRASES, in_other_words
from diffusion.data.scenes import Scene, scenes
from diffusion.data.shapes import BASE_SHAPES, SHAPES
from diffusion.data.styles import BASE_STYLES, NEW_FILLS, STYLES, WHOLE
from diffusion.experiments.trained_gates import combinations


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


def test_a_useless_adapter_shows_nothing_and_all_come():
    pairs = [*held_out_pairs(), *training_pairs()]
    found = with_useless(pairs)
    assert {one.useless[0] for one in found} == {one.name for one in concepts()}
    for pair, one in zip(pairs, found, strict=True):
        assert one.adapters == (*pair.adapters, *one.useless)
        assert one.useless[0] not in pair.adapters
        assert one._replace(useless=()) == pair
    assert found[5].scenes("test") == pairs[5].scenes("test")


def test_groups_of_combinations_share_no_test_and_no_left_out_concept():
    tested, train = set(combinations("test2")), set(combinations("train"))
    assert set(combinations("train_useless")) > train
    assert not {one._replace(useless=()) for one in combinations("train_useless")} & tested
    assert [one._replace(useless=()) for one in combinations("useless3")] == held_out_pairs()
    fewer, fresh = combinations("train_fewer"), combinations("new2")
    assert (len(fresh), len(set(LEFT_OUT))) == (24, 10)
    assert {name for one in fresh for name in one.adapters} == set(LEFT_OUT)
    assert not {name for one in fewer for name in one.adapters} & set(LEFT_OUT)
    assert {name for one in fewer for name in one.adapters} | set(LEFT_OUT) == {
        one.name for one in concepts()
    }


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


def test_captions_in_other_words_say_all_but_the_words_of_adapters():
    scene = Scene("tree", "pink", "black", "large", ("checkered", "sepia"))
    expected = "a pine, in a pattern of squares, in vintage tones, pink on black, large"
    assert in_other_words(scene, 1) == expected
    assert in_other_words(Scene("circle", "red", "blue")) == "circle, red on blue"
