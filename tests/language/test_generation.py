"""Generation: caches and ragged batches change nothing, sampling, stop strings, characters."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from core_gates.attention.head_gate import KeyValueCache
from core_gates.errors import GatesError
from language.decoder import Decoder
from language.generation import Chunk, draw, generate, next_probabilities

CONTEXT, VOCABULARY, END = 24, 257, 256
PROMPTS = [[END], [END, 7, 7, 7, 200, 3, 9], [65, 66], [1] * 7, [END, *range(12)]]


class Recorded(Decoder):
    """Keeps the logits of each call, with caches and without."""

    def forward(self, tokens, **options):
        logits = super().forward(tokens, **options)
        self.__dict__.setdefault("kept", []).append(logits[:, -1])
        return logits


@pytest.fixture(scope="module", params=["heads", "grouped heads"])
def decoder(request):
    torch.manual_seed(6)
    heads = (4, 2) if request.param == "grouped heads" else (2, 2)
    options = {"hidden_dim": 32, "context": CONTEXT, "qk_norm": True, "dtype": torch.float64}
    model = Recorded(VOCABULARY, 16, 2, *heads, **options)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5)
    return model


class Script(nn.Module):
    """Gives a prompt that begins with row r the tokens of ``rows[r]``, with certainty."""

    def __init__(self, *rows, context=100):
        super().__init__()
        self.rows, self.context, self.vocab_size = rows, context, VOCABULARY
        self.weight = nn.Parameter(torch.zeros(()))
        self.calls = 0

    def caches(self):
        self.which, self.step = None, 0
        return [KeyValueCache()]

    def forward(self, tokens, *, padding_mask, caches, last):
        assert last
        assert not torch.is_grad_enabled()
        if self.which is None:
            self.which = tokens[:, -1].tolist()
        following = [[*self.rows[row], *[0] * 99][self.step] for row in self.which]
        self.step += 1
        self.calls += 1
        return 99.0 * nn.functional.one_hot(torch.tensor(following), VOCABULARY)[:, None]


def decode(tokens):
    return bytes(token for token in tokens if token != END)


def run(model, prompts, **options):
    """The text, tokens and reason of each prompt, and all chunks."""
    options = {"max_tokens": 12, "end": END, "decode": decode} | options
    chunks = [*generate(model, prompts, **options)]
    found = []
    for number in range(len(prompts)):
        own = [chunk for chunk in chunks if chunk.prompt == number]
        assert [chunk.reason is None for chunk in own] == [True] * (len(own) - 1) + [False]
        assert all(chunk.text for chunk in own[:-1])
        tokens = [token for chunk in own for token in chunk.tokens]
        found.append(("".join(chunk.text for chunk in own), tokens, own[-1].reason))
    return found, chunks


def said(*texts, **options):
    """The texts of scripts, with temperature 0."""
    scripts = [text.encode() if isinstance(text, str) else text for text in texts]
    prompts = [[n] for n in range(len(texts))]
    options = {"temperature": 0, "max_tokens": len(scripts[0])} | options
    return run(Script(*scripts), prompts, **options)


def uncached(model, prompt, count):
    """Greedy tokens and their logits, the whole text computed at every step."""
    tokens, logits = [*prompt], []
    for _ in range(count):
        with torch.no_grad():
            logits.append(Decoder.forward(model, torch.tensor([tokens]))[0, -1])
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :], logits


@pytest.mark.parametrize("prompts", [PROMPTS, *([prompt] for prompt in PROMPTS)])
def test_cached_is_uncached_and_a_ragged_batch_its_prompts_one_by_one(decoder, prompts):
    decoder.kept = []
    found, _ = run(decoder, prompts, temperature=0, end=None)
    for number, prompt in enumerate(prompts):
        expected, logits = uncached(decoder, prompt, 12)
        assert found[number][1] == expected
        assert len(set(expected)) > 3
        for ours, theirs in zip(decoder.kept, logits, strict=True):
            torch.testing.assert_close(ours[number], theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"top_k": 9}, {"top_p": 0.6}, {"temperature": 3.0}])
def test_a_seed_gives_the_same_text_whatever_else_is_in_the_batch(decoder, options):
    together, _ = run(decoder, PROMPTS, seed=3, **options)
    assert together == run(decoder, PROMPTS, seed=3, **options)[0]
    assert together[::-1] == run(decoder, PROMPTS[::-1], seed=3, **options)[0]
    assert together == [run(decoder, [prompt], seed=3, **options)[0][0] for prompt in PROMPTS]
    others = run(decoder, PROMPTS, seed=4, **options)[0]
    assert all(one != other for one, other in zip(together, others, strict=True))


def test_evaluation_mode_and_no_gradient_mode_leaves_the_generator(decoder):
    decoder.train()
    for _ in generate(decoder, PROMPTS, decode=decode, max_tokens=3, end=None):
        assert not decoder.training
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("length", [CONTEXT, CONTEXT - 3])
def test_generation_ends_with_the_context(decoder, length):
    prompts = [[1] * length, [2] * 4]
    found, _ = run(decoder, prompts, temperature=0, end=None, max_tokens=100)
    assert [reason for _, _, reason in found] == ["context", "context"]
    assert [len(tokens) for _, tokens, _ in found] == [CONTEXT - length + 1, CONTEXT - 3]
    assert found[0][1] == uncached(decoder, prompts[0], CONTEXT - length + 1)[0]
    assert found[1][1] == uncached(decoder, prompts[1], CONTEXT - 3)[0]


def test_texts_end_for_their_own_reasons():
    script = Script(b"ab" + bytes([7]), [97, END, 98], b"abcdefgh")
    found, chunks = run(script, [[0], [1], [2]], temperature=0, max_tokens=5, stop=("b\x07",))
    assert found == [
        ("a", [97, 98, 7], "stop"),
        ("a", [97, END], "end"),
        ("abcde", [97, 98, 99, 100, 101], "length"),
    ]
    assert (chunks[1], script.calls) == (Chunk(1, "a", (97,), None), 5)


def test_text_comes_as_soon_as_it_is_known():
    script = Script(b"abcd")
    stream = generate(script, [[0]], decode=decode, max_tokens=4, end=None, temperature=0)
    assert script.calls == 0
    for step, letter in enumerate("abcd", 1):
        assert (next(stream).text, script.calls) == (letter, step)


@pytest.mark.parametrize("text", ["naïve", "€5 – 𝄞!", "\U0010ffff"])
def test_a_character_is_held_back_until_it_is_whole(text):
    found, chunks = said(text)
    assert (found[0][0], [chunk.text for chunk in chunks]) == (text, [*text])
    assert [len(chunk.tokens) for chunk in chunks] == [len(one.encode()) for one in text]


def test_bytes_that_are_no_character_are_replaced():
    found, _ = said(b"a\xffb\xe2\x82")
    assert found[0][0] == "a\ufffdb\ufffd"
    found, _ = said(b"a\xe2\x82stop", stop="stop")
    assert found[0] == ("a\ufffd", [*b"a\xe2\x82stop"], "stop")


def test_the_beginning_of_a_stop_string_is_held_back():
    found, chunks = said("a\n\nb\n\n\n", stop=("\n\n\n",))
    assert found[0] == ("a\n\nb", [*b"a\n\nb\n\n\n"], "stop")
    assert [chunk.text for chunk in chunks] == ["a", "\n\nb", ""]
    found, chunks = said("ab€", stop=("b€!",), max_tokens=4)
    assert found[0] == ("ab\ufffd", [*"ab€".encode()[:4]], "length")
    assert [chunk.text for chunk in chunks] == ["a", "b\ufffd"]


class Tokens:
    """Tokens of several bytes: number n stands for ``words[n]``."""

    def __init__(self, words):
        self.words = words

    def decode(self, tokens):
        return b"".join(self.words[token] if token < len(self.words) else b"" for token in tokens)


STOPS = st.lists(st.text("abé", min_size=1, max_size=4), max_size=3)


@given(st.text("abé", min_size=1, max_size=12), STOPS, st.randoms(use_true_random=False))
@example("xabcabcd", ["abcd", "bca"], None)
@example("abc", ["abc", "b"], None)
def test_text_does_not_depend_on_the_tokens(text, stops, random):
    data = text.encode()
    cuts = [0, *(n for n in range(1, len(data)) if random and random.random() < 0.5), len(data)]
    words = [data[a:b] for a, b in pairwise(cuts)]
    options = {"temperature": 0, "max_tokens": len(words), "stop": stops, "end": END}
    model = Script(range(len(words)))
    found, _ = run(model, [[0]], decode=Tokens(words).decode, **options)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    expected = text
    if ends:
        last = min(ends)
        longest = max(len(s) for s in stops if s in text and text.find(s) + len(s) == last)
        expected = text[: last - longest]
    assert (found[0][0], found[0][2]) == (expected, "stop" if ends else "length")


def test_tokens_that_lose_their_space_at_the_beginning_keep_it_within_a_text():
    """As in vocabularies of characters with single bytes, which are known at the end alone."""
    words = [" one", " two", b"\xe2", b"\x82", b"\xac"]

    def stripped(tokens):
        tokens, last = [*tokens], []
        while tokens and isinstance(words[tokens[-1]], bytes):
            last.insert(0, words[tokens.pop()])
        parts = [
            word if isinstance(word, bytes) else word.encode()
            for word in map(words.__getitem__, tokens)
        ]
        return b"".join(parts).decode(errors="replace").lstrip().encode() + b"".join(last)

    def text(script, prompt):
        model = Script(*[script] * 5)
        return run(model, [prompt], decode=stripped, temperature=0, max_tokens=len(script))[0][0][0]

    assert text([1, 1, 0], [0]) == " two two one"
    assert text([2, 3, 4, 1, 2, 3, 4, 2, 3, 4, 0], [0]) == "€ two€€ one"
    assert text([1, 0], [0, 2, 3, 4]) == " two one"
    assert text([1, 2, 1, 0], [0]) == " two\ufffdtwo one"  # half a character


@given(
    st.lists(st.integers(-6, 6), min_size=1, max_size=9),
    st.integers(1, 10) | st.none(),
    st.sampled_from([0.013, 0.29, 0.501, 0.77, 0.951, 1.0, None]),
    st.sampled_from([0.3, 1.0, 1.7]),
)
def test_top_k_and_top_p_keep_the_most_probable(logits, top_k, top_p, temperature):
    weights = [math.exp(one / temperature) for one in logits]
    order = sorted(range(len(logits)), key=lambda n: (-logits[n], n))[:top_k]
    total, kept = sum(weights[n] for n in order), []
    for n in order:
        if top_p is None or top_p == 1 or sum(weights[m] for m in kept) < top_p * total:
            kept.append(n)
    expected = torch.zeros(len(logits), dtype=torch.float64)
    for n in kept:
        expected[n] = weights[n] / sum(weights[m] for m in kept)
    values = torch.tensor(logits, dtype=torch.float64)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    found = next_probabilities(values, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    rows = next_probabilities(torch.stack([values, values.flip(0)]), **options)
    torch.testing.assert_close(rows[0], expected, rtol=0, atol=1e-12)


def test_closed_forms_of_the_probabilities():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64).log()

    def kept(**options):
        options = {"temperature": 1.0, "top_k": None, "top_p": None} | options
        return next_probabilities(logits, **options).tolist()

    assert (kept(temperature=0), kept(temperature=5e-324)) == ([0, 1, 0, 0], [0, 1, 0, 0])
    single = torch.tensor([1.0, 3.0, 3.0 - 1e-6, -math.inf])
    for extreme in ({"temperature": 1e-50}, {"top_p": 1e-50}, {"temperature": 1e-50, "top_p": 0.5}):
        options = {"temperature": 1.0, "top_k": None, "top_p": None} | extreme
        assert next_probabilities(single, **options).tolist() == [0, 1, 0, 0]
    hot = next_probabilities(single, temperature=1e50, top_k=None, top_p=None)
    assert hot.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    far = torch.tensor([0.0, -50.0], dtype=torch.float64)
    assert next_probabilities(far, temperature=1.0, top_k=None, top_p=1.0)[1] > 0  # below rounding
    ties = next_probabilities(torch.zeros(3000), temperature=1.0, top_k=2, top_p=None)
    assert ties[:2].tolist() == [0.5, 0.5]
    ties = next_probabilities(torch.zeros(2, 5), temperature=0, top_k=None, top_p=None)
    assert ties.argmax(-1).tolist() == [0, 0]


def test_tokens_are_drawn_where_the_distribution_exceeds_a_number():
    probabilities = torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0]])
    numbers = [0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53]
    found = [draw(probabilities, [number]).item() for number in numbers]
    assert found == [0, 0, 2, 2, 3, 3]
    assert draw(torch.tensor([[0.5, 0.4999]]), [1 - 2**-53]).item() == 1  # a rounded sum


def test_what_cannot_be_generated_is_refused_at_the_call(refuses):
    model = Script(b"a", context=5)

    def call(prompts=((0,),), **options):
        return lambda: generate(
            model, prompts, **{"max_tokens": 1, "end": 0, "decode": decode} | options
        )

    refuses(
        GatesError,
        ("there is no prompt; expected at least one", call([])),
        (
            "prompt 2 of 2 has 6 tokens, expected 1 to 5, the context of the model; shorten it",
            call([[0], [0] * 6]),
        ),
        ("prompt 1 of 1 has 0 tokens, expected 1 to 5, .*; begin with the end token", call([[]])),
        ("prompt 1 of 1 has tokens 0 to 257, expected 0 to 256; use", call([[0, 257]])),
        ("prompt 1 of 1 has tokens -1 to 0, expected 0 to 256", call([[0, -1]])),
        ("temperature is -1, expected a finite number from 0", call(temperature=-1)),
        ("temperature is nan, expected", call(temperature=math.nan)),
        ("temperature is inf, expected", call(temperature=math.inf)),
        ("top-p is 2, expected more than 0 and at most 1", call(top_p=2)),
        ("top-p is 0, expected", call(top_p=0)),
        ("top-k is 0, expected at least 1", call(top_k=0)),
        ("the number of tokens is 0, expected at least 1", call(max_tokens=0)),
        ("the seed is -1, expected at least 0", call(seed=-1)),
        ("a stop string is empty, expected at least one character", call(stop=["a", ""])),
        ("a stop string is empty", call(stop="")),
    )


def test_logits_that_are_not_finite_are_refused(refuses, decoder):
    class Broken(Script):
        def forward(self, tokens, **options):
            logits = super().forward(tokens, **options)
            return logits.index_fill(0, torch.tensor([1]), torch.nan) if self.calls > 1 else logits

    stream = generate(
        Broken(b"ab", b"cd"), [[0], [1]], decode=decode, max_tokens=3, end=None, temperature=0
    )
    assert [next(stream).text for _ in range(2)] == ["a", "c"]
    refuses(GatesError, ("the largest logit .* is nan for prompt 2 of 2", lambda: next(stream)))
