"""Rules that open adapters by cosines, on cosines of known answer."""

import pytest
import torch
from torch.testing import assert_close

from diffusion.rivals.opening import RULES, less_similarity

COSINES = torch.tensor([[0.40, 0.10, 0.35, 0.05, 0.33, 0.02], [0.30, 0.29, 0.275, 0.1, 0.05, 0.0]])
FIRST, BEST3 = [1, 0, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("rule", "settings", "expected"),
    [
        ("largest gap", {"least": 1, "most": 4}, [BEST3, [1, 1, 1, 0, 0, 0]]),
        ("largest gap", {"least": 1, "most": 2}, [FIRST, [1, 1, 0, 0, 0, 0]]),
        ("absolute threshold", {"threshold": 0.29}, [BEST3, [1, 1, 0, 0, 0, 0]]),
        ("relative threshold", {"share": 0.9}, [FIRST, [1, 1, 1, 0, 0, 0]]),
        ("top", {"count": 3}, [BEST3, [1, 1, 1, 0, 0, 0]]),
        ("all", {}, [[1] * 6] * 2),
        ("mean", {}, [[1 / 6] * 6] * 2),
    ],
)
def test_what_is_opened(rule, settings, expected):
    assert_close(RULES[rule](COSINES, **settings), torch.tensor(expected, dtype=torch.float32))


def test_the_soft_threshold_is_a_sigmoid_of_widths():
    found = RULES["soft threshold"](COSINES, threshold=0.3, width=0.05)
    assert_close(found[1, 0], torch.tensor(0.5))
    assert_close(found[0, 2], torch.tensor(1.0).sigmoid())


def test_a_single_adapter_has_no_gap():
    assert RULES["largest gap"](torch.tensor([[0.2]])).tolist() == [[1.0]]


def test_what_is_like_a_better_one_opens_less():
    cosines = torch.tensor([[0.4, 0.3, 0.25]])
    similarities = torch.tensor([[1.0, 0.5, -0.2], [0.5, 1.0, 0.1], [-0.2, 0.1, 1.0]])
    found = less_similarity(cosines, similarities, less=0.4, threshold=0.2, width=0.1)
    rest = torch.tensor([[0.4, 0.3 - 0.4 * 0.5, 0.25 - 0.4 * 0.1]])
    assert_close(found, ((rest - 0.2) / 0.1).sigmoid())
    order = [2, 0, 1]
    moved = less_similarity(
        cosines[:, order], similarities[order][:, order], less=0.4, threshold=0.2, width=0.1
    )
    assert_close(moved, found[:, order])
