"""Random changes of adapters."""

import pytest
import torch

from diffusion.retrieval import collate, modules_of
from diffusion.retrieval.retriever_data import Augmentation, rotated

STILL = {
    "smallest_scale": 1.0,
    "largest_scale": 1.0,
    "dropped": 0.0,
    "kept_rank": 1.0,
    "noise": 0.0,
}


@pytest.fixture
def modules(config):
    return modules_of(config().shape)


@pytest.fixture
def batch(adapter, modules):
    return collate([adapter(0, rank=1), adapter(1, rank=4), adapter(2, types=("ff_a.0",))], modules)


def deltas(batch):
    return {name: batch.up[name] @ batch.down[name] for name in batch.down}


def test_a_rotation_keeps_the_change_and_the_padding(batch):
    for name in batch.down:
        down, up = rotated(batch.down[name], batch.up[name])
        torch.testing.assert_close(up @ down, deltas(batch)[name], rtol=0, atol=1e-5)
        assert torch.equal(down.ne(0).any(2), batch.down[name].ne(0).any(2))
    assert (down[1] - batch.down[name][1]).abs().max() > 0.1


def test_without_options_nothing_but_the_factors_changes(batch, modules):
    torch.manual_seed(0)
    found = Augmentation(**STILL)(batch, modules)
    assert torch.equal(found.present, batch.present)
    for name, delta in deltas(batch).items():
        torch.testing.assert_close(deltas(found)[name], delta, rtol=0, atol=1e-5)


def test_each_option_does_what_it_is_named_for(batch, modules):
    torch.manual_seed(0)
    scaled = deltas(
        Augmentation(**{**STILL, "largest_scale": 1.3, "smallest_scale": 0.7})(batch, modules)
    )
    name = "transformer_blocks.0.ff.net.0.proj"
    ratios = scaled[name].norm(dim=(1, 2)) / deltas(batch)[name].norm(dim=(1, 2))
    assert ((ratios > 0.7) & (ratios < 1.3)).all()
    assert len(set(ratios.tolist())) == 3

    kept = Augmentation(**{**STILL, "kept_rank": 0.25})
    ranks = set()
    for _ in range(20):
        cut = deltas(kept(batch, modules))[name]
        assert torch.linalg.matrix_rank(cut[0]) == 1
        ranks.add(int(torch.linalg.matrix_rank(cut[1])))
    assert ranks == {2, 3, 4} or ranks == {1, 2, 3, 4}

    noisy = deltas(Augmentation(**{**STILL, "noise": 0.1})(batch, modules))[name]
    error = (noisy - deltas(batch)[name]).norm() / deltas(batch)[name].norm()
    assert 0.02 < error < 0.3


def test_dropped_layers_are_marked_and_one_stays(batch, modules):
    torch.manual_seed(0)
    dropping = Augmentation(**{**STILL, "dropped": 0.9})
    counts = []
    for _ in range(50):
        found = dropping(batch, modules)
        assert found.present.any(1).all()
        assert not (found.present & ~batch.present).any()
        counts.append(found.present.sum(1))
        changed = torch.zeros_like(found.present)
        for number, module in enumerate(modules):
            for part in module.parts:
                if part in found.down:
                    changed[:, number] |= deltas(found)[part].ne(0).any(2).any(1)
        assert torch.equal(changed, found.present)
    counts = torch.stack(counts)
    assert (counts[:, 2] == 1).all()
    assert counts[:, 0].min() < 8
    assert counts[:, 0].max() > 13


@pytest.mark.parametrize(
    "options",
    [
        {"kept_rank": 0},
        {"dropped": 1},
        {"noise": -1},
        {"smallest_scale": 2.0},
        {"noise": float("nan")},
    ],
)
def test_numbers_out_of_range(options):
    with pytest.raises(ValueError, match="must"):
        Augmentation(**options)
