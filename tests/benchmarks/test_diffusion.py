"""The suite ``diffusion``: variants compute what they should, and bars belong to variants."""

import pytest
import torch
from torch.testing import assert_close

from benchmarks import diffusion
from benchmarks.comparison import Comparison, Peaks, load_head
from benchmarks.run import measure

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")


@pytest.fixture
def small(monkeypatch):
    sizes = {"TOKENS": 6, "TEXTS": 2, "WIDTH": 64, "HEADS": 2, "RANK": 2}
    sizes |= {"BATCH": 2, "TINY_TEXTS": 3, "TINY_RANK": 2, "SHAPE": "unit"}
    sizes |= {"ADAPTERS": 50, "DIM": 8, "K": 3, "FILES": 6, "FIRST": 2}
    for name, value in sizes.items():
        monkeypatch.setattr(diffusion, name, value)


@pytest.mark.parametrize("kind", [diffusion.block, diffusion.tiny_flux])
def test_gates_are_no_sum_and_stay_out_of_other_variants(kind, small):
    calls = kind(3).build(load_head)
    found = {name: call() for name, call in calls.items()}
    found = {n: torch.cat(f, 1) if isinstance(f, tuple) else f for n, f in found.items()}
    for one in found:
        for other in found:
            if one < other:
                assert not torch.allclose(found[one], found[other], rtol=1e-3, atol=1e-3)


def test_peft_has_the_same_adapters(small):
    from diffusion.fusion import GatedFusion

    torch.manual_seed(0)
    module = diffusion._block()
    adapters, given = diffusion._adapters(module, 2), diffusion._inputs()
    with torch.no_grad():
        with GatedFusion(module, adapters, mode="sum"):
            expected = torch.cat(module(**given), 1)
        assert_close(torch.cat(diffusion.with_peft(module, adapters)(**given), 1), expected)


def test_search_finds_what_the_product_finds(small):
    calls = diffusion.search().build(load_head)
    near, found = calls["matmul and top-k"](), calls["search"]()
    assert [match.adapter.name for match in found] == [f"a{place + 1}" for place in near]


def test_unchanged_files_are_not_read_again(small):
    calls = diffusion.rescan().build(load_head)
    first, again = calls["first scan"](), calls["unchanged"]()
    assert (first.added, again.added, again.unchanged) == (2, 0, 6)


@pytest.mark.slow
def test_extra_memory_is_a_row():
    def of(size):
        return lambda: torch.ones(size).sum()

    comparison = Comparison(
        "c", "o", lambda _: {"plain": of(1000), "large": of(3000)}, "plain",
        also={"large": "plain"}, peaks=Peaks({"large": 0.5, "plain": None}, 10_000, "whole"),
    )  # fmt: skip
    rows = {row["name"]: row for row in measure(comparison, rounds=2)}
    row = rows["c · large, extra peak memory"]
    assert (row["value"], row["ratio"], row["met"]) == (pytest.approx(0.008, rel=0.01), 0.8, False)
    assert rows["c · plain, extra peak memory"]["met"] is None
    assert rows["c · large, over plain"]["ratio"] > 0
