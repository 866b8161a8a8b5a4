import pytest

from apps.diffusion.works.zoo import with_trigger


@pytest.mark.parametrize(
    ("caption", "trigger", "expected"),
    [
        ("a catalog", "cat", "cat, a catalog"),
        ("a Cat.", "cat", "a Cat."),
        ("", "cat", "cat"),
        ("a dog", "", "a dog"),
        ("in c++ style", "c++", "in c++ style"),
    ],
)
def test_a_trigger_is_words_not_letters(caption, trigger, expected):
    assert with_trigger(caption, trigger) == expected
