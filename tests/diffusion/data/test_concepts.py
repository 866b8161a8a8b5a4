from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from diffusion.data.concepts import (
    SUBJECTS,
    Combination,
    base_rows,
    caption_of,
    concepts,
    held_out_pairs,
    rows_of,
    style,
    subject,
    training_pairs,
    with_second_style,
)
from diffusion.data.drawings import Drawings


@pytest.fixture(scope="module")
def drawings():
    return Drawings.load()


def test_the_base_sees_no_subject(drawings):
    rows = base_rows(drawings)
    assert len(rows) >= 1300
    assert not set(drawings.subgroups[rows]) & set(SUBJECTS)


def test_there_are_forty_concepts():
    assert Counter(one.kind for one in concepts()) == {"subject": 16, "style": 24}
    assert len({one.name for one in concepts()}) == 40


def test_parts_share_no_drawing_and_miss_none(drawings):
    for concept in concepts():
        parts = [set(rows_of(drawings, concept, part)) for part in ("adapter", "gate", "test")]
        assert all(not a & b for a, b in combinations(parts, 2))
        assert min(map(len, parts)) >= 2
        assert len(parts[0]) >= 2.5 * len(parts[2])
    birds = np.flatnonzero((drawings.subgroups == "animal-bird") & drawings.whole)
    own = [rows_of(drawings, subject("animal-bird"), p) for p in ("adapter", "gate", "test")]
    assert sorted(np.concatenate(own)) == birds.tolist()


def test_no_style_adapter_sees_a_drawing_of_a_subject(drawings):
    seen = set(rows_of(drawings, style("noto"), "adapter"))
    for name in SUBJECTS:
        for part in ("gate", "test"):
            assert not seen & set(rows_of(drawings, subject(name), part))


def test_captions_name_the_styles():
    assert caption_of("grapes") == "grapes"
    assert caption_of("grapes", ("noto", "inverted")) == "grapes, Noto style, inverted colors"


def test_pairs_for_tests_are_never_trained_on():
    tested, trained = held_out_pairs(), training_pairs()
    assert (len(set(tested)), len(set(trained))) == (48, 336)
    assert not set(tested) & set(trained)
    for pairs, place in ((tested, 0), (tested, 1)):
        counts = Counter(one.adapters[place] for one in pairs)
        assert set(counts.values()) == ({3} if place == 0 else {2})
    for adapter in {name for one in tested for name in one.adapters}:
        assert any(adapter in one.adapters for one in trained)


def test_second_styles_differ_from_the_first():
    for shift in range(10):
        for one in with_second_style([*held_out_pairs(), *training_pairs()], shift):
            assert one.styles[0] != one.styles[1]
    three = with_second_style([Combination("drink", ("noto",))])[0]
    assert three.adapters == ("drink", "noto", three.styles[1])
    assert three.name == f"drink + noto + {three.styles[1]}"
