"""A context that is read once, compressed once and asked several times, and what each stage takes.

The stages of Li et al. (2024), SCBench (arXiv 2412.10319): the context is read, its cache is
compressed, a question is read, and the answer is decoded greedily.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from language.scbench.policies.base import KVPolicy, cache_argument
from language.scbench.policies.cache import clock
from language.scbench.prompts import Conversation, Mode

PREFILL, COMPRESSION, QUESTION, DECODING = "prefill", "compression", "question", "decoding"
STAGES = (PREFILL, COMPRESSION, QUESTION, DECODING)


@dataclass
class Cost:
    """What the stages of a conversation took.

    Attributes:
        seconds: By stage, summed over questions. Requests restore the compressed state when a
            question is read.
        tokens: By stage: those of the context for both of the first, those that are read of
            questions, and those of answers that are read.
        full_bytes: Keys and values of the whole context.
        held_bytes: What the cache holds of it after compression.
        read: Fraction of the keys of all tokens before that the tokens of answers attended to; None
            where every answer was a single token.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    full_bytes: int = 0
    held_bytes: int = 0
    read: float | None = None


class Answering:
    """A model with a cache policy that answers the questions of conversations.

    Args:
        model: A causal language model of transformers in evaluation mode.
        policy: What becomes of its cache.
        ends: Tokens that end an answer.
    """

    def __init__(self, model: Any, policy: KVPolicy, ends: Collection[int] = ()) -> None:
        self.model, self.policy, self.ends = model, policy, frozenset(ends)
        self.argument = cache_argument(model)

    def answers(
        self, conversation: Conversation, mode: Mode, *, own_answers: bool = False
    ) -> tuple[list[list[int]], Cost]:
        """Return the tokens of the answers to all questions, and what they took.

        Args:
            conversation: The context and its questions.
            mode: Whether a question follows those before, with their answers, or the context alone.
            own_answers: Whether these are the answers of the model, not the right ones.
        """
        cost = Cost()
        with torch.inference_mode():
            cache, logits = self._prefilled(conversation, cost)
            found: list[list[int]] = []
            shares: list[float] = []
            before: tuple[int, ...] = ()
            for number, question in enumerate(conversation.questions):
                with self._timed(cost, QUESTION):
                    asked = copy.deepcopy(cache) if mode == "requests" else cache
                    if tokens := (*before, *question):
                        logits = self._read(asked, tokens)
                        cost.tokens[QUESTION] += len(tokens)
                decoded = copy.deepcopy(asked) if mode == "turns" and not own_answers else asked
                limit = conversation.new_tokens[number]
                answer = self._decoded(decoded, logits, limit, cost)
                if (share := decoded.read) is not None:
                    shares.append(share)
                found.append(answer)
                if mode == "turns":
                    whole = len(answer) == limit  # the last token was not read
                    own = tuple(answer[-1:]) if whole else ()
                    before = own if own_answers else conversation.golden[number]
        cost.read = fmean(shares) if shares else None
        return found, cost

    def _prefilled(self, conversation: Conversation, cost: Cost) -> tuple[Any, Tensor]:
        """Return the compressed cache of the context, and the logits (V,) after it."""
        cache = self.policy.make_cache(self.model)
        with self._timed(cost, PREFILL):
            logits = self._read(cache, conversation.context)
        cost.seconds[COMPRESSION] = cache.seconds
        cost.seconds[PREFILL] -= cache.seconds
        cost.tokens[PREFILL] = cost.tokens[COMPRESSION] = len(conversation.context)
        cost.full_bytes = cache.full_bytes
        cost.held_bytes = self.policy.cache_bytes(cache)
        return cache, logits

    def _decoded(self, cache: Any, logits: Tensor, limit: int, cost: Cost) -> list[int]:
        """Return the most likely tokens, one after the other, up to a limit or before an end."""
        answer: list[int] = []
        with self._timed(cost, DECODING):
            while (token := int(logits.argmax())) not in self.ends:
                answer.append(token)
                if len(answer) == limit:
                    break
                logits = self._read(cache, [token])
                cost.tokens[DECODING] += 1
        return answer

    def _read(self, cache: Any, tokens: Sequence[int]) -> Tensor:
        """Return the logits (V,) after tokens, which join the cache."""
        ids = torch.tensor([tokens], device=self.model.device)
        options = {self.argument: cache}
        return self.model(ids, use_cache=True, logits_to_keep=1, **options).logits[0, -1]

    @contextmanager
    def _timed(self, cost: Cost, stage: str) -> Iterator[None]:
        begin = clock(self.model.device)
        yield
        cost.seconds[stage] += clock(self.model.device) - begin


def loss_after(model: Any, policy: KVPolicy, tokens: Tensor, prompt: int) -> float:
    """Return the cross-entropy, in nats per token, of what follows a prompt whose cache is kept.

    Args:
        model: A causal language model of transformers in evaluation mode.
        policy: What becomes of the cache of the prompt.
        tokens: A text (T,).
        prompt: Its first tokens, which are compressed before the others are read.
    """
    cache, argument = policy.make_cache(model), cache_argument(model)
    ids = tokens.unsqueeze(0).to(model.device)
    with torch.inference_mode():
        model(ids[:, :prompt], use_cache=True, logits_to_keep=1, **{argument: cache})
        logits = model(ids[:, prompt:], use_cache=True, **{argument: cache}).logits
        return float(F.cross_entropy(logits[0, :-1].float(), ids[0, prompt + 1 :]))


def ends_of(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end an answer, of the generation of a model and its tokenizer."""
    named = model.generation_config.eos_token_id
    ends = named if isinstance(named, list) else [named]
    return {end for end in (*ends, tokenizer.eos_token_id) if end is not None}
