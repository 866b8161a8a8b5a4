"""What prompts tell: words that adapters are found by, and prompts that ask for no image."""

import re

import numpy as np
from numpy.typing import NDArray

WORD, _PART = re.compile(r"\w+"), re.compile(r"[^\W_]+")

COMMON = frozenset(WORD.findall("""
    a about after all an and any are as at be been but by can did do does for from had has have he
    her his how i if image images in into is it its me my no not of on or our out over picture
    pictures she so some style styled styles than that the their them then there these they this
    those to under up was we were what when where which who will with without you your
"""))  # fmt: skip
"""Words that any prompt may hold, and that no adapter is found by."""


def told_words(text: str) -> str:
    """Return the words of a text that tell something, in lower case without a plural s.

    They are parted by single spaces, with one more at either end.
    """
    parts = [part for part in _PART.findall(text.casefold()) if part not in COMMON]
    return f" {' '.join(part.removesuffix('s') for part in parts)} "


UNRELATED = (
    "The invoice is due at the end of the month.", "How do I reset my password?",
    "She forgot to call after the meeting.", "The committee approved the new budget.",
    "The theorem follows by induction.", "Please reply before Friday.",
    "Interest rates rose again last year.", "I cannot remember his name.",
    "The court dismissed the appeal.", "Sort the list in ascending order.",
    "They moved to another city for work.", "The election was held in spring.",
    "Your order has been shipped.", "The experiment was repeated three times.",
    "We should talk about the contract.", "Translate this sentence into French.",
    "The company hired ten engineers.", "It is too late to apologize.",
    "Nothing in the report surprised him.", "The deadline was moved twice.",
    "Which version did you install?", "Most of the answers were wrong.",
    "He denies that he knew about it.", "The lecture begins at nine.",
)  # fmt: skip
"""Prompts that ask for no image: what they reach by weights is no reason to take an adapter."""

_UNREACHED = 0.99  # quantile of the cosines of unrelated prompts that a cosine has to reach


def least_cosine(vectors: NDArray[np.float32], unrelated: NDArray[np.float32]) -> float:
    """Return the smallest cosine of a prompt with which an adapter is found.

    Args:
        vectors: Of adapters (n, dim).
        unrelated: Of :data:`UNRELATED` (prompts, dim).
    """
    return float(np.quantile(vectors @ unrelated.T, _UNREACHED))
