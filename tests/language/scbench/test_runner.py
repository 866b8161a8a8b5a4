"""A context read once and asked several times: answers are those of plain transformers."""

import time
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from language.scbench.policies.registry import policy_of
from language.scbench.prompts import Conversation
from language.scbench.retriever import retriever
from language.scbench.runner import (
    COMPRESSION,
    DECODING,
    PREFILL,
    QUESTION,
    Answering,
    loss_after,
)

LIMIT = 4


@pytest.fixture(scope="module")
def models():
    """A model with random weights that policies may change, and the same as it is."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=None, bos_token_id=None)).eval()
    for weight in plain.parameters():
        weight.data *= 4  # so that answers differ
    model = LlamaForCausalLM(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    return model, plain


def tokens(seed, length):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(50, (length,), generator=generator).tolist())


def asked(first=5, context=30):
    """Three questions, the first of which may be empty."""
    questions = (tokens(1, first), tokens(2, 6), tokens(3, 1))
    return Conversation(
        tokens(0, context), questions, (tokens(5, 3), tokens(6, 2), ()), (LIMIT,) * 3
    )


def continued(plain, before):
    """What transformers adds greedily."""
    ids = torch.tensor([before])
    found = plain.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                           max_new_tokens=LIMIT, pad_token_id=0)  # fmt: skip
    return found[0, len(before) :].tolist()


def test_requests_of_a_full_cache_are_those_of_transformers(models):
    model, plain = models
    conversation = asked()
    answers, _ = Answering(model, policy_of("full")).answers(conversation, "requests")
    expected = [continued(plain, conversation.context + q) for q in conversation.questions]
    assert answers == expected
    assert len({*map(tuple, answers)}) == 3


def test_turns_of_a_full_cache_are_those_of_transformers(models):
    model, plain = models
    conversation = asked(first=0)
    answering = Answering(model, policy_of("full"))
    golden, _ = answering.answers(conversation, "turns")
    own, _ = answering.answers(conversation, "turns", own_answers=True)
    before = before_own = conversation.context
    for number, question in enumerate(conversation.questions):
        before, before_own = before + question, before_own + question
        assert golden[number] == continued(plain, before)
        assert own[number] == continued(plain, before_own)
        before += conversation.golden[number]
        before_own += tuple(own[number])
    assert own[1:] != golden[1:]


def test_an_end_is_no_part_of_an_answer(models):
    model, plain = models
    conversation = asked()
    whole = [continued(plain, conversation.context + q) for q in conversation.questions]
    end = whole[0][1]
    answers, _ = Answering(model, policy_of("full"), [end]).answers(conversation, "requests")
    assert answers == [a[: a.index(end)] if end in a else a for a in whole]
    assert answers[0] == whole[0][: whole[0].index(end)]


def test_own_answers_that_end_are_read_to_their_end(models):
    model, plain = models
    conversation = asked(first=0)
    end = continued(plain, conversation.context)[1]
    answering = Answering(model, policy_of("full"), [end])
    (first, second, _), _ = answering.answers(conversation, "turns", own_answers=True)
    expected = continued(plain, (*conversation.context, *first, *conversation.questions[1]))
    assert second == (expected[: expected.index(end)] if end in expected else expected)


@pytest.mark.parametrize("policy", ["full", "streaming"])
def test_a_request_does_not_know_the_others(models, policy):
    model, _ = models
    conversation = asked()
    answering = Answering(model, policy_of(policy))
    answers, cost = answering.answers(conversation, "requests")
    turned = replace(conversation, questions=conversation.questions[::-1])
    again, _ = answering.answers(turned, "requests")
    assert again == answers[::-1]
    assert cost.read == pytest.approx({"full": 1.0, "streaming": 0.58}[policy], abs=0.05)


def test_every_stage_is_counted(models):
    model, _ = models
    conversation = asked()
    full = 2 * 2 * 2 * 8 * 4  # keys and values, layers, key heads, features, bytes
    _, cost = Answering(model, policy_of("streaming", keep=0.5)).answers(conversation, "requests")
    assert cost.tokens == {PREFILL: 30, COMPRESSION: 30, QUESTION: 12, DECODING: 3 * (LIMIT - 1)}
    assert (cost.full_bytes, cost.held_bytes) == (30 * full, 15 * full)
    assert min(cost.seconds.values()) > 0


def test_loss_after_a_prompt_is_that_of_its_continuation(models):
    model, plain = models
    text = torch.tensor(tokens(9, 40))
    with torch.no_grad():
        expected = F.cross_entropy(plain(text[None]).logits[0, 24:-1], text[25:])
    whole = loss_after(model, policy_of("full"), text, 24)
    assert whole == pytest.approx(float(expected), rel=1e-5)
    assert loss_after(model, policy_of("streaming", keep=1.0), text, 24) == pytest.approx(whole)
    assert loss_after(model, policy_of("streaming", keep=0.25), text, 24) != pytest.approx(whole)


@pytest.mark.slow
def test_five_requests_are_three_times_faster_than_five_prompts():
    model, policy = retriever(), policy_of("full")
    generator = torch.Generator().manual_seed(0)
    symbols = torch.randperm(8192, generator=generator)[:4096].tolist()
    questions = tuple((symbols[800 * n],) for n in range(5))
    conversation = Conversation(tuple(symbols), questions, ((),) * 5, (3,) * 5)
    answering, seconds = Answering(model, policy), []
    answering.answers(conversation, "requests")
    for _ in range(3):
        begin = time.perf_counter()
        together, _ = answering.answers(conversation, "requests")
        middle = time.perf_counter()
        apart = [
            answering.answers(replace(conversation, questions=(one,)), "requests")[0][0]
            for one in questions
        ]
        seconds.append((time.perf_counter() - middle) / (middle - begin))
    assert together == apart
    assert sorted(seconds)[1] >= 3
