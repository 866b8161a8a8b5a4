"""ICL.ManyShot: hundreds of solved examples of a rule, then others to be solved.

The official examples are those of BIG-Bench Hard on dates, objects that change hands and
translations. These have the same form, and are about dates, parity and objects; all six options are
different, and one is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, timedelta
from random import Random

from language.scbench.row import Row, Turn
from language.scbench.tasks.fitting import TURNS, Tokens, fit

OPTIONS = 6
LETTERS = "ABCDEF"
PEOPLE = ("Alice", "Bob", "Claire", "Dave", "Eve", "Fred")
BALLS = ("black", "blue", "brown", "green", "orange", "pink", "purple", "red", "white", "yellow")
Example = tuple[str, str]
Rule = Callable[[Random], tuple[str, str, list[str]]]
"""Draws a question, its answer, and wrong ones."""


def many_shot_row(number: int, draws: Random, length: int, tokens: Tokens) -> Row:
    """Return a row, see `kv_row`; its questions are about all examples and have no depth."""
    name, rule = list(RULES.items())[number % len(RULES)]
    examples = _examples(draws, rule)
    asked = [next(examples) for _ in range(TURNS)]
    shots = fit(examples, _text, length, tokens)
    turns = tuple(Turn(f"{question}\nAnswer:", answer) for question, answer in asked)
    return Row("many_shot", number, _text(shots), turns, {"task": name}, "same form")


def _examples(draws: Random, rule: Rule) -> Iterator[Example]:
    """Yield different questions with options, and the letter of the right one."""
    before = set[str]()
    while True:
        question, answer, wrong = rule(draws)
        options = [answer, *draws.sample(wrong, OPTIONS - 1)]
        draws.shuffle(options)
        lines = (f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=True))
        text = "\n".join((question, "Options:", *lines))
        if question not in before:
            before.add(question)
            yield text, f"({LETTERS[options.index(answer)]})"


def _dates(draws: Random) -> tuple[str, str, list[str]]:
    """A date some days before or after another one."""
    today = date(draws.randint(1950, 2049), 1, 1) + timedelta(draws.randrange(365))
    days = draws.choice([n for n in range(-40, 41) if n])
    answer = today + timedelta(days)
    wrong = [answer + timedelta(n) for n in (-365, -30, -10, -7, -1, 1, 7, 10, 30, 365)]
    when = f"{abs(days)} days {'later' if days > 0 else 'earlier'}"
    question = f"Today is {today:%m/%d/%Y}. What is the date {when} in MM/DD/YYYY?"
    return question, f"{answer:%m/%d/%Y}", [f"{day:%m/%d/%Y}" for day in wrong]


def _parity(draws: Random) -> tuple[str, str, list[str]]:
    """How many of some numbers are odd."""
    numbers = [draws.randint(10, 99) for _ in range(draws.randint(OPTIONS - 1, 2 * OPTIONS))]
    answer = sum(number % 2 for number in numbers)
    wrong = [str(n) for n in range(max(len(numbers), OPTIONS) + 1) if n != answer]
    return f"How many of the numbers {', '.join(map(str, numbers))} are odd?", str(answer), wrong


def _objects(draws: Random) -> tuple[str, str, list[str]]:
    """What someone holds after several exchanges."""
    balls = draws.sample(BALLS, len(PEOPLE))
    held = dict(zip(PEOPLE, balls, strict=True))
    start = ", ".join(f"{person} has a {ball} ball" for person, ball in held.items())
    exchanges = [draws.sample(PEOPLE, 2) for _ in range(draws.randint(2, 8))]
    for one, other in exchanges:
        held[one], held[other] = held[other], held[one]
    story = " ".join(f"{one} and {other} swap balls." for one, other in exchanges)
    person = draws.choice(PEOPLE)
    question = f"{start}. {story} At the end, which ball does {person} have?"
    return question, held[person], [ball for ball in balls if ball != held[person]]


RULES: Mapping[str, Rule] = {"dates": _dates, "parity": _parity, "objects": _objects}


def _text(examples: Sequence[Example]) -> str:
    return "\n\n".join(f"{question}\nAnswer: {answer}" for question, answer in examples)
