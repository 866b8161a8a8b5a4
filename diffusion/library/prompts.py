"""What prompts tell: words that adapters are found by, and images that no adapter draws."""

import re

import numpy as np
from numpy.typing import NDArray

WORD, _PART, _PLURAL = re.compile(r"\w+"), re.compile(r"[^\W_]+"), re.compile("(?<!s)s$")

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
    return f" {' '.join(_PLURAL.sub('', part) for part in parts)} "


UNRELATED = (
    "a photo of a fax machine on a desk", "a dentist with a drill", "a portrait of an accountant",
    "a bowl of lentils, top view", "an elevator in an office", "a forklift in a warehouse",
    "a stapler in watercolor", "a pair of nail clippers", "a nurse at work, low poly",
    "a parking garage at noon", "a tennis court from above", "a vacuum cleaner in pop art style",
    "a lawn mower in a shed", "a plumber under a sink", "an orange calculator on white",
    "a hippopotamus asleep", "a plate of noodles, studio light", "a sewing machine in art deco",
    "a shopping cart at an airport", "a moose in oil paint", "a jury in a courtroom",
    "a green toothbrush on blue", "a knee in a bandage", "a referee with a whistle",
)  # fmt: skip
"""Images that adapters hardly ever draw: what they reach by weights is no reason to take one."""

UNREACHED = 0.9  # of such prompts find nothing


def least_cosine(vectors: NDArray[np.float32], unrelated: NDArray[np.float32]) -> float:
    """Return the smallest cosine of a prompt with which an adapter is found.

    Args:
        vectors: Of adapters (n, dim).
        unrelated: Of `UNRELATED` (prompts, dim): for nine in ten of these, even the best
            cosine is smaller.
    """
    return float(np.quantile((vectors @ unrelated.T).max(0), UNREACHED))
