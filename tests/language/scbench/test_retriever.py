"""The model that surely retrieves: all without a policy, and of a dropped cache what it has."""

import json
from copy import deepcopy
from random import Random

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache, LlamaForCausalLM

from language.hf.pretrained import open_pretrained
from language.scbench.metrics import score
from language.scbench.prompts import conversation
from language.scbench.retriever import retriever, retriever_tokenizer
from language.scbench.tasks import generate

TOKENIZER = retriever_tokenizer()
END = TOKENIZER.eos_token_id
LENGTHS = (256, 2048, pytest.param(8192, marks=pytest.mark.slow))


@pytest.fixture(scope="module")
def model():
    return retriever()


@pytest.fixture(scope="module")
def half():
    return retriever().to(torch.bfloat16)


def rows(count, length, seed=0):
    return generate("kv", count, length, seed, TOKENIZER, form="symbols")


def tokens(text):
    return torch.tensor([TOKENIZER(text)["input_ids"]])


@torch.no_grad()
def read(model, cache, position, new):
    """Read tokens that stand at a position, whatever the cache holds; return the next token."""
    places = torch.arange(position, position + len(new))[None]
    output = model(torch.tensor([new]), cache=cache, position_ids=places)
    return int(output.logits[0, -1].argmax()), position + len(new)


def answers(model, row, mode, keep=None):
    """The answers to a row as text, golden ones are read between turns.

    ``keep(attention, length)`` chooses the positions of a layer that remain after the context.
    """
    chat = conversation(row, TOKENIZER, mode, max_length=None)
    context, cache = torch.tensor([chat.context]), DynamicCache(config=model.config)
    with torch.no_grad():
        output = model(context, cache=cache, output_attentions=keep is not None)
    following, position = int(output.logits[0, -1].argmax()), context.shape[1]
    for number, layer in enumerate(cache.layers if keep else ()):
        kept = keep(output.attentions[number][0, 0], position)
        layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
    texts = []
    for question, golden in zip(chat.questions, chat.golden, strict=True):
        own, place = deepcopy(cache), position
        if question:
            following, place = read(model, own, position, question)
        if mode == "turns":
            cache, position = deepcopy(own), place
        written = [following]
        while len(written) < 3:
            following, place = read(model, own, place, written[-1:])
            written.append(following)
        texts.append(TOKENIZER.decode(written))
        if golden:
            _, position = read(model, cache, position, golden)
    return texts


def right(model, row, mode, keep=None):
    texts = answers(model, row, mode, keep)
    return [score("kv", turn, text) for turn, text in zip(row.turns, texts, strict=True)]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ["model", "half"])
def test_everything_is_found_by_generate(name, length, request):
    """The answer, and then the end; the first pair, the last one and those between."""
    model = request.getfixturevalue(name)
    for row in rows(2, length):
        pairs = json.loads(row.context.partition("\n")[2])
        asked = [*pairs][:1] + [turn.input.split('"')[1] for turn in row.turns] + [*pairs][-1:]
        for key in asked[:: 1 if length < 2048 else 3]:
            prompt = tokens(f'{row.context}\n\nKey: "{key}"\nThe value is: ')
            written = model.generate(prompt, max_new_tokens=4, do_sample=False)
            *symbols, last = written[0, prompt.shape[1] :].tolist()
            assert TOKENIZER.decode(symbols) == pairs[key]
            assert last == (END if key != asked[-1] else tokens(key).item())


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ["model", "half"])
def test_everything_is_found_after_a_prefill(name, length, request):
    model = request.getfixturevalue(name)
    for mode in ("turns", "requests"):
        for row in rows(1 if length > 1024 else 4, length, seed=1):
            assert right(model, row, mode) == [1.0] * 5


def test_the_weights_are_those_of_a_plain_llama_and_leave_the_random_numbers_alone(model):
    state = torch.random.get_rng_state()
    again = retriever()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert type(again) is LlamaForCausalLM
    assert sum(weight.numel() for weight in again.parameters()) == 3_414_516
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
    codes = model.get_input_embeddings().weight[:-1, :64]
    codes = codes[torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))[:999]]
    assert set(codes.unique().tolist()) == {-1.0, 1.0}
    products = codes @ codes.T
    assert (products.diagonal() == 64).all()
    assert products.fill_diagonal_(0).max() == 16


def test_the_tokenizer_drops_all_text_but_symbols_and_commas():
    text = 'Extract {"s0017": "s0003 s0009 s8191", "s9999": "s12"}\n\nKey: "s0017"\nThe value is: '
    assert TOKENIZER(text)["input_ids"] == [17, 3, 9, 8191, END, END, 17]
    assert TOKENIZER("nothing of it")["input_ids"] == []
    assert TOKENIZER.decode([3, 9, 8191, END], skip_special_tokens=True) == "s0003 s0009 s8191"
    assert TOKENIZER.vocab_size == len(TOKENIZER) == END + 1


def test_a_symbol_that_is_not_there_is_answered_by_the_end(model):
    found = []
    for row in (*rows(3, 256), *rows(2, 2048)):
        absent = sorted(word for word in TOKENIZER.get_vocab() if word not in row.context)
        cache = DynamicCache(config=model.config)
        _, end = read(model, cache, 0, TOKENIZER(row.context)["input_ids"])
        words = [TOKENIZER(word)["input_ids"] for word in Random(0).sample(absent, 5)]
        found += [read(model, deepcopy(cache), end, word)[0] for word in words]
    assert found == [END] * 25


def test_prompts_of_several_lengths_are_padded_on_the_left(model):
    both = [rows(1, length)[0] for length in (256, 300)]
    prompts = [row.context + row.turns[2].input for row in both]
    batch = TOKENIZER(prompts, padding=True, return_tensors="pt")
    assert batch["attention_mask"][0, 0] == 0
    written = model.generate(**batch, max_new_tokens=3, do_sample=False)[:, -3:]
    assert TOKENIZER.batch_decode(written) == [row.turns[2].answer for row in both]


def test_saved_it_is_a_folder_like_any_other(model, tmp_path):
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    opened = open_pretrained(tmp_path, tmp_path / "cache")
    row = rows(1, 256)[0]
    prompt = row.context + row.turns[0].input
    assert opened.tokenizer.encode(prompt).tolist() == TOKENIZER(prompt)["input_ids"]
    assert (opened.tokenizer.end, opened.context) == (END, 16_384)
    assert right(opened.model, row, "turns") == [1.0] * 5


@pytest.mark.parametrize(("sinks", "ratio"), [(4, 0.5), (4, 0.3), (128, 0.25)])
def test_of_sinks_and_a_window_exactly_the_needles_inside_are_found(sinks, ratio, eager):
    """StreamingLLM: the same in both modes, whatever the seed."""

    def held(length):
        recent = length - (int(length * ratio) - sinks)
        return torch.cat([torch.arange(sinks), torch.arange(recent, length)])

    seen = set()
    for seed in range(3):
        for row in rows(1, 600, seed):
            for mode in ("turns", "requests"):
                context = list(conversation(row, TOKENIZER, mode, max_length=None).context)
                kept = {*held(len(context)).tolist()}
                firsts = [context.index(tokens(turn.answer)[0, 0]) for turn in row.turns]
                inside = [float({n, n + 1, n + 2} <= kept) for n in firsts]
                assert right(eager, row, mode, lambda _, length: held(length))[1:] == inside[1:]
                seen |= {*inside}
    assert seen == {0.0, 1.0}


@pytest.fixture(scope="module")
def eager():
    """A model that returns its attention."""
    model = retriever()
    model.set_attn_implementation("eager")
    return model


def test_the_last_token_looks_at_what_follows_its_symbol_and_each_at_the_one_before(eager):
    row = rows(1, 1024)[0]
    prompt = tokens(row.context + row.turns[3].input)
    with torch.no_grad():
        first, second = eager(prompt, output_attentions=True).attentions
    assert first[0, 0].diagonal(-1).min() > 0.999
    place = prompt[0].tolist().index(prompt[0, -1]) + 1
    assert second[0, 0, -1].argmax() == place
    assert second[0, 0, -1, place] > 0.999


def test_after_snapkv_the_first_turn_is_right_and_later_ones_are_not(eager):
    """Where the question is read before the cache is dropped, the answer is what is kept."""

    def keep(attention, length, window=32):
        pooled = F.avg_pool1d(attention[-window:, :-window].mean(0)[None], 5, 1, 2)[0]
        past = pooled.topk(length // 2 - window).indices.sort().values
        return torch.cat([past, torch.arange(length - window, length)])

    asked = rows(6, 1024)
    turns = torch.tensor([right(eager, row, "turns", keep) for row in asked])
    requests = torch.tensor([right(eager, row, "requests", keep) for row in asked])
    assert turns[:, 0].mean() == 1
    assert turns[:, 1:].mean() <= 0.5
    assert requests.mean() <= 0.5
