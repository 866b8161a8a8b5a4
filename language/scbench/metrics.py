"""How answers are scored: the rules of SCBench's ``compute_scores.py``, without its libraries.

Each rule is that of the published program (MInference, ``scbench/``), whose quirks are kept, so
that figures can be compared; where it scores something that the task does not ask for, ours
differs, as the docstring of the function explains. A score is between 0 and 1.
"""

from __future__ import annotations

import ast
import math
import re
import string
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from core_gates.errors import GatesError
from language.scbench.row import Row, Turn

LETTERS = "ABCD"
SIMILAR = 0.8
"""BLEU from which a function counts as repeated."""

Functions = Sequence[tuple[str, str]]
"""Names of functions with their code."""

_NUMBER = re.compile(r"\d+\.\d+|\d+")
_FENCED = re.compile(r"^```(?:\w+)?\s*\n(.*?)(?=^```)```", re.DOTALL | re.MULTILINE)
_CHOICE_MARKS = re.compile("[\n\"'.,?!{}]")
_CHOICE_OPENINGS = "answer is:", "answer:", "answer is", "option is"
_CHINESE_MARKS = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟"
    "〰〾〿–—‘’‛“”„‟…‧﹏."
)


def score(
    task: str,
    turn: Turn,
    prediction: str,
    functions: Functions = (),
    *,
    language: str = "python",
) -> float:
    """Score an answer.

    Questions on keys of Mix.RepoQA+KV are scored as those of Retr.KV. In requests, the published
    program looks for their answers among the names of the fields of a record: their score there
    is always 0.

    Args:
        task: Of the row; of a mix, ``turn.task`` is the one that counts.
        turn: The question with its right answer.
        prediction: Text that the model generated.
        functions: Of RepoQA, all that are asked for in the repository, see
            `functions_by_repository`.
        language: Of RepoQA, in which the functions are written.

    Raises:
        GatesError: There is no such task, or the answer is empty or not of the kind it needs.
    """
    name = turn.task or task
    if name == "repoqa":
        wanted = turn.extra.get("name")
        return float(repeats_function(prediction, str(wanted), functions, language))
    if name == "mf":
        return float(first_number_is(prediction, _number(turn)))
    rule = _RULES.get(name)
    if rule is None:
        tasks = ", ".join(sorted([*_RULES, "mf", "repoqa"]))
        raise GatesError(f"there is no way to score task {name!r}: give one of {tasks}")
    return float(rule(prediction, _texts(name, turn)))


def contains(prediction: str, answers: Sequence[str]) -> bool:
    """Return whether the answer is part of a prediction, in the same case.

    A prediction that echoes the context is right, so the number of new tokens must be limited.
    """
    return answers[0] in prediction


def contains_any(prediction: str, answers: Sequence[str]) -> bool:
    """Return whether one of the answers is part of a prediction, in any case.

    An answer that is one text counts as a whole. The published program looks for each of its
    characters in ICL.ManyShot, where every answer in brackets is right.
    """
    return any(answer.upper() in prediction.strip().upper() for answer in answers)


def names_found(prediction: str, answers: Sequence[str]) -> float:
    """Return the fraction of names that are part of a prediction, in any case, to two digits.

    ``VAR1`` is part of ``VAR12``, and two of three names are .67.
    """
    found = sum(answer.lower() in prediction.lower() for answer in answers)
    return round(found / len(answers), 2)


def first_number_is(prediction: str, answer: float) -> bool:
    """Return whether the first number of a prediction is the answer.

    Its sign is dropped, so that -7 is 7, and 3.5 is 3 where the answer is an integer. A separator
    of thousands ends a number.
    """
    found = _NUMBER.search(prediction)
    number = float(found[0]) if found else math.inf
    if math.isinf(number):
        return False
    return (int(number) if isinstance(answer, int) else number) == answer


def first_digits_are(prediction: str, answers: Sequence[str]) -> bool:
    """Return whether the first digits of a prediction are the passkey."""
    found = re.search("[0-9]+", prediction)
    return found is not None and found[0] == answers[0]


def chooses(prediction: str, answers: Sequence[str]) -> bool:
    """Return whether a prediction chooses the right option.

    The first of these that applies counts: a first letter from A to D, so that "Because" is B; the
    whole prediction; what follows "answer is:", "answer:", "answer is" or "option is", in small
    letters, and one more character; the first word that is a letter from A to D.

    Args:
        prediction: Text that the model generated.
        answers: Text of the right option, and its letter.
    """
    text = prediction.strip()
    if text[:1] and text[0] in LETTERS:
        return text[0] in answers
    if text in answers:
        return True
    text = re.sub(" +", " ", _CHOICE_MARKS.sub(" ", text))
    for opening in _CHOICE_OPENINGS:
        _, here, rest = text.partition(opening)
        if here:
            return rest[1:].startswith(tuple(answers))
    chosen = next((word for word in text.split() if word in LETTERS), "")
    return chosen in answers


def character_f1(prediction: str, answers: Sequence[str]) -> float:
    """Return the largest F1 of the characters of a prediction and an answer, in any order.

    Punctuation and white space are left out. An answer that is one text counts as a whole, where
    the published program takes the best of its characters.
    """

    def characters(text: str) -> Counter[str]:
        dropped = {*string.punctuation, *_CHINESE_MARKS}
        return Counter(c for c in "".join(text.lower().split()) if c not in dropped)

    found, best = characters(prediction), 0.0
    for answer in map(characters, answers):
        if same := (found & answer).total():
            precision, recall = same / found.total(), same / answer.total()
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def rouge_lsum(prediction: str, answers: Sequence[str]) -> float:
    """Return ROUGE-Lsum, the F1 of words of longest common subsequences of lines.

    Lines are sentences, as no text is split otherwise; words are lower-case letters from a to z and
    digits, without stemming (Lin, 2004; package ``rouge-score``).
    """

    def lines(text: str) -> list[list[str]]:
        return [re.findall("[a-z0-9]+", line.lower()) for line in text.split("\n") if line]

    reference, candidate = lines(answers[0]), lines(prediction)
    left = [Counter(word for line in text for word in line) for text in (reference, candidate)]
    totals = [counts.total() for counts in left]
    if not all(totals):
        return 0.0
    hits = 0
    for line in reference:
        union = set().union(*(_common_subsequence(line, other) for other in candidate))
        for word in (line[place] for place in sorted(union)):
            if all(counts[word] > 0 for counts in left):
                hits += 1
                for counts in left:
                    counts[word] -= 1
    recall, precision = (hits / total for total in totals)
    return 2 * precision * recall / (precision + recall) if hits else 0.0


def _common_subsequence(first: list[str], second: list[str]) -> set[int]:
    """Return the places in the first of two lists of a longest subsequence that both have."""
    numbers = {word: number for number, word in enumerate({*first, *second})}
    a, b = (np.array([numbers[word] for word in words], int) for words in (first, second))
    lengths = np.zeros((len(a) + 1, len(b) + 1), int)
    for row, word in enumerate(a, 1):
        longer = np.maximum(lengths[row - 1, 1:], lengths[row - 1, :-1] + (b == word))
        lengths[row, 1:] = np.maximum.accumulate(longer)
    places, i, j = set(), len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            places.add(i)
        elif lengths[i, j - 1] > lengths[i - 1, j]:
            j -= 1
        else:
            i -= 1
    return places


def bleu(prediction: str, answer: str) -> float:
    """Return the BLEU of a text with one reference, by words between white space.

    Sequences of 1 to 4 words count. Where none of a length is shared, their number is not 0 but
    ln(words) / 10, and half of that for each further such length (smoothing 4 of Chen and Cherry,
    2014, as in NLTK).
    """
    words, reference = (re.split(r"\s+", text.strip()) for text in (prediction, answer))
    length, terms, smoothed = len(words), [], 0
    for n in range(1, 5):
        grams, others = (
            Counter(zip(*(text[start:] for start in range(n)), strict=False))
            for text in (words, reference)
        )
        shared: float = (grams & others).total()
        if n == 1 and not shared:
            return 0.0
        if not shared and length > 1:
            smoothed += 1
            shared = 1 / (2**smoothed * 5 / math.log(length))  # in the order of NLTK, to the bit
        if shared:
            terms.append(math.log(shared / max(1, grams.total())) / 4)
    return math.exp(min(0.0, 1 - len(reference) / length)) * math.exp(math.fsum(terms))


def repeats_function(
    prediction: str, wanted: str, functions: Functions, language: str = "python"
) -> bool:
    """Return whether a prediction repeats a function, RepoQA's pass@1.

    That is, of all functions, it is the most similar one by `bleu`, which is .8 or more. What
    counts of a prediction is its first function in a code fence, otherwise its first fence,
    otherwise all of it. The published program finds functions by grammars of six languages, also
    in code with errors; here they are found in Python without errors, otherwise the fence counts.

    Args:
        prediction: Text that the model generated.
        wanted: Name of the right function.
        functions: Those that are asked for in the repository.
        language: Of the functions.

    Raises:
        GatesError: The right function is not among them, or has no code.
    """
    if not dict(functions).get(wanted, "").strip():
        raise GatesError(
            f"function {wanted!r} is not among the {len(functions)} of its repository or empty:"
            " give all that the rows ask for, with their code"
        )
    blocks = _FENCED.findall(prediction.strip())
    whole = blocks[0] if blocks else prediction
    parsed = filter(None, map(_first_function, blocks)) if language == "python" else iter(())
    code = next(parsed, whole)
    best, name = max(
        ((bleu(code, function), name) for name, function in functions), key=lambda pair: pair[0]
    )
    return name == wanted and best >= SIMILAR


def _first_function(block: str) -> str | None:
    """Return the code of the first function of a block of Python, None where there is none."""
    block = textwrap.dedent(block)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what generated code does
            nodes = [*ast.walk(ast.parse(block))]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    found = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    first = min(found, key=lambda node: node.lineno, default=None)
    return None if first is None else ast.get_source_segment(block, first)


def functions_by_repository(rows: Iterable[Row]) -> dict[str, list[tuple[str, str]]]:
    """Return the functions that rows ask for, which a prediction is compared with.

    Args:
        rows: All rows of a file of RepoQA, or of Mix.RepoQA+KV.

    Returns:
        Names of repositories, each with the names of functions and their code.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        functions = found.setdefault(str(row.extra.get("repo")), [])
        for turn in row.turns:
            if (turn.task or row.task) == "repoqa":
                functions.append((str(turn.extra.get("name")), str(turn.answer)))
    return found


def _number(turn: Turn) -> float:
    """Return the answer of a turn of Math.Find."""
    answer = turn.answer[0] if isinstance(turn.answer, tuple) and turn.answer else turn.answer
    try:
        return answer if isinstance(answer, int | float) else int(str(answer))
    except ValueError as error:
        raise GatesError(f"the answer of mf is {answer!r}, expected an integer") from error


def _texts(task: str, turn: Turn) -> tuple[str, ...]:
    """Return all right answers of a turn as texts; of En.MultiChoice an option and its letter."""
    answer = turn.answer
    texts = tuple(map(str, answer)) if isinstance(answer, tuple) else (str(answer),)
    if not texts or not all(text.strip() for text in texts):
        raise GatesError(f"an answer of {task} is empty, which nothing can be scored by: give it")
    if task == "choice_eng" and len(texts) == 1:
        if texts[0] not in turn.options[: len(LETTERS)]:
            raise GatesError(
                f"answer {texts[0]!r} of choice_eng is not one of its options, {turn.options}"
            )
        return (*texts, LETTERS[turn.options.index(texts[0])])
    return texts


_RULES: Mapping[str, Callable[[str, Sequence[str]], float]] = {
    "kv": contains,
    "prefix_suffix": contains,
    "vt": names_found,
    "qa_eng": contains_any,
    "qa_chn": character_f1,
    "choice_eng": chooses,
    "many_shot": contains_any,
    "summary": rouge_lsum,
    "passkey": first_digits_are,
}
