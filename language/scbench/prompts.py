"""Prompts of SCBench: what a model reads of a row, in the words of the published program.

Two things differ from that program: a token at the beginning is not doubled by a chat template, and
a question of Math.Find derives its "What is …?" from itself, not from the last one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from typing import Any, Literal

from core_gates.errors import GatesError, check_option
from language.scbench.row import TASKS, Answer, Row, Turn

Mode = Literal["turns", "requests"]
MARKER = "CUTCUTCUT"
SUMMARY_OPENING = "This paper"
QUESTIONS = {
    "qa_eng": "Question: {0}\nAnswer:",
    "qa_chn": "问题：{0}\n答案：",
    "choice_eng": "Question: {0}\nA. {1}\nB. {2}\nC. {3}\nD. {4}\n\n{article} correct answer is",
}
REQUESTS_MARGIN = 1000  # tokens that the published program leaves for the question of a request


@dataclass(frozen=True)
class Conversation:
    """Tokens of a context and of what follows it.

    Attributes:
        context: Read once; what a policy compresses. In turns it ends with the first question.
        questions: Read before each answer; the first of turns is empty.
        golden: Read instead of each answer of a model before the next question of turns; empty
            where the answers of the model are kept, of the last turn, and of requests.
        new_tokens: Most tokens of each answer.
        truncated: Tokens that were cut from the middle of the context.
    """

    context: tuple[int, ...]
    questions: tuple[tuple[int, ...], ...]
    golden: tuple[tuple[int, ...], ...]
    new_tokens: tuple[int, ...]
    truncated: int = 0


def conversation(
    row: Row,
    tokenizer: Any,
    mode: Mode,
    *,
    max_length: int | None,
    own_answers: bool = False,
    chat: bool = True,
) -> Conversation:
    """Return the tokens of a row.

    Args:
        row: A context with its questions.
        tokenizer: Of transformers. If it has a chat template, context and questions become the
            messages of a user.
        mode: ``turns``, each of which sees those before with their golden answers; or
            ``requests``, which see the context alone.
        max_length: Most tokens that the model reads, questions and answers included: the middle of
            a longer context is left out. Of a file at least the place that the published program
            leaves is left: for all answers, and of requests for 1,000 tokens of a question.
        own_answers: Of turns: follow-ups see the answers of the model, not golden ones.
        chat: Whether a chat template is used.

    Raises:
        GatesError: The length has no place for a context, the chat template none to cut, a
            question of Math.Find does not name what is asked for, or a golden answer is missing.
    """
    check_option("mode", mode, ("turns", "requests"), GatesError)
    prompts = _Prompts(row, tokenizer, chat=chat)
    golden: list[tuple[int, ...]] = [() for _ in row.turns]
    if mode == "requests":
        context = prompts.shared_context()
        questions = [prompts.request(turn) for turn in row.turns]
    else:
        context, questions = prompts.first_turn(), [()]
        for number, (before, turn) in enumerate(pairwise(row.turns)):
            if own_answers:
                questions.append(prompts.after_own_answer(turn))
            else:
                answer = _golden(before.answer, f"{row.task}, row {row.id}, turn {number + 1}")
                golden[number], question = prompts.after_golden_answer(answer, turn)
                questions.append(question)
    limits, length = tuple(row.limit(turn) for turn in row.turns), len(context)
    whole = Conversation(context, tuple(questions), tuple(golden), limits)
    if max_length is None or length <= (budget := max_length - _taken(whole, row, mode)):
        return whole
    if budget < 2:
        raise GatesError(
            f"a length of {max_length} has no place for a context: questions and answers of"
            f" {row.task} take {max_length - budget} tokens of it; give a longer one"
        )
    context = context[: budget // 2] + context[length - budget // 2 :]
    return replace(whole, context=context, truncated=length - len(context))


def _taken(whole: Conversation, row: Row, mode: Mode) -> int:
    """Return the tokens that questions and answers take, of a file at least as published."""
    read, taken = 0, 0
    for question, golden, limit in zip(
        whole.questions, whole.golden, whole.new_tokens, strict=True
    ):
        taken = max(taken, read + len(question) + limit)
        if mode == "turns":  # an answer of the model where there is no golden one
            read += len(question) + (len(golden) or limit)
    limits = row.new_tokens or TASKS[row.task].new_tokens
    answers = limits if isinstance(limits, int) else sum(limits.values()) / 2  # turns alternate
    published = int(answers * len(row.turns)) + REQUESTS_MARGIN * (mode == "requests")
    return max(taken, published) if row.origin == "file" else taken


def _golden(answer: Answer, place: str) -> str:
    """Return a golden answer as the published program prints it."""
    if answer in ("", ()):
        raise GatesError(
            f"{place} has no golden answer for the turn after it: give files with answers, or let"
            " the model keep its own"
        )
    return str(list(answer) if isinstance(answer, tuple) else answer)


class _Prompts:
    """Parts of the prompts of a row; messages where the tokenizer has a chat template."""

    def __init__(self, row: Row, tokenizer: Any, *, chat: bool = True) -> None:
        self.row, self.tokenizer = row, tokenizer
        self.chat = chat and bool(getattr(tokenizer, "chat_template", None))

    def first_turn(self) -> tuple[int, ...]:
        """Return the tokens of context and first question."""
        turn = self.row.turns[0]
        if self.row.task == "mf":
            text = f"{self._asked(turn)}\n\n{self.row.context}\n\n{turn.input}"
        else:
            text = f"{self._context()}\n\n{self._question(turn, 'The the')}"
        text = "".join(self._split(_user(MARKER + text))) if self.chat else text
        return self._tokens(text, first=True)

    def after_golden_answer(
        self, answer: str, turn: Turn
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the tokens of a golden answer and of the question after it, encoded as one."""
        plain = f"\n\n{self._question(turn, 'The letter of the')}"
        both = self._tokens(answer + (self._end_and_question(turn) if self.chat else plain))
        same = (a == b for a, b in zip(both, self._tokens(answer), strict=False))
        length = sum(takewhile(bool, same))  # the last token may reach into what follows
        return both[:length], both[length:]

    def after_own_answer(self, turn: Turn) -> tuple[int, ...]:
        """Return the tokens of the end of an answer and of the question after it."""
        if self.chat:
            return self._tokens(self._end_and_question(turn))
        end = self.tokenizer.eos_token_id
        return (*(() if end is None else (end,)), *self._tokens(self._question(turn, "The")))

    def shared_context(self) -> tuple[int, ...]:
        """Return the tokens of what all requests share; of Math.Find with the first question."""
        text = f"{self.row.turns[0].input}\n\n" * (self.row.task == "mf") + self._context()
        return self._tokens(self._split(_user(text + MARKER))[0] if self.chat else text, first=True)

    def request(self, turn: Turn) -> tuple[int, ...]:
        """Return the tokens of a question, which follow those of the context immediately."""
        text = self._question(turn, "The the")
        return self._tokens(self._split(_user(MARKER + text))[1] if self.chat else text)

    def _context(self) -> str:
        instruction = TASKS[self.row.task].instruction
        return f"{instruction}\n\n{self.row.context}" if instruction else self.row.context

    def _question(self, turn: Turn, article: str) -> str:
        """Return a question; of En.MultiChoice ``article`` differs between places as published."""
        asked = f"{self._asked(turn)}\n\n" if self.row.task == "mf" else ""
        form = QUESTIONS.get(self.row.task, "{0}")
        return asked + form.format(turn.input, *turn.options, article=article)

    def _asked(self, turn: Turn) -> str:
        """Return what a question of Math.Find asks for: "The … is" becomes "What is the …?"."""
        phrase = re.search("The (.+) is", turn.input)
        if phrase is None:
            raise GatesError(
                f"mf, row {self.row.id}: the question {turn.input[:60]!r} names nothing as 'The …"
                " is', from which 'What is the …?' is made: write it so"
            )
        return f"What is the {phrase[1].lower()}?"

    def _end_and_question(self, turn: Turn) -> str:
        """Return what follows an answer in a chat, up to where the next one begins."""
        answer = {"role": "assistant", "content": MARKER}
        question = _user(self._question(turn, "The"))
        opening = SUMMARY_OPENING if self.row.task == "summary" else ""
        return self._split([*_user("."), answer, *question])[1] + opening

    def _split(self, messages: list[dict[str, str]]) -> tuple[str, str]:
        """Return a chat before and after the marker in it."""
        try:
            text = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # of any kind: a template may raise what it likes
            raise GatesError(
                f"the chat template of the tokenizer fails ({' '.join(str(error).split())}): use a"
                " tokenizer without one"
            ) from error
        before, marker, after = text.partition(MARKER)
        if not marker or MARKER in after:
            raise GatesError(
                "the chat template of the tokenizer leaves no place to cut, it drops or repeats"
                " messages: use a tokenizer without one"
            )
        return before, after

    def _tokens(self, text: str, *, first: bool = False) -> tuple[int, ...]:
        """Return the tokens of a text; a chat template brings those at the beginning itself."""
        encoded = self.tokenizer(text, add_special_tokens=first and not self.chat, verbose=False)
        return tuple(encoded["input_ids"])


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
