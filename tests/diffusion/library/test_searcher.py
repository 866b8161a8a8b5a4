"""Ranking by exact products, and searches by prompts."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_gates.errors import GatesError
from diffusion.library import LibraryError, LoraLibrary
from diffusion.library.prompts import UNRELATED
from diffusion.library.searcher import best, dots, exact_dots


def ranked(matrix, query, k):
    found, scores = best(dots(matrix, query), k, lambda rows: exact_dots(matrix, rows, query))
    expected = matrix.astype(np.float64) @ query.astype(np.float64)
    return found, scores, np.lexsort((np.arange(len(matrix)), -expected))[:k], expected


@given(st.integers(0, 300), st.integers(1, 40), st.integers(1, 12), st.integers(0, 99))
def test_exact_order(rows, dim, k, seed):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(rows, dim)).astype(np.float32)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    query = rng.normal(size=dim).astype(np.float32)
    query /= np.linalg.norm(query)
    found, scores, order, expected = ranked(matrix, query, k)
    np.testing.assert_allclose(scores, expected[order], atol=1e-12)
    np.testing.assert_array_equal(found, order)


@pytest.mark.parametrize("rows", [1 << 14, (1 << 15) + 7])
def test_blocks_and_scores_that_differ_by_less_than_float32_can_tell(rows):
    matrix = np.random.default_rng(0).normal(size=(rows, 32)).astype(np.float32)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    query = matrix[5].copy()
    copies = [3, 5, 1000, rows - 1]
    matrix[copies] = query
    matrix[7] = query
    matrix[7, 0] = np.nextafter(query[0], np.float32(2 * np.sign(query[0])))
    found, _, order, _ = ranked(matrix, query, 6)
    np.testing.assert_array_equal(found, order)
    assert found[:5].tolist() == [7, *copies]


def test_rows_that_are_not_in_use_may_hold_anything():
    matrix = np.full((3, 4), np.nan, np.float32)
    matrix[1] = np.inf
    matrix[2] = 0.5
    assert dots(matrix, np.full(4, 0.5, np.float32))[2] == 1


TITLES = ("red fox", "blue heart", "a fox and a heart", "", "night sky")


@pytest.fixture
def filled(library, root, put):
    for seed, title in enumerate(TITLES):
        told = {"modelspec.title": title, "modelspec.license": ("CC0-1.0", "MIT")[seed % 2]}
        told["modelspec.tags"] = ("animal, Style", "sky", "")[seed % 3]
        put(root / f"{seed}.safetensors", seed, told)
    library.scan()
    return library


def cosines(library, prompt):
    """By name, from the definition."""
    query = library.text_encoder.embed([prompt])[0].double()
    names = [adapter.name for adapter in library.adapters()]
    vectors = {name: library.encoder.encode(library.load(name)).double() for name in names}
    return {name: float(vector @ query) for name, vector in vectors.items()}


def test_weights(filled):
    for prompt in ("a red fox", "x", "fox OR heart"):
        expected = cosines(filled, prompt)
        found = filled.search(prompt, 5, "weights")
        assert (found.mode, found.notice) == ("weights", "")
        assert [m.name for m in found] == sorted(expected, key=expected.get, reverse=True)
        for match in found:
            assert match.score == match.weights == pytest.approx(expected[match.name], abs=1e-6)
            assert match.metadata is None
        assert [m.name for m in filled.search(prompt, 2, "weights")] == [m.name for m in found[:2]]
        assert len(filled.search(prompt, 100)) == 5


@pytest.fixture
def called(library, root, put):
    """Adapters of these titles and triggers, of which those with a dash have a file name alone."""
    for name, title, trigger in (
        ("fox-v2", "Red_Fox", ""),
        ("a", "The Style of an Image", "demo style"),
        ("cup", "", ""),
        ("b", "heart", "big heart, sks, chess"),
    ):
        told = {"modelspec.title": title, "modelspec.trigger_phrase": trigger}
        put(root / f"{name}.safetensors", len(name) + ord(name[0]), told)
    library.scan()
    library.least = 0.999
    library.close()
    return library


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("two red foxes", {}),
        ("a RED fox, in snow", {"fox-v2": "Red_Fox"}),
        ("red and blue, a fox", {}),
        ("the fox v2", {"fox-v2": "fox-v2"}),
        ("three cups", {"cup": "cup"}),
        ("a cupboard", {}),
        ("a cup in demo style", {"cup": "cup", "a": "demo style"}),
        ("sks", {"b": "sks"}),
        ("a game of chess", {"b": "chess"}),
        ("the style of an image", {}),
        ("The invoice is due at the end of the month.", {}),
        ('cup" OR title:heart', {"cup": "cup", "b": "heart"}),
    ],
)
def test_what_a_prompt_names_is_found_whatever_its_cosine(called, prompt, expected):
    found = called.search(prompt, 9)
    assert (found.mode, {m.name: m.named for m in found}) == ("names", expected)
    assert {*expected, *found.left_out} == {"fox-v2", "a", "cup", "b"}
    scores = cosines(called, prompt)
    for match in found:
        assert match.score == match.weights == pytest.approx(scores[match.name], abs=1e-6)
        assert match.metadata is None
    assert len(called.search(prompt, 9, "weights")) == 0


def test_what_is_named_comes_before_what_is_closer(called):
    called.least = -1
    called.close()
    order = sorted(found := cosines(called, "a cup"), key=found.get, reverse=True)
    order.remove("cup")
    assert [m.name for m in called.search("a cup", 9)] == ["cup", *order]
    assert [m.name for m in called.search("a cup", 1)] == ["cup"]
    assert called.search("a cup", 1).notice == ""


def test_what_is_named_beyond_the_number_that_is_asked_for_is_told(called):
    first = called.search("a cup, sks, demo style", 1)
    named = {"cup": "cup", "b": "sks", "a": "demo style"}
    others = sorted(called for name, called in named.items() if name != first[0].name)
    assert first.notice == f"the prompt names {', '.join(others)}, too: --k 3 considers all"
    assert {m.named for m in called.search("a cup, sks, demo style", 3)} == {*named.values()}
    assert called.search("a cup, sks, demo style", 3).notice == ""


def test_metadata(filled):
    found = filled.search("fox", 5, "metadata")
    assert [m.name for m in found] == ["0", "2"]  # the shorter title first
    assert [m.score for m in found] == [m.metadata for m in found] == [1, 1]
    assert found[0].weights is None
    assert [m.name for m in filled.search("foxes", 5, "metadata")] == ["0", "2"]
    assert filled.search("SKY", 5, "metadata")[0].name == "4"
    nothing = filled.search("submarine", 5, "metadata")
    assert (len(nothing), nothing.notice) == (0, "no metadata holds a word of the prompt")


@pytest.mark.fault("diffusion D4")
def test_metadata_score_is_the_fraction_of_the_words_that_are_found(filled):
    for prompt, scores in (
        ("a red fox", {"0": 1, "2": 0.5}),
        ("A submarine and the red foxes", {"0": 2 / 3, "2": 1 / 3}),
        ("the red red heart", {"0": 0.5, "1": 0.5, "2": 0.5}),
        ("a and the", {}),
        ("a submarine in demo style", {}),
    ):
        found = filled.search(prompt, 5, "metadata")
        assert {m.name: m.score for m in found} == pytest.approx(scores)
    (first, *_) = filled.search("fox night", 5, "metadata")
    assert first.name == "4"  # the rarer word of two decides between equal fractions


@pytest.mark.fault("diffusion D3")
@pytest.mark.fault("46 D1")
def test_names_come_first_without_an_encoder_too(root, put):
    put(root / "fox.safetensors", 1, {"modelspec.title": "demo"})
    put(root / "b.safetensors", 2, {"modelspec.title": "b", "modelspec.tags": "fox, red, snow"})
    with LoraLibrary(root) as plain:
        plain.scan()
        found = plain.search("a red fox in snow")
    assert [(one.name, one.named) for one in found] == [("fox", "fox"), ("b", "")]


def test_adapters_below_the_least_score_are_left_out(filled, root, encoders):
    expected = cosines(filled, "a red fox")
    order = sorted(expected, key=expected.get, reverse=True)
    least = (expected[order[1]] + expected[order[2]]) / 2
    with LoraLibrary(root, encoders.Probes(), encoders.Words(), least=least) as library:
        found = library.search("a red fox", 4, "weights")
        assert [m.name for m in found] == order[:2]
        assert found.left_out == pytest.approx({n: expected[n] for n in order[2:4]}, abs=1e-6)
        assert found.least == least
        hybrid = library.search("a red fox", 5, "hybrid", metadata=0.01)
        assert {m.name for m in hybrid} == {*order[:2], "0", "2"}  # words are a reason, too
        assert set(hybrid.left_out) == set(order) - {m.name for m in hybrid}
        assert len(library.search("a red fox", 4, "metadata")) == 2
        whole = library.search("a red fox", 4, "weights", whole=True)
        assert ([m.name for m in whole], whole.left_out) == (order[:4], {})
    with LoraLibrary(root, encoders.Probes(), encoders.Words(), least=0.9999) as library:
        none = library.search("a red fox", 4, "weights", whole=True)
        assert (len(none), len(none.left_out)) == (0, 4)


def test_a_name_in_the_prompt_leaves_out_what_is_low_for_a_gate_too(called):
    found = called.search("a red fox", 4, whole=True)
    assert [one.named for one in found] == ["Red_Fox"]
    assert len(found.left_out) == 3


def test_adapters_are_compared_by_their_embeddings(filled, root):
    names = [adapter.name for adapter in filled.adapters()]
    similarities, encoder = filled.similarities(names[:3])
    vectors = np.stack([filled.encoder.encode(filled.load(name)) for name in names[:3]])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert similarities == pytest.approx(vectors @ vectors.T, abs=1e-6)
    assert encoder == filled.encoder.fingerprint
    with LoraLibrary(root) as library, pytest.raises(LibraryError, match="no encoder is given: "):
        library.similarities(names[:3])


@pytest.mark.fault("diffusion D3")
def test_the_least_score_is_what_unrelated_prompts_do_not_reach(filled, root, put, encoders):
    with LoraLibrary(root, encoders.Probes(), encoders.Words()) as library:
        for _ in range(2):
            scores = np.array([list(cosines(filled, text).values()) for text in UNRELATED])
            found = library.search("a red fox", 9, "weights")
            assert found.least == pytest.approx(np.quantile(scores.max(1), 0.9), abs=1e-6)
            expected = cosines(filled, "a red fox")
            assert {m.name for m in found} == {n for n in expected if expected[n] >= found.least}
            assert set(found.left_out) == set(expected) - {m.name for m in found}
            put(root / "more.safetensors", 9)
            filled.scan()


def test_hybrid_weighs_both(filled):
    prompt = "red heart"
    by_weights = {m.name: m.score for m in filled.search(prompt, 9)}
    by_words = {m.name: m.score for m in filled.search(prompt, 9, "metadata")}
    assert set(by_words) == {"0", "1", "2"}
    for a, b in ((1, 0), (0, 1), (1, 1), (0.3, -2.5), (-1, 0.5)):
        found = filled.search(prompt, 9, "hybrid", weights=a, metadata=b)
        expected = {n: a * by_weights[n] + b * by_words.get(n, 0) for n in by_weights}
        ties_to_first = sorted(expected, key=lambda name: (-expected[name], name))
        assert [m.name for m in found] == ties_to_first
        for match in found:
            assert match.score == pytest.approx(expected[match.name], abs=1e-6)
            assert match.weights == pytest.approx(by_weights[match.name])
            assert match.metadata == pytest.approx(by_words.get(match.name, 0))
    free = filled.search(prompt, 9, "hybrid")
    assert [m.name for m in free] == [m.name for m in filled.search(prompt, 9)]


def test_hybrid_reaches_other_families_by_their_metadata(filled, root, put_sdxl):
    put_sdxl(root / "x.safetensors", {"modelspec.title": "red heart"})
    filled.scan()
    found = filled.search("red heart", 9, "hybrid", metadata=5)
    assert found[0].name == "x"
    assert ((found[0].weights, found[0].metadata, found[0].score), len(found)) == ((None, 1, 5), 6)
    assert (
        found.notice
        == "1 of 6 adapters have no embedding of this encoder, which serves flux (1 sdxl)"
    )
    assert "x" not in {m.name for m in filled.search("red heart", 9, "hybrid")}
    assert "x" not in {m.name for m in filled.search("red heart", 9, "weights")}
    named = filled.search("red heart", 9)  # by names, too, without a cosine
    assert {m.name: (m.weights, m.score) for m in named if m.weights is None} == {"x": (None, 1)}


@pytest.mark.parametrize("mode", ["weights", "metadata", "hybrid"])
def test_filters(mode, filled, root, put_sdxl):
    put_sdxl(root / "x.safetensors", {"modelspec.title": "fox", "modelspec.license": "mit"})
    filled.scan()

    mix = {"metadata": 1} if mode == "hybrid" else {}

    def names(**options):
        return {m.name for m in filled.search("fox heart sky", 9, mode, **mix, **options)}

    everything = names()
    assert names(family="FLUX") == everything - {"x"}
    assert names(license="cc0-1.0") == everything & {"0", "2", "4"}
    assert names(license="MIT") == everything & {"1", "3", "x"}
    assert names(tag="STYLE ") == everything & {"0", "3"}
    assert names(tag="animal", license="MIT") == everything & {"3"}
    assert names(tag="' OR 1 --") == names(family="%") == names(license="") == set()
    assert filled.search("fox", 3, mode, tag="none").notice


def test_what_an_encoder_does_not_serve_is_searched_by_metadata(root, put, put_sdxl, encoders):
    put_sdxl(root / "a.safetensors", {"modelspec.title": "fox"})
    put_sdxl(root / "b.safetensors", {"modelspec.title": "heart"}, seed=1)
    for probes in (encoders.Probes(), None):
        with LoraLibrary(root, probes, encoders.Words()) as library:
            library.scan()
            for mode in ("weights", "hybrid"):
                found = library.search("fox", 5, mode)
                assert (found.mode, [m.name for m in found]) == ("metadata", ["a"])
                why = "serves flux (2 sdxl)" if probes else "no encoder is given"
                assert f"{why}: only metadata is searched" in found.notice
    with LoraLibrary(root, encoders.Probes()) as library:
        assert "no encoder" in library.search("fox").notice


def test_flagged_adapters_are_found_by_metadata_alone(library, root, put, put_sdxl):
    put(root / "zero.safetensors", 1, {"modelspec.title": "fox"}, alpha=False)
    raw = bytearray((root / "zero.safetensors").read_bytes())
    length = int.from_bytes(raw[:8], "little")
    (root / "zero.safetensors").write_bytes(raw[: 8 + length] + bytes(len(raw) - 8 - length))
    put(root / "good.safetensors", 2)
    library.scan()
    assert [m.name for m in library.search("fox", 9)] == ["good"]
    assert [m.name for m in library.search("fox", 9, "hybrid", metadata=9)] == ["good"]
    (match,) = library.search("fox", 9, "metadata")
    assert (match.name, match.adapter.flags) == ("zero", ("zero",))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": " \n"}, "prompt is empty"),
        ({"k": 0}, "k is 0"),
        ({"k": -3}, "k is -3"),
        ({"mode": "magic"}, "mode is 'magic'; choose one of names, weights, metadata, hybrid"),
        ({"mode": "hybrid", "weights": math.nan}, "expected finite"),
        ({"mode": "hybrid", "metadata": math.inf}, "expected finite"),
        ({"metadata": 2.0}, "change nothing in --mode names"),
        ({"mode": "weights", "weights": 2.0}, "change nothing in --mode weights"),
    ],
)
def test_wrong_arguments(arguments, words, filled, one_line):
    for least in (1.5, math.nan):
        message = one_line(LibraryError, LoraLibrary, ".", filled.encoder, least=least)
        assert "expected a cosine from -1 to 1" in message
    assert "where an encoder is given" in one_line(LibraryError, LoraLibrary, ".", least=0.1)
    assert words in one_line(LibraryError, filled.search, **{"prompt": "a fox"} | arguments)


def test_an_empty_library_and_a_text_encoder_of_another_space(
    library, root, put, encoders, one_line
):
    library.scan()
    assert "holds no adapter" in one_line(GatesError, library.search, "a fox")
    put(root / "a.safetensors", 1)
    library.scan()
    library.text_encoder.dim = 5
    assert "expected (16,)" in one_line(GatesError, library.search, "a fox")


@pytest.mark.parametrize(
    "prompt",
    [
        '"fox" OR title:heart',
        "fox AND NOT heart",
        "NEAR(fox heart, 5)",
        "fox*",
        '"; DROP TABLE adapter; --',
        "{title text} : fox",
        "^fox -heart +sky",
        "'\"`\x00\x1b[31m",
        "💥 " * 500 + "fox",
        " ".join(map(str, range(5_000))),
        "f_o_x",
        "\ud800 fox",
    ],
)
def test_nothing_in_a_prompt_is_an_operator(prompt, filled):
    before = len(filled.adapters())
    for mode in ("metadata", "hybrid"):
        found = filled.search(prompt, 9, mode)
        if "heart" in prompt and mode == "metadata":
            assert {m.name for m in found} >= {"1", "2"}  # not excluded by NOT or -
    assert len(filled.adapters()) == before


def test_another_process_may_write_while_one_searches(filled, root, encoders, monkeypatch):
    other = LoraLibrary(root, encoders.Probes(), encoders.Words())
    filled.search("fox")  # the map of rows is in memory now
    (root / "0.safetensors").unlink()
    calls = []
    search = type(filled._searcher)._search

    def interrupted(self, *args):
        if not calls:
            calls.append(other.scan())
        return search(self, *args)

    monkeypatch.setattr(type(filled._searcher), "_search", interrupted)
    assert "0" not in {m.name for m in filled.search("fox", 9)}
    other.close()
